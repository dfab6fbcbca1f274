# SPDX-License-Identifier: Apache-2.0
"""What is told of a sequence, or of each of its bases, and how values of tables say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow

from evo2_megatron.config import UserError

Task = Literal["classification", "multilabel", "regression"]

_MISSING = ("", "na", "nan", "null", "none")
_UNKNOWN_BASE = "."
_TRUE, _FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")
_EXACT = 2.0**53  # larger floats are all whole
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What is told, and where a table has it."""

    task: Task = "classification"
    """One of several classes; for each label yes or no; or numbers."""

    columns: tuple[str, ...] = ("label",)
    """Columns of the table: one for classification, else one for each output."""

    classes: tuple[str, ...] = ()
    """Of classification, the classes by their numbers."""

    per_base: bool = False
    """Whether a column has a value for each base of a sequence, instead of one for the sequence."""

    def __post_init__(self) -> None:
        twice = [name for names in (self.columns, self.classes) for name in names if names.count(name) > 1]
        if not self.columns or twice:
            raise UserError(f"{twice[0]!r} is named twice" if twice else "name a column of labels")
        if self.task == "classification" and len(self.columns) > 1:
            raise UserError(
                f"a {self.unit} has one class, so that classification has one column of labels, not "
                f"{len(self.columns)}; for several, choose the task multilabel or regression"
            )

    @property
    def unit(self) -> str:
        """What has labels."""
        return "base" if self.per_base else "sequence"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what a model gives for a sequence or a base: the classes, or the columns."""
        return self.classes if self.task == "classification" else self.columns


def is_known(value: Any) -> bool:
    """Whether a value of a table says anything."""
    return text(value).lower() not in _MISSING


def text(value: Any) -> str:
    """A value as text: whole numbers without a fraction, for a column with gaps is one of floats."""
    if value is None:
        return ""
    whole = isinstance(value, float) and abs(value) < _EXACT and value.is_integer()
    return str(int(value) if whole else value).strip()


def in_order(classes: set[str]) -> tuple[str, ...]:
    """Numbers by size and before names, or names by alphabet."""
    numbers = {name: _number(name) for name in classes}
    return tuple(sorted(classes, key=lambda name: (numbers[name] is None, numbers[name] or 0, name)))


def target(value: Any, labels: Labels, column: str, where: str) -> float:
    """Number of the class, 0 or 1, or the number; NaN: not known.

    Args:
        value: Of a table.
        labels: What it may be.
        column, where: For the error.

    Raises:
        UserError: It is none of these.
    """
    shown = text(value)
    if shown not in labels.classes and (not is_known(shown) or (labels.per_base and shown == _UNKNOWN_BASE)):
        return float("nan")
    if labels.task == "classification":
        number = float(labels.classes.index(shown)) if shown in labels.classes else None
        wanted = f"one of {', '.join(labels.classes)}"
    elif labels.task == "multilabel":
        number = 1.0 if shown.lower() in _TRUE else 0.0 if shown.lower() in _FALSE else None
        wanted = "0 or 1"
    else:
        number, wanted = _number(shown), "a finite number"
    if number is None:
        raise UserError(f"{where}: {column} is {shown!r}; it must be {wanted}")
    return number


def values_of_bases(cell: pyarrow.Scalar, num_bases: int, column: str, where: str) -> pyarrow.Array | None:
    """A value for each base: of a list; of a text with spaces between; or of a text's characters.

    Args:
        cell: Of a table.
        num_bases: Of the sequence.
        column, where: For errors.

    Returns:
        The values, of any type; None where the cell is empty.

    Raises:
        UserError: Another number of values, or one value that is none of these.
    """
    if isinstance(cell, pyarrow.ListScalar):  # the base of those of all kinds of lists
        values = cell.values
    else:
        content = cell.as_py()
        if not isinstance(content, str | None):
            raise UserError(
                f"{where}: {column} is {text(content)!r}; it must be a list or a text, a value for each base"
            )
        words = (content or "").split()
        values = list(words[0]) if len(words) == 1 and len(words[0]) == num_bases else words
        if len(values) == 1 != num_bases and not is_known(values[0]):
            return None
        values = pyarrow.array(values, pyarrow.string())
    if values is None or len(values) == 0:
        return None
    if len(values) != num_bases:
        is_word = len(values) == 1 and isinstance(values[0].as_py(), str)
        given = f"{len(values[0].as_py())} characters" if is_word else f"{len(values)} values"
        raise UserError(f"{where}: {column} has {given}, and the sequence {num_bases} bases; give one for each")
    return values


def targets_of_bases(values: pyarrow.Array, labels: Labels, column: str, where: str) -> np.ndarray:
    """As ``target``, float32, of what ``values_of_bases`` gives."""
    is_number = pyarrow.types.is_floating(values.type) or pyarrow.types.is_integer(values.type)
    if labels.task == "regression" and is_number:
        numbers = values.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False)  # NaN for null
        (too_large,) = np.nonzero(np.abs(numbers) > _LARGEST)
        for base in too_large.tolist():
            target(numbers[base].item(), labels, column, f"{where}, base {base + 1}")
        return numbers.astype(np.float32)
    encoded = values.dictionary_encode()
    numbers = encoded.indices.fill_null(-1).to_numpy()
    first = np.zeros(len(encoded.dictionary) + 1, np.int64)  # the last is what null's -1 finds
    first[numbers[::-1]] = np.arange(len(numbers), 0, -1)
    found = [
        target(value, labels, column, f"{where}, base {base}")
        for value, base in zip(encoded.dictionary.to_pylist(), first.tolist())
    ]
    return np.array([*found, np.nan], np.float32)[numbers]


def classes_of_bases(values: pyarrow.Array) -> set[str]:
    """Texts of those values that are known."""
    return {text(value) for value in values.unique().to_pylist() if is_known(value)} - {_UNKNOWN_BASE}


def _number(shown: str) -> float | None:
    try:
        value = float(shown)
    except ValueError:
        return None
    if "_" in shown:  # digits in groups, as in programs
        return None
    return value if abs(value) <= _LARGEST else None  # False for NaN, too
