# SPDX-License-Identifier: Apache-2.0
"""Results in files that other programs open: TSV, Parquet, NPZ and safetensors, all in the order of the FASTA file.

Every writer goes through the results sequence by sequence, so that memory holds a few of them, whatever their number.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, get_args, get_type_hints

import numpy as np

from evo2_megatron.config import UserError
from evo2_megatron.tasks.scoring.prediction_files import write_beside

if TYPE_CHECKING:
    import pyarrow

_ROWS_AT_A_TIME = 1 << 16
_SHARD_BYTES = 2 << 30
_RESERVED = "__metadata__"
"""What safetensors calls something else than an array."""


class Score(NamedTuple):
    """A line of ``scores``."""

    id: str
    length: int
    """Bases."""

    num_scored: int
    """Tokens that the log-likelihood is the sum over."""

    log_likelihood: float
    """In nat."""

    mean_log_likelihood: float
    """In nat per scored token; 0 if there is none."""


class Bases(NamedTuple):
    """Lines of ``bases``: consecutive values of one sequence."""

    id: str
    positions: np.ndarray
    """Int64 [N], counted from 1."""

    letters: bytes
    """N bases, as the FASTA file has them."""

    values: dict[str, np.ndarray]
    """Columns by name: float32 [N], or [N, H]."""


class Array(NamedTuple):
    """A named float32 array of an NPZ or safetensors file."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]


def write_rows(path: Path, kind: type[tuple], rows: Iterable[tuple]) -> None:
    """Write one line per row, as TSV or Parquet by the name of the file.

    Args:
        path: File to write.
        kind: Class of the rows: a NamedTuple whose fields are str, int or float, or None for what is not known.
        rows: The lines.
    """
    if path.suffix == ".parquet":
        schema = _schema_of(kind)
        write_beside(path, lambda file: _write_parquet(file, schema, _tables(schema, rows)))
        return

    def write(file: BinaryIO) -> None:
        file.write(("\t".join(kind._fields) + "\n").encode())
        for row in rows:
            file.write(("\t".join(map(_text, row)) + "\n").encode())

    write_beside(path, write)


def _text(value: str | int | float | None) -> str:
    if value is None:
        return "NA"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _schema_of(kind: type[tuple]) -> pyarrow.Schema:
    import pyarrow

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    known = {name: get_args(hint)[:1] or (hint,) for name, hint in get_type_hints(kind).items()}  # of "float | None"
    return pyarrow.schema([(name, types[hint]) for name, (hint,) in known.items()])


def _tables(schema: pyarrow.Schema, rows: Iterable[tuple]) -> Iterator[pyarrow.Table]:
    import pyarrow

    for group in _in_groups(rows):
        columns = [pyarrow.array(column, kind) for column, kind in zip(zip(*group), schema.types)]
        yield pyarrow.table(columns, schema=schema)


def write_bases(path: Path, columns: dict[str, int | None], bases: Iterable[Bases]) -> None:
    """Write one line per base, as TSV or Parquet by the name of the file.

    Args:
        path: File to write.
        columns: Names of the values, and for each how many make a vector; None: one number.
        bases: The lines; in TSV, the values must be numbers.
    """
    if path.suffix == ".parquet":
        schema = _bases_schema(columns)
        write_beside(path, lambda file: _write_parquet(file, schema, _bases_tables(schema, bases)))
        return

    def write(file: BinaryIO) -> None:
        file.write(("\t".join(["id", "position", "base", *columns]) + "\n").encode())
        for part in bases:
            lines = io.StringIO()
            for row in zip(
                part.positions.tolist(), part.letters.decode(), *(v.tolist() for v in part.values.values())
            ):
                position, letter, *numbers = row
                lines.write(f"{part.id}\t{position}\t{letter}" + "".join(f"\t{x:.9g}" for x in numbers) + "\n")
            file.write(lines.getvalue().encode())

    write_beside(path, write)


def write_vectors(path: Path, ids: Sequence[str], lengths: Sequence[int], vectors: Sequence[Array]) -> None:
    """Write one vector per sequence and array [N, H]: Parquet, NPZ or safetensors by the name of the file.

    Arrays are loaded whole. In Parquet they are columns beside ``id`` and ``length``; in NPZ there is an array
    ``ids``, and in safetensors the metadata have a JSON list ``ids``.
    """
    if path.suffix == ".parquet":
        import pyarrow

        columns = {"id": pyarrow.array(ids, pyarrow.string()), "length": pyarrow.array(lengths, pyarrow.int64())}
        columns |= {vector.name: _vector_column(vector.load()) for vector in vectors}
        table = pyarrow.table(columns)
        write_beside(path, lambda file: _write_parquet(file, table.schema, [table]))
    elif path.suffix == ".npz":
        names = np.array(ids, dtype=np.str_)
        write_arrays(path, [Array("ids", names.shape, lambda: names), *vectors])
    else:
        write_arrays(path, vectors, metadata={"ids": json.dumps(list(ids))})


def check_array_names(names: Sequence[str]) -> None:
    """Raise UserError for a sequence that a safetensors file cannot name."""
    if _RESERVED in names:
        raise UserError(
            f"--output-format safetensors keeps the name '{_RESERVED}' for itself, and the FASTA file has a record of "
            "that name; rename it, or write npz"
        )


def write_arrays(path: Path, arrays: Sequence[Array], *, metadata: dict[str, str] | None = None) -> None:
    """Write arrays by name, as NPZ or safetensors by the name of the file.

    More than 2 GiB of safetensors are divided as on the Hugging Face hub: ``name-00001-of-00002.safetensors``, and an
    index of which file has which array.
    """
    if path.suffix == ".npz":
        write_beside(path, lambda file: _write_npz(file, arrays))
        return
    from safetensors.numpy import save

    shards = _shards(arrays)
    files = [path.name]
    if len(shards) > 1:
        files = [f"{path.stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(files, shards):
        content = save({array.name: np.ascontiguousarray(array.load()) for array in shard}, metadata)
        write_beside(path.with_name(name), lambda file, content=content: file.write(content))
    if len(shards) > 1:
        places = {array.name: name for name, shard in zip(files, shards) for array in shard}
        text = json.dumps({"metadata": {"total_size": sum(map(_num_bytes, arrays))}, "weight_map": places})
        write_beside(path.with_name(f"{path.name}.index.json"), lambda file: file.write(text.encode()))


def _num_bytes(array: Array) -> int:
    return 4 * int(np.prod(array.shape))


def _shards(arrays: Sequence[Array]) -> list[list[Array]]:
    shards: list[list[Array]] = [[]]
    size = 0
    for array in arrays:
        if shards[-1] and size + _num_bytes(array) > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(array)
        size += _num_bytes(array)
    return shards


def _write_npz(file: BinaryIO, arrays: Iterable[Array]) -> None:
    """As numpy.savez, one array in memory at a time, and without the time of day, so that equal results are equal."""
    with zipfile.ZipFile(file, "w") as archive:
        for array in arrays:
            with archive.open(zipfile.ZipInfo(f"{array.name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array.load()), allow_pickle=False)


def _write_parquet(file: BinaryIO, schema: pyarrow.Schema, tables: Iterable[pyarrow.Table]) -> None:
    from pyarrow import parquet

    with parquet.ParquetWriter(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _bases_schema(columns: dict[str, int | None]) -> pyarrow.Schema:
    import pyarrow

    def type_of(size: int | None) -> pyarrow.DataType:
        return pyarrow.float32() if size is None else pyarrow.list_(pyarrow.float32(), size)

    fixed = [("id", pyarrow.string()), ("position", pyarrow.int64()), ("base", pyarrow.string())]
    return pyarrow.schema(fixed + [(name, type_of(size)) for name, size in columns.items()])


def _bases_tables(schema: pyarrow.Schema, bases: Iterable[Bases]) -> Iterator[pyarrow.Table]:
    """Tables of at least ``_ROWS_AT_A_TIME`` lines, but for the last; long sequences in parts."""
    import pyarrow

    waiting: list[pyarrow.Table] = []
    num_rows = 0
    for part in bases:
        for start in range(0, len(part.letters), _ROWS_AT_A_TIME):
            piece = slice(start, start + _ROWS_AT_A_TIME)
            letters = list(part.letters[piece].decode())
            columns = [pyarrow.repeat(pyarrow.scalar(part.id), len(letters)), part.positions[piece], letters]
            columns += [_column(values[piece]) for values in part.values.values()]
            waiting.append(pyarrow.table([pyarrow.array(c) for c in columns], schema=schema))
            num_rows += len(letters)
            if num_rows >= _ROWS_AT_A_TIME:
                yield pyarrow.concat_tables(waiting).combine_chunks()
                waiting, num_rows = [], 0
    if waiting:
        yield pyarrow.concat_tables(waiting).combine_chunks()


def _column(values: np.ndarray) -> pyarrow.Array:
    import pyarrow

    return pyarrow.array(values) if values.ndim == 1 else _vector_column(values)


def _vector_column(values: np.ndarray) -> pyarrow.Array:
    import pyarrow

    flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1), pyarrow.float32())
    return pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _in_groups(rows: Iterable[tuple]) -> Iterator[list[tuple]]:
    group: list[tuple] = []
    for row in rows:
        group.append(row)
        if len(group) == _ROWS_AT_A_TIME:
            yield group
            group = []
    if group:
        yield group
