# SPDX-License-Identifier: Apache-2.0
"""Files of what a prediction head tells of sequences."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow
from pyarrow import parquet

from evo2_megatron.config import UserError
from evo2_megatron.data.labelled import Labelled
from evo2_megatron.data.labels import Labels
from evo2_megatron.runtime.writable import check_may_write
from evo2_megatron.tasks.transfer import check_no_input, file_behind

SUFFIXES = (".tsv", ".csv", ".parquet")

_BASES_AT_ONCE = 1 << 20

Values: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Outputs [N, C] to probabilities of classes or labels, or to numbers, float64 [N, C]."""

_Column: TypeAlias = list | np.ndarray | pyarrow.Array


def manifest_path(target: Path) -> Path:
    """Of the manifest beside a table."""
    return target.with_name(f"{target.name}.manifest.json")


def check_target(target: Path, source: Path) -> None:
    """Raise UserError for a table that cannot be written: of no kind, in no folder, or what is read.

    Args:
        target: The table.
        source: The sequences.
    """
    if target.suffix not in SUFFIXES:
        raise UserError(f"{target}: the suffix says what is written; give one of {', '.join(SUFFIXES)}")
    files = (target, manifest_path(target))
    for path in files:
        file_behind(path)
    check_no_input(files, [source])
    check_may_write(target)


def write(
    path: Path,
    suffix: str,
    labels: Labels,
    rows: Labelled,
    outputs_NC: np.ndarray,
    values: Values,
) -> None:
    """Write a line for each sequence: ``id``, ``length``, labels where they are known (``true_...``), predictions.

    Or for each base, with ``position`` (from 1) and ``base`` instead of ``length``.

    Args:
        path: File to write.
        suffix: One of ``SUFFIXES``.
        labels: What was learnt.
        rows: The sequences, with labels where they have some.
        outputs_NC: Of the head, of each sequence or each base.
        values: Makes of outputs what they mean.
    """
    with_labels = not np.isnan(rows.targets).all()
    tables = (
        first | _told(labels, rows.targets[places] if with_labels else None, values(outputs_NC[places]))
        for first, places in (_of_bases(rows) if labels.per_base else _of_sequences(rows))
    )
    if suffix == ".parquet":
        _write_parquet(path, map(pyarrow.table, tables))
        return
    with path.open("w", newline="") as file:
        # Arrow's own writer puts every text in quotes
        writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t", lineterminator="\n")
        for number, columns in enumerate(tables):
            if number == 0:
                writer.writerow(columns)
            writer.writerows(zip(*(_texts(column) for column in columns.values())))


def _write_parquet(path: Path, tables: Iterator[pyarrow.Table]) -> None:
    first = next(tables)
    with parquet.ParquetWriter(path, first.schema) as writer:
        for table in chain([first], tables):
            writer.write_table(table)


def _of_sequences(rows: Labelled) -> Iterator[tuple[dict[str, _Column], slice]]:
    """Columns that name the lines of a part of the file, and where their outputs are: here, all."""
    yield {"id": rows.names, "length": [len(ids) for ids in rows.ids]}, slice(None)


def _of_bases(rows: Labelled) -> Iterator[tuple[dict[str, _Column], slice]]:
    ends, names = rows.ends, np.array(rows.names, dtype=object)
    starts = ends - [len(ids) for ids in rows.ids]
    for start in range(0, ends[-1], _BASES_AT_ONCE):
        end = min(start + _BASES_AT_ONCE, ends[-1])
        places = np.arange(start, end)
        row_of = np.searchsorted(ends, places, side="right")
        members = range(row_of[0], row_of[-1] + 1)
        letters = (rows.ids[row][max(start - starts[row], 0) : end - starts[row]] for row in members)
        yield (
            {
                "id": names[row_of],
                "position": places - starts[row_of] + 1,
                "base": list(b"".join(letters).decode()),
            },
            slice(start, end),
        )


def _told(labels: Labels, targets_NT: np.ndarray | None, values_NC: np.ndarray) -> dict[str, _Column]:
    columns: dict[str, _Column] = {}
    if targets_NT is not None:
        for name, target_N in zip(labels.columns, targets_NT.T):
            columns[f"true_{name}"] = _known(labels, target_N)
    if labels.task == "classification":
        columns["prediction"] = [labels.classes[number] for number in values_NC.argmax(1)]
    for name, value_N in zip(value_columns(labels), values_NC.T):
        columns[name] = value_N.astype(np.float32)
    return columns


def value_columns(labels: Labels) -> list[str]:
    """What the values of each output are called."""
    kind = "prediction" if labels.task == "regression" else "probability"
    return [f"{kind}_{name}" for name in labels.outputs]


def _texts(column: _Column) -> list:
    """Numbers with nine digits, which tell every float32 apart; what is not known is empty."""
    values = column.to_pylist() if isinstance(column, pyarrow.Array) else np.asarray(column).tolist()
    return [f"{value:.9g}" if isinstance(value, float) else value for value in values]


def _known(labels: Labels, target_N: np.ndarray) -> pyarrow.Array:
    """Classes, 0 and 1, or numbers; null where nothing is known."""
    unknown_N = np.isnan(target_N)
    if labels.task == "regression":
        return pyarrow.array(target_N.astype(np.float64), mask=unknown_N)
    whole = pyarrow.array(np.nan_to_num(target_N).astype(np.int64), mask=unknown_N)
    return whole if labels.task == "multilabel" else pyarrow.array(labels.classes).take(whole)
