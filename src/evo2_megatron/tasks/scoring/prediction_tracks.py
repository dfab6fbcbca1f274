# SPDX-License-Identifier: Apache-2.0
"""Values of bases in files that genome browsers open: bedGraph, which is text, and bigWig.

Both have intervals, 0-based, end excluded, here one for each base that has a value; the names of records are those of
chromosomes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from evo2_megatron.config import UserError
from evo2_megatron.tasks.scoring.prediction_files import write_beside
from evo2_megatron.tasks.scoring.prediction_tables import Bases
from evo2_megatron.tasks.transfer import check_space, new_files

MAX_CONTIGS = 65_535
"""What pybigtools 0.3.0 can number; of more, it loses some without a word."""

_BIGWIG_BYTES = 8
"""Bytes of a bigWig file per base, at most: 6.6 of random values."""


def check_num_contigs(num_contigs: int) -> None:
    """Raise UserError for more records than a bigWig file can have."""
    if num_contigs > MAX_CONTIGS:
        raise UserError(
            f"bigWig holds at most {MAX_CONTIGS} sequences, and the file has {num_contigs}; use bedgraph, or divide "
            "the file"
        )


def write_bedgraph(path: Path, column: str, bases: Iterable[Bases]) -> None:
    """Write a track line, and a line for each value of ``column``, in the order they come in."""

    def write(file: BinaryIO) -> None:
        file.write(f'track type=bedGraph name="{column}"\n'.encode())
        for part in bases:
            lines = io.StringIO()
            for end, value in zip(part.positions.tolist(), part.values[column].tolist()):
                lines.write(f"{part.id}\t{end - 1}\t{end}\t{value:.9g}\n")
            file.write(lines.getvalue().encode())

    write_beside(path, write)


def write_bigwig(path: Path, column: str, lengths: dict[str, int], bases: Iterable[Bases]) -> None:
    """Write the values of ``column`` with their summaries for lower magnifications; memory does not grow with them.

    Args:
        path: File to write.
        column: Name of the values.
        lengths: Bases of each record, sorted by name, as readers of the format expect.
        bases: The values; records in the order of ``lengths``, positions ascending.

    Raises:
        UserError: There is no value at all, which the format cannot say; or no room on the disk.
    """
    import pybigtools

    check_space(path.parent, _BIGWIG_BYTES * sum(lengths.values()))
    num_values, complete = 0, False

    def intervals() -> Iterator[tuple[str, int, int, float]]:
        nonlocal num_values, complete
        for part in bases:
            num_values += len(part.positions)
            for end, value in zip(part.positions.tolist(), part.values[column].tolist()):
                yield part.id, end - 1, end, value
        complete = True

    with new_files([path]) as (partial,):
        named = partial.with_suffix(".bw")  # the library goes by the end of the name
        try:
            with _Panics(path):
                pybigtools.open(str(named), "w").write(lengths, intervals())
            if complete and not num_values:
                raise UserError(f"{path}: no base has a value, and a bigWig file cannot be empty; use bedgraph")
            # most errors, those of reading `bases` too, are lines on stderr for this library, and nothing else
            if not complete or _num_values(named) != num_values:
                raise _not_written(path)
            named.rename(partial)
        finally:
            named.unlink(missing_ok=True)


class _Panics:
    """Makes a UserError of a panic in Rust, whose class no module has."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is not None and kind.__module__ == "pyo3_runtime":
            raise _not_written(self._path) from error


def _not_written(path: Path) -> UserError:
    return UserError(f"{path} could not be written; is the disk full? Make room and start again")


def _num_values(path: Path) -> int | None:
    """Of a bigWig file; None: it is none."""
    import pybigtools

    try:
        return pybigtools.open(str(path)).info()["summary"]["basesCovered"]
    except pybigtools.BBIReadError:
        return None
