# SPDX-License-Identifier: Apache-2.0
"""Read FASTA, plain, gzip or bgzip, in one pass whose time is linear in bytes and whose memory is one block.

A record's name is the first word of its header. White space around a sequence line (Windows line ends too) and blank
lines do not count; inside a line every character does. Case is kept.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import mmap
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from evo2_megatron.config import UserError

# two blocks fit in a core's cache; and from 128 KiB on the C library maps and unmaps memory for each, which measured
# five times as many page faults
BLOCK_BYTES = 3 << 15
_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NEWLINE = 10
_END = (None, b"")


class FastaRecord(NamedTuple):
    """One sequence with its name."""

    id: str
    """First word of the header."""

    description: str
    """Whole header line, without ``>``."""

    sequence: bytes
    """Bases without line breaks, case kept."""


@dataclass(slots=True)
class ReadState:
    """How far a file has been read, for whoever watches."""

    position: int = 0
    """Bytes of the file, compressed ones if it is."""

    num_carriage_returns: int = 0
    """Lines that ended as on Windows."""


def read_fasta(
    path: str | os.PathLike[str], *, unique_ids: bool = False, content: bytes | None = None
) -> Iterator[FastaRecord]:
    """Yield the records in the order of the file; memory is that of the longest record.

    ``content``: what is in the file, if it has been read already, as a pipe can be only once.

    Raises:
        UserError: No such file; not FASTA; a header without a name; or, with ``unique_ids``, a name that occurs twice.
    """
    seen: set[str] = set()
    pieces = read_pieces(path, content=content)
    header, sequence = next(pieces)
    parts: list[bytes] = []
    while header is not None:
        next_header, bases = next(pieces, _END)
        if next_header is None and bases:
            parts = parts or [sequence]
            parts.append(bases)
            continue
        if parts:
            sequence = b"".join(parts)
            parts.clear()
        description = decode_header(header)
        name = description.split(None, 1)[0]
        if unique_ids:
            if name in seen:
                raise same_name(path, name)
            seen.add(name)
        yield FastaRecord(name, description, sequence)
        header, sequence = next_header, bases


def decode_header(header: bytes) -> str:
    """Header as text; bytes that are not UTF-8 become ``\\xNN``, so that different headers stay different."""
    return header.decode("utf-8", "backslashreplace")


def record_id(header: bytes) -> str:
    """First word of a header."""
    return decode_header(header).split(None, 1)[0]


def read_pieces(
    path: str | os.PathLike[str], *, threads: int = 1, state: ReadState | None = None, content: bytes | None = None
) -> Iterator[tuple[bytes | None, bytes]]:
    """Yield ``(header, bases)`` for the start of a record and ``(None, bases)`` for what follows of a long one.

    Pieces are about ``BLOCK_BYTES`` long at most, so memory does not depend on the length of a record. The bases of a
    record's first piece are empty only if the whole record is.

    Args:
        path: The file.
        threads: How many decompress at a time, if it is bgzip.
        state: Kept up to date while reading.
        content: As for ``read_fasta``.

    Raises:
        UserError: As ``read_fasta``.
    """
    with open_fasta(path, threads=threads, state=state, content=content) as stream:
        data, at_line_start, ended = first_block(path, stream), True, False
        while not ended:
            block = stream.read(BLOCK_BYTES)
            ended = not block
            messy = b"\r" in data or b"\t" in data
            if at_line_start and not messy:
                records, data = _split_tidy(data)
                yield from records
                if records and not ended:  # the record that is left may go on in the next block
                    data += block
                    continue
            header, body_at = None, 0
            header_at = find_header(data, 0, at_line_start)
            while header_at >= 0:
                bases = _join_lines(data[body_at:header_at], at_line_start, messy)
                if header is not None or bases:
                    yield header, bases
                line_end = data.find(b"\n", header_at)
                body_at = line_end + 1 if line_end >= 0 else len(data)
                at_line_start = True
                if line_end < 0 and not ended:  # the rest of this header is in the next block
                    break
                last_header_at = header_at
                header = data[header_at + 1 : body_at].strip()
                if messy or not header:
                    check_header(path, header)
                header_at = find_header(data, body_at, True)
            if header_at >= 0:
                data = data[header_at:] + block
                continue

            rest = data[body_at:]
            body = rest.rstrip()  # a line's trailing space can only be told from inner space by what follows
            bases = _join_lines(body, at_line_start, messy)
            if header is not None and not bases and not ended:  # a record's first piece must not be empty by accident
                data = data[last_header_at:] + block
                continue
            if header is not None or bases:
                yield header, bases
            at_line_start = at_line_start and not body
            data = rest[len(body) :] + block


def _join_lines(lines: bytes, at_line_start: bool, messy: bool) -> bytes:
    """``strip_lines`` for who knows whether there are tabs or carriage returns."""
    bases = lines.replace(b"\n", b"")
    return strip_lines(lines, at_line_start) if messy or b" " in bases else bases


def _split_tidy(data: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Header and bases of the whole records with which a block begins, and the rest, from the last record on or from
    one with a space within.

    The block begins a line and has neither tabs nor carriage returns. One byte is searched and bases are copied once:
    ``bytes.split`` looks at each byte by itself, and a longer separator takes longer still.
    """
    records: list[tuple[bytes, bytes]] = []
    header_at = 0 if data.startswith(b">") else -1
    while header_at >= 0 and (line_end := data.find(b"\n", header_at)) >= 0:
        next_at = data.find(b">", line_end)
        while next_at >= 0 and data[next_at - 1] != _NEWLINE:
            next_at = data.find(b">", next_at + 1)
        header = data[header_at + 1 : line_end].strip()
        bases = data[line_end + 1 : next_at - 1].replace(b"\n", b"")
        if next_at < 0 or not header or b" " in bases:
            break
        records.append((header, bases))
        header_at = next_at
    return records, data[header_at:] if records else data


@contextlib.contextmanager
def open_fasta(
    path: str | os.PathLike[str],
    *,
    threads: int = 1,
    state: ReadState | None = None,
    kind: str = "FASTA",
    content: bytes | None = None,
) -> Iterator[BinaryIO | _WatchedStream]:
    """Open a file for reading bytes, decompressing gzip (recognised by its first bytes, not by its name).

    ``kind``: of file, for errors. ``content``: as for ``read_fasta``.
    """
    try:
        # closed below
        raw = Path(path).open("rb") if content is None else io.BufferedReader(io.BytesIO(content))  # noqa: SIM115
    except FileNotFoundError:
        raise UserError(f"no such {kind} file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {kind} file {path}: {error.strerror}") from None
    with raw:
        try:
            with _decompressed(raw, threads) as stream:
                yield stream if state is None else _WatchedStream(stream, raw, state)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is damaged or cut off: {error}; decompress it with gunzip to check") from None


def _decompressed(raw: io.BufferedReader, threads: int) -> BinaryIO:
    start = raw.peek(2)
    if not start.startswith(_GZIP_MAGIC):
        return raw
    from evo2_megatron.data import bgzf  # threads cost memory that plain files do without

    return bgzf.BgzfReader(raw, threads=threads) if bgzf.is_bgzf(start) else gzip.open(raw)


class _WatchedStream:
    """Reads from ``stream`` and says how far that has come in ``raw``."""

    def __init__(self, stream: BinaryIO, raw: BinaryIO, state: ReadState) -> None:
        self._stream, self._raw, self._state = stream, raw, state

    def read(self, num_bytes: int) -> bytes:
        block = self._stream.read(num_bytes)
        self._state.position = self._raw.tell()
        if b"\r" in block:
            self._state.num_carriage_returns += block.count(b"\r")
        return block


def first_block(path, stream: BinaryIO) -> bytes:
    """The first block from the first header on."""
    data = stream.read(BLOCK_BYTES).removeprefix(_BYTE_ORDER_MARK).lstrip()
    while not data:
        block = stream.read(BLOCK_BYTES)
        if not block:
            raise UserError(f"{path} holds no FASTA records; a record starts with a line '>name'")
        data = block.lstrip()
    if not data.startswith(b">"):
        start = data[:20].split(b"\n")[0].decode("utf-8", "backslashreplace").strip()
        raise UserError(f"{path} is not FASTA: it starts with {start!r}, not with a line '>name'")
    return data


def find_header(data: bytes | mmap.mmap, start: int, at_line_start: bool) -> int:
    """Position of the next ``>`` that begins a line, or -1. ``at_line_start`` speaks of ``start``."""
    # one byte searched and its neighbour checked is several times faster than a search for two
    at = data.find(b">", start)
    while at >= 0 and not (at_line_start if at == start else data[at - 1] == _NEWLINE):
        at = data.find(b">", at + 1)
    return at


def strip_lines(lines: bytes, at_line_start: bool) -> bytes:
    """Join lines, without the white space around each; what a block before has begun keeps its leading space."""
    if b"\r" in lines:  # looking for one byte is many times faster than looking for two
        lines = lines.replace(b"\r\n", b"\n")
    bases = lines.replace(b"\n", b"")
    if not (b"\r" in bases or b" " in bases or b"\t" in bases):
        return bases
    first, *others = lines.split(b"\n")
    return b"".join([first.strip() if at_line_start else first.rstrip(), *(line.strip() for line in others)])


def check_header(path, header: bytes) -> None:
    """Raise UserError unless a header line, without its ``>``, is one."""
    if not header:
        raise UserError(f"{path}: a record has no name; write one after each '>'")
    if b"\r" in header:
        raise UserError(f"{path}: line ends are lone carriage returns; convert the file, for example with mac2unix")


def same_name(path: str | os.PathLike[str], name: str) -> UserError:
    """What to raise where a name occurs twice."""
    return UserError(f"{path}: two records are named '{name}'; give each its own first word after '>'")


class FastaIndex:
    """Records by number, in the order of the file, with unique names.

    A plain file is read again for every record; of a gzip file, which cannot be entered in the middle, the bases are
    kept in memory (one byte each). Can be copied to other processes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Find every record in one pass.

        Raises:
            UserError: As ``read_fasta`` with ``unique_ids``; or a pipe.
        """
        self.path = os.fspath(path)
        if Path(path).is_fifo():
            raise UserError(f"{path} is a pipe, which can be read only once; write it to a file and give that")
        self.ids: list[str] = []
        self._spans: list[tuple[int, int]] = []
        self._sequences: list[bytes] = []
        with open_fasta(path) as stream:
            plain = isinstance(stream, io.BufferedReader)  # what a decompressor reads from
            first_block(path, stream)
        if not plain:
            for record in read_fasta(path, unique_ids=True):
                self.ids.append(record.id)
                self._sequences.append(record.sequence)
        else:
            self._find_records()

    def _find_records(self) -> None:
        seen: set[str] = set()
        with Path(self.path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            next_at = data.find(b">")  # only white space may come before it: the first block has been checked
            while next_at >= 0:
                line_end = data.find(b"\n", next_at)
                body_at = line_end + 1 if line_end >= 0 else len(data)
                header = data[next_at + 1 : body_at].strip()
                check_header(self.path, header)
                name = record_id(header)
                if name in seen:
                    raise same_name(self.path, name)
                seen.add(name)
                next_at = find_header(data, body_at, True)
                self.ids.append(name)
                self._spans.append((body_at, next_at if next_at >= 0 else len(data)))

    def __len__(self) -> int:
        return len(self.ids)

    def sequence(self, index: int) -> bytes:
        """Bases of one record, without line breaks, case kept."""
        if self._sequences:
            return self._sequences[index]
        start, end = self._spans[index]
        with Path(self.path).open("rb") as file:
            file.seek(start)
            return strip_lines(file.read(end - start), True)
