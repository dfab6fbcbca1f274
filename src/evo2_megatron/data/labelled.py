# SPDX-License-Identifier: Apache-2.0
"""Sequences with labels, from CSV, TSV, JSON Lines and Parquet files."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
from pyarrow import csv, json, parquet

from evo2_megatron.config import UserError
from evo2_megatron.data.labels import (
    Labels,
    classes_of_bases,
    in_order,
    is_known,
    target,
    targets_of_bases,
    text,
    values_of_bases,
)
from evo2_megatron.data.tokenizer import encode_sequence

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Text may also be compressed: ``.csv.gz``."""

_LEAST_BLOCK, _LARGEST_BLOCK = 1 << 20, 1 << 30


class Labelled(NamedTuple):
    """Rows of a table."""

    names: list[str]
    """Of the sequences: a column's values, or their numbers from 1."""

    ids: list[bytes]
    """Token ids, one byte each, in upper case, which is all that models read in training."""

    targets: np.ndarray
    """float32 [rows, columns]: number of the class, 0 or 1, or a number; NaN: not known. With labels per base,
    [bases, columns], one sequence after the other."""

    num_left_out: int = 0
    """Rows of the table that had no label."""

    @property
    def ends(self) -> np.ndarray:
        """Int64 [rows]: bases of the sequences up to each, itself included."""
        return np.cumsum([len(ids) for ids in self.ids])

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
    table = _read_table(
        path, [sequence_column, *([id_column] if id_column else [])], labels.columns, all_of_them=needs_labels
    )
    names, sequences = _names(table, path, id_column), table[sequence_column].to_pylist()

    def encoded(row: int) -> bytes:
        return _encode(sequences[row], sequence_column, f"{path}, row {row + 1}")

    if labels.per_base:
        kept, ids, targets = _read_bases(table, labels, encoded, path, needs_labels=needs_labels)
    else:
        targets = _targets(table, labels, path)
        rows = np.flatnonzero(~np.isnan(targets).all(1)) if needs_labels else np.arange(len(targets))
        kept, targets = rows.tolist(), targets[rows]
        ids = [encoded(row) for row in kept]
    if not kept:
        raise UserError(f"{path}: no row has a label in {', '.join(labels.columns)}")
    return Labelled([names[row] for row in kept], ids, targets, table.num_rows - len(kept))


def find_classes(path: Path, column: str, *, sequence_column: str | None = None) -> tuple[str, ...]:
    """The classes that a column has, numbers by size and before names, or names by alphabet.

    Args:
        path: Of a table.
        column: Of its labels.
        sequence_column: If each base has a class, column of the bases, whose numbers tell how a text is read.

    Raises:
        UserError: The file cannot be read, or has fewer than two.
    """
    table = _read_table(path, [column, *([sequence_column] if sequence_column else [])])
    if sequence_column is None:
        _check_no_lists(table, [column], path)
        found = {text(value) for value in table[column].to_pylist() if is_known(value)}
    else:
        found = set()
        for row, (cell, bases) in enumerate(zip(table[column], table[sequence_column].to_pylist()), 1):
            where = f"{path}, row {row}"
            if _says_something(cell):
                values = values_of_bases(cell, len(_encode(bases, sequence_column, where)), column, where)
                found |= set() if values is None else classes_of_bases(values)
    if len(found) < 2:
        raise UserError(f"{path}: column {column!r} has {len(found)} class(es), and telling classes apart takes two")
    return in_order(found)


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
            table = _read_json(source, json.ReadOptions(block_size=block))
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


def _read_json(source: Path | pyarrow.BufferReader, options: json.ReadOptions) -> pyarrow.Table:
    """Texts stay texts: of those that look like dates Arrow makes dates."""
    table = json.read_json(source, read_options=options)
    dates = [(field.name, pyarrow.string()) for field in table.schema if pyarrow.types.is_temporal(field.type)]
    if not dates:
        return table
    if not isinstance(source, Path):
        source.seek(0)
    return json.read_json(source, options, json.ParseOptions(explicit_schema=pyarrow.schema(dates)))


def _open(path: Path) -> tuple[Path | pyarrow.BufferReader, int]:
    """What Arrow reads, and its bytes; what is compressed is in memory, since only its end tells how long it is."""
    if path.suffix != ".gz":
        return path, path.stat().st_size
    data = gzip.decompress(path.read_bytes())
    return pyarrow.BufferReader(data), len(data)


def _names(table: pyarrow.Table, path: Path, id_column: str | None) -> list[str]:
    if id_column is None:
        return [str(number) for number in range(1, table.num_rows + 1)]
    names = [text(value) for value in table[id_column].to_pylist()]
    for number, name in enumerate(names, 1):
        if not name or not name.isprintable():
            raise UserError(f"{path}, row {number}: {id_column} is {name!r}; it must be a printable name")
    return names


def _check_no_lists(table: pyarrow.Table, columns: Sequence[str], path: Path) -> None:
    for name in columns:
        if name in table.column_names and pyarrow.types.is_nested(table[name].type):
            raise UserError(
                f"{path}: column {name!r} has lists, and a sequence has one value; for one of each base there is "
                "evo2_train_head --per-base"
            )


def _encode(bases: object, column: str, where: str) -> bytes:
    """Token ids of a sequence."""
    if not isinstance(bases, str) or not bases.strip():
        raise UserError(f"{where}: {column} is {bases!r}; it must be text with one base or more")
    return encode_sequence(bases.strip().encode().upper(), name=where)  # as text, one letter may become two


def _targets(table: pyarrow.Table, labels: Labels, path: Path) -> np.ndarray:
    """float32 [rows, columns]; NaN where nothing is known."""
    _check_no_lists(table, labels.columns, path)
    targets = np.full((table.num_rows, len(labels.columns)), np.nan, np.float32)
    for place, name in enumerate(labels.columns):
        if name in table.column_names:
            values = enumerate(table[name].to_pylist(), 1)
            targets[:, place] = [target(value, labels, name, f"{path}, row {row}") for row, value in values]
    return targets


def _read_bases(
    table: pyarrow.Table, labels: Labels, encoded: Callable[[int], bytes], path: Path, *, needs_labels: bool
) -> tuple[list[int], list[bytes], np.ndarray]:
    """Rows, their token ids, and targets of their bases, one row after the other; if wanted of those with a label."""
    kept: list[int] = []
    ids: list[bytes] = []
    targets: list[np.ndarray] = []
    for row in range(table.num_rows):
        cells = {name: table[name][row] for name in labels.columns if name in table.column_names}
        if needs_labels and not any(_says_something(cell, labels.classes) for cell in cells.values()):
            continue
        of_row = encoded(row)
        told = _targets_of_bases(cells, labels, len(of_row), f"{path}, row {row + 1}")
        if needs_labels and np.isnan(told).all():
            continue
        kept.append(row)
        ids.append(of_row)
        targets.append(told)
    return kept, ids, np.concatenate(targets) if targets else np.zeros((0, len(labels.columns)), np.float32)


def _targets_of_bases(cells: Mapping[str, pyarrow.Scalar], labels: Labels, num_bases: int, where: str) -> np.ndarray:
    """float32 [bases, columns] of a row; NaN where nothing is known."""
    targets = np.full((num_bases, len(labels.columns)), np.nan, np.float32)
    for place, name in enumerate(labels.columns):
        if name in cells and _says_something(cells[name], labels.classes):
            values = values_of_bases(cells[name], num_bases, name, where)
            if values is not None:
                targets[:, place] = targets_of_bases(values, labels, name, where)
    return targets


def _says_something(cell: pyarrow.Scalar, classes: Sequence[str] = ()) -> bool:
    if not cell.is_valid or isinstance(cell, pyarrow.ListScalar):
        return cell.is_valid
    value = cell.as_py()
    return is_known(value) or text(value) in classes
