# SPDX-License-Identifier: Apache-2.0
"""Read a part of a GTF file, for two processes that share one. ``gtf.read_gtf`` is the reference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NoReturn

from evo2_megatron.data.gtf import Problem, Reader, blocks

_SEARCH_BYTES = 1 << 20
_COUNT_BYTES = 1 << 16


class OddPartError(Exception):
    """A line is broken: what it touches can only be told by who reads the whole file."""


def middle(path: str | os.PathLike[str]) -> int | None:
    """Where a gene begins, or else a transcript, about half-way through a plain file; None if there is none."""
    with Path(path).open("rb") as file:
        start = file.seek(file.seek(0, os.SEEK_END) // 2)
        data = file.read(_SEARCH_BYTES)
    for feature in (b"\tgene\t", b"\ttranscript\t"):
        line = data.rfind(b"\n", 0, max(data.find(feature), 0)) + 1
        if line:
            return start + line
    return None


def read_part(path: str | os.PathLike[str], start: int, end: int | None) -> Reader:
    """Read the lines between two places of a plain file, both where a line begins; ``end`` None: to the end.

    Raises:
        OddPartError: A line is broken.
        UserError: Not GTF.
    """
    reader = Reader(path, _refuse)
    with Path(path).open("rb") as file:
        before = _Part(file, start)
        while block := before.read(_COUNT_BYTES):
            reader.num_lines += block.count(b"\n")
        for lines in blocks(path, _Part(file, end - start) if end is not None else file):
            reader.read(lines)
    return reader


def _refuse(problem: Problem) -> NoReturn:
    raise OddPartError(problem.text)


class _Part:
    """The next so many bytes of a file."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file, self._left = file, num_bytes

    def read(self, num_bytes: int) -> bytes:
        data = self._file.read(min(num_bytes, self._left))
        self._left -= len(data)
        return data
