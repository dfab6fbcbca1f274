# SPDX-License-Identifier: Apache-2.0
"""Sequences with labels, from CSV, TSV, JSON Lines and Parquet files."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow
from pyarrow import csv, json, parquet

from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import encode_sequence

Task = Literal["classification", "multilabel", "regression"]

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Text may also be compressed: ``.csv.gz``."""

_LEAST_BLOCK, _LARGEST_BLOCK = 1 << 20, 1 << 30
_MISSING = ("", "na", "nan", "null", "none")
_TRUE, _FALSE = ("1", "1.0", "true"), ("0", "0.0", "false")


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What is told of a sequence, and where a table has it."""

    task: Task = "classification"
    """One of several classes; for each label yes or no; or numbers."""

    columns: tuple[str, ...] = ("label",)
    """Columns of the table: one for classification, else one for each output."""

    classes: tuple[str, ...] = ()
    """Of classification, the classes by their numbers."""

    def __post_init__(self) -> None:
        twice = [name for names in (self.columns, self.classes) for name in names if names.count(name) > 1]
        if not self.columns or twice:
            raise UserError(f"{twice[0]!r} is named twice" if twice else "name a column of labels")
        if self.task == "classification" and len(self.columns) > 1:
            raise UserError(
                f"a sequence has one class, so that classification has one column of labels, not {len(self.columns)}; "
                "for several, choose the task multilabel or regression"
            )

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what a model gives for a sequence: the classes, or the columns."""
        return self.classes if self.task == "classification" else self.columns


class Labelled(NamedTuple):
    """Rows of a table."""

    names: list[str]
    """Of the sequences: a column's values, or their numbers from 1."""

    ids: list[bytes]
    """Token ids, one byte each, in upper case, which is all that models read in training."""

    targets: np.ndarray
    """float32 [rows, columns]: number of the class, 0 or 1, or a number; NaN: not known."""

    num_left_out: int = 0
    """Rows of the table that had no label."""

    def digest(self) -> str:
        """SHA-256 of sequences and targets in their order; names do not count."""
        content = hashlib.sha256(np.ascontiguousarray(self.targets, "<f4").tobytes())
        for ids in self.ids:
            content.update(len(ids).to_bytes(8, "little") + ids)
        return content.hexdigest()


def is_table(path: Path) -> bool:
    """Whether a name is that of a table, and not of a FASTA file."""
    return _suffix(path) in TABLE_SUFFIXES


def read_labelled(
    path: Path, labels: Labels, *, sequence_column: str, id_column: str | None = None, needs_labels: bool = True
) -> Labelled:
    """Rows of a table.

    Args:
        path: Its suffix says what it is, see ``TABLE_SUFFIXES``.
        labels: What to read; of classification, its classes.
        sequence_column: Column of the bases.
        id_column: Column of names; None: rows are numbered from 1.
        needs_labels: Leave out rows that have no label. False: all rows, and columns of labels may be missing.

    Raises:
        UserError: The file cannot be read, has not these columns or, if wanted, no labelled row, or a value is none of
            its kind.
    """
    columns = labels.columns
    table = _read_table(
        path, [sequence_column, *([id_column] if id_column else [])], columns, all_of_them=needs_labels
    )
    targets = np.full((table.num_rows, len(columns)), np.nan, np.float32)
    for place, name in enumerate(columns):
        if name in table.column_names:
            targets[:, place] = _targets(table[name].to_pylist(), path, name, labels)
    known = ~np.isnan(targets).all(1)
    if needs_labels and not known.any():
        raise UserError(f"{path}: no row has a label in {', '.join(columns)}")
    rows = np.flatnonzero(known) if needs_labels else np.arange(table.num_rows)
    names = _names(table, path, id_column)
    sequences = _sequences(table, path, sequence_column, rows)
    return Labelled([names[row] for row in rows], sequences, targets[rows], table.num_rows - len(rows))


def find_classes(path: Path, column: str) -> tuple[str, ...]:
    """The classes that a column has, numbers by size and before names, or names by alphabet.

    Raises:
        UserError: The file cannot be read, or has fewer than two.
    """
    values = _read_table(path, [column])[column].to_pylist()
    found = {name for name in map(_text, values) if name.lower() not in _MISSING}
    if len(found) < 2:
        raise UserError(f"{path}: column {column!r} has {len(found)} class(es), and telling classes apart takes two")
    numbers = {name: _number(name) for name in found}
    return tuple(sorted(found, key=lambda name: (numbers[name] is None, numbers[name] or 0, name)))


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _read_table(
    path: Path, needed: Sequence[str], wanted: Sequence[str] = (), *, all_of_them: bool = True
) -> pyarrow.Table:
    """Only these columns, of CSV and TSV as text; of those wanted the ones there are, unless all must be."""
    suffix, named = _suffix(path), list(dict.fromkeys([*needed, *wanted]))
    try:
        source, size = _open(path)
        # a row must fit into a block, and a row may be a chromosome
        block = min(max(size, _LEAST_BLOCK), _LARGEST_BLOCK)
        if suffix in (".csv", ".tsv"):
            table = csv.read_csv(
                source,
                read_options=csv.ReadOptions(block_size=block),
                parse_options=csv.ParseOptions(delimiter="," if suffix == ".csv" else "\t"),
                convert_options=csv.ConvertOptions(column_types=dict.fromkeys(named, pyarrow.string())),
            )
        elif suffix == ".jsonl":
            table = json.read_json(source, read_options=json.ReadOptions(block_size=block))
        elif suffix == ".parquet":
            table = parquet.read_table(source)
        else:
            raise UserError(f"{path}: the suffix says no kind of table; give one of {', '.join(TABLE_SUFFIXES)}")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    for name in named:
        count = table.column_names.count(name)
        if count > 1 or (count == 0 and (all_of_them or name in needed)):
            how_many = "several columns" if count else "no column"
            raise UserError(f"{path} has {how_many} {name!r}; it has {', '.join(table.column_names)}")
    if table.num_rows == 0:
        raise UserError(f"{path} holds no rows")
    return table.select([name for name in named if name in table.column_names])


def _open(path: Path) -> tuple[Path | pyarrow.BufferReader, int]:
    """What Arrow reads, and its bytes; what is compressed is in memory, since only its end tells how long it is."""
    if path.suffix != ".gz":
        return path, path.stat().st_size
    data = gzip.decompress(path.read_bytes())
    return pyarrow.BufferReader(data), len(data)


def _names(table: pyarrow.Table, path: Path, id_column: str | None) -> list[str]:
    if id_column is None:
        return [str(number) for number in range(1, table.num_rows + 1)]
    names = [_text(value) for value in table[id_column].to_pylist()]
    for number, name in enumerate(names, 1):
        if not name or not name.isprintable():
            raise UserError(f"{path}, row {number}: {id_column} is {name!r}; it must be a printable name")
    return names


def _sequences(table: pyarrow.Table, path: Path, column: str, rows: np.ndarray) -> list[bytes]:
    """Token ids of these rows."""
    values = table[column].to_pylist()
    found = []
    for row in rows.tolist():
        value, where = values[row], f"{path}, row {row + 1}"
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {column} is {value!r}; it must be text with one base or more")
        found.append(encode_sequence(value.strip().upper().encode(), name=where))
    return found


def _text(value: Any) -> str:
    """A value as text: whole numbers without a fraction, for a column with gaps is one of floats."""
    if value is None:
        return ""
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).strip()


def _targets(values: list[Any], path: Path, column: str, labels: Labels) -> np.ndarray:
    """float32 [rows]."""
    number_of = {name: float(number) for number, name in enumerate(labels.classes)}
    targets = np.full(len(values), np.nan, np.float32)
    for row, value in enumerate(values):
        text = _text(value)
        if text.lower() in _MISSING and text not in number_of:
            continue
        if labels.task == "classification":
            target, wanted = number_of.get(text), f"one of {', '.join(labels.classes)}"
        elif labels.task == "multilabel":
            target, wanted = 1.0 if text.lower() in _TRUE else 0.0 if text.lower() in _FALSE else None, "0 or 1"
        else:
            target, wanted = _number(text), "a finite number"
        if target is None:
            raise UserError(f"{path}, row {row + 1}: {column} is {text!r}; it must be {wanted}")
        targets[row] = target
    return targets


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= float(np.finfo(np.float32).max) else None  # False for NaN, too
