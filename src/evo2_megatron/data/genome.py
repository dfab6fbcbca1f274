# SPDX-License-Identifier: Apache-2.0
"""Bases of a genome by contig and position, from FASTA, with a few blocks of memory whatever its size.

One pass notes how many bases each block of the file holds, so lines may be of any length; nothing is written beside
the file. A gzip file or a pipe, which cannot be entered in the middle, is copied to a temporary file first. What
counts as a base is what ``read_fasta`` says.
"""

from __future__ import annotations

import contextlib
import io
import os
from bisect import bisect_right
from pathlib import Path
from typing import BinaryIO

from evo2_megatron.data import fasta

BLOCK_BYTES = 1 << 17
"""Read at once; a whole block is read for the smallest request."""

_COPY_BYTES = 1 << 20


class _Contig:
    """Where a contig's bases are."""

    def __init__(self) -> None:
        self.length = 0
        self.starts: list[int] = []
        """First base of each block, 0-based."""

        self.blocks: list[tuple[int, int, bool]] = []
        """Offset in the file, bytes, and whether the block begins a line."""

    def append(self, offset: int, lines: bytes, at_line_start: bool) -> None:
        """Add what follows."""
        self.starts.append(self.length)
        self.blocks.append((offset, len(lines), at_line_start))
        self.length += len(fasta.strip_lines(lines, at_line_start))  # counting line breaks would take longer


class Genome:
    """An open FASTA file; close it, or use it in a ``with`` statement."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Find the contigs in one pass.

        Raises:
            UserError: No such file; damaged; not FASTA; or two contigs of the same name.
        """
        self.path = Path(path)
        self._contigs: dict[bytes, _Contig] = {}
        self._cached: tuple[bytes, int, bytes] = (b"", 0, b"")
        self._cached_blocks: dict[tuple[int, int, bool], bytes] = {}
        with fasta.open_fasta(path) as stream:
            if isinstance(stream, io.BufferedReader) and Path(path).is_file():  # not a pipe
                self._file: BinaryIO = Path(path).open("rb", buffering=0)  # noqa: SIM115 (see __exit__)
            else:
                self._file = _copied(stream)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._file.close)
            self._find_contigs(path)
            on_error.pop_all()

    def __enter__(self) -> Genome:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def lengths(self) -> dict[bytes, int]:
        """Bases of each contig, in the order of the file; a contig's name is the first word of its header."""
        return {name: contig.length for name, contig in self._contigs.items()}

    def bases(self, contig: bytes, start: int, end: int) -> bytes:
        """Bases from ``start`` to ``end``, 0-based, end excluded, within the contig; case is kept."""
        first, bases = self.around(contig, start, end)
        return bases[start - first : end - first]

    def around(self, contig: bytes, start: int, end: int) -> tuple[int, bytes]:
        """Bases of the blocks that hold ``start`` to ``end``, and the position of the first of them.

        The blocks are kept until others are asked for, so that it costs little to go on nearby.
        """
        name, first, bases = self._cached
        if name == contig and first <= start and end <= first + len(bases):
            return first, bases
        where = self._contigs[contig]
        low = max(bisect_right(where.starts, start) - 1, 0)
        high = max(bisect_right(where.starts, end - 1), low + 1)
        former = self._cached_blocks  # what goes on from one block to the next needs the first again
        self._cached_blocks = {
            block: former[block] if block in former else self._read(*block) for block in where.blocks[low:high]
        }
        bases = b"".join(self._cached_blocks.values())
        self._cached = (contig, where.starts[low], bases)
        return where.starts[low], bases

    def _read(self, offset: int, num_bytes: int, at_line_start: bool) -> bytes:
        # a position in the file would be shared with a process forked from this one
        return fasta.strip_lines(os.pread(self._file.fileno(), num_bytes, offset), at_line_start)

    def _find_contigs(self, path: str | os.PathLike[str]) -> None:
        fasta.first_block(path, self._file)
        offset, at_line_start, contig = 0, True, _Contig()
        self._file.seek(0)
        while data := _block(self._file, at_line_start):
            at = 0
            header_at = data.find(b">") if not offset else fasta.find_header(data, 0, at_line_start)
            while header_at >= 0:
                if header_at > at:
                    contig.append(offset + at, data[at:header_at], at_line_start)
                at = data.find(b"\n", header_at) + 1 or len(data)
                header = data[header_at + 1 : at].strip()
                fasta.check_header(path, header)
                name = header.split(None, 1)[0]
                if name in self._contigs:
                    raise fasta.same_name(path, fasta.decode_header(name))
                contig = self._contigs[name] = _Contig()
                at_line_start = True
                header_at = fasta.find_header(data, at, True)
            if at < len(data):
                contig.append(offset + at, data[at:] if at else data, at_line_start)
            at_line_start = data.endswith(b"\n")
            offset += len(data)


def _copied(stream: BinaryIO) -> BinaryIO:
    import tempfile  # loads as much as everything else here

    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (the caller's)
    while data := stream.read(_COPY_BYTES):
        file.write(data)
    file.seek(0)
    return file


def _block(file: BinaryIO, at_line_start: bool) -> bytes:
    """The next block: it ends neither within a header nor in white space, which only what follows could explain."""
    data = file.read(BLOCK_BYTES)
    while data and not data.endswith(b"\n"):
        last_line = data.rfind(b"\n") + 1
        in_header = data.startswith(b">", last_line) and (last_line or at_line_start)
        if not in_header and not data[-1:].isspace():
            break
        more = file.read(BLOCK_BYTES if in_header else 1)
        if not more:
            break
        data += more
    return data
