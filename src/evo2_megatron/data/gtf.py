# SPDX-License-Identifier: Apache-2.0
"""Read the exons of transcripts from GTF, plain or gzip, as GENCODE, Ensembl, NCBI and most programs write it.

Only ``transcript`` and ``exon`` lines are read, and of their attributes ``gene_id``, ``transcript_id`` and
``exon_number``, quoted or not. A transcript without a ``transcript`` line is made of its exons; exons without numbers
go by their positions. A line that cannot be read, and a transcript whose exons do not make sense, is reported and left
out, and so is the transcript that such a line belongs to.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import le
from pathlib import Path
from typing import BinaryIO, NamedTuple

from evo2_megatron.config import UserError
from evo2_megatron.data.fasta import open_fasta

_BLOCK_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 20
_MAX_DIGITS = 18
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# what the three consortia write; anything else takes the slower way through _ATTRIBUTE
_IDS = re.compile(rb'gene_id "([^"]+)"; (?:[^";]+"[^"]*"; )*?transcript_id "([^"]+)";')
_EXON_NUMBER = b" exon_number "
# a key, and everything up to the next semicolon that is not in quotes
_ATTRIBUTE = re.compile(rb'[\s;]*([^\s";]+)([^";]*(?:"[^"]*"[^";]*)*)(?:;|\Z)')
_END = re.compile(rb"[\s;]*\Z")
_VALUE = re.compile(rb'\s*"([^"]*)"|\s*(.*?)\s*\Z', re.DOTALL)
# in a line that is broken, to know which transcript it would have belonged to
_LOOSE_IDS = re.compile(rb'\bgene_id "?([^";]+)"?;.*?\btranscript_id "?([^";]+)"?;')

_KEYS = (b"gene_id", b"transcript_id", b"exon_number")
_STRANDS = (b"+", b"-", b".")
_BROKEN_EXON = "an exon's line is broken"
_WRONG_INTERVAL = "start and end are not whole numbers with 1 <= start <= end"

# what follows the attributes up to a transcript's n-th exon number; after the last one comes what no line has
_NUM_SUFFIXES = 1000
_SUFFIXES = {
    before: [*(b"%d%b" % (n, after) for n in range(_NUM_SUFFIXES - 1)), b"\n"]
    for before, after in ((b'"', b'"'), (b" ", b";"))
}


class Problem(NamedTuple):
    """Something that was left out."""

    kind: str
    """For counting."""

    line: int
    """Of the GTF file, from 1."""

    text: str


@dataclass(slots=True)
class Transcript:
    """Exons in ascending order on the forward strand, 0-based, end excluded. Names are as the file has them."""

    gene_id: bytes
    id: bytes
    contig: bytes
    strand: bytes
    """``+``, ``-``, or ``.``, which is read as forward."""

    line: int
    """Of the file, where it is first named."""

    starts: list[int]
    ends: list[int]
    extent: tuple[int, int] | None = None
    """Start and end in the transcript's own line, if it has one."""

    numbers: list[int | None] | None = None
    """Exon numbers in the order of the file; None while they are 1, 2, 3 and so on."""

    fault: Problem | None = None

    @property
    def num_bases(self) -> int:
        """Of all exons."""
        return sum(self.ends) - sum(self.starts)

    def blame(self, kind: str, line: int) -> None:
        """Leave this transcript out; the first reason is the one that is told."""
        if self.fault is None:
            self.fault = self.problem(kind, line=line)

    def problem(self, kind: str, *, line: int | None = None) -> Problem:
        """What to report if this transcript is left out; ``line`` is what is to blame, if not its first line."""
        where = f" (line {line})" if line else ""
        return Problem(kind, self.line, f"transcript '{text(self.id)}' of gene '{text(self.gene_id)}': {kind}{where}")


class _BrokenLineError(Exception):
    """A line that cannot be read, with the reason."""

    def __init__(self, reason: str, values: dict[bytes, bytes]) -> None:
        """``values``: attributes that could be read."""
        super().__init__(reason)
        key = (values.get(b"gene_id"), values.get(b"transcript_id"))
        self.key = key if all(key) else None


class _ExonAttributes(NamedTuple):
    gene_id: bytes
    transcript_id: bytes
    number: int | None
    prefix: bytes | None
    """What comes before the number, its quote included."""


_Run = tuple[Transcript, bytes, list[bytes], int]
"""A transcript that the next line may continue, its attributes up to the exon number, and the next number."""

_NO_RUN: _Run = (Transcript(b"", b"", b"", b"", 0, [], []), b"", [b"\n"], 0)


def text(name: bytes) -> str:
    """A name from a GTF file, to be shown."""
    return name.decode("utf-8", "backslashreplace")


def read_gtf(path: str | os.PathLike[str], report: Callable[[Problem], None]) -> list[Transcript]:
    """Transcripts in the order in which the file first names them.

    Args:
        path: GTF, plain or gzip.
        report: Called with everything that is left out.

    Raises:
        UserError: No such file; damaged; or not GTF.
    """
    if not Path(path).exists() or Path(path).is_dir():
        raise UserError(f"no such GTF file: {path}")
    reader = Reader(path, report)
    with open_fasta(path) as stream, no_garbage_collection():
        for lines in blocks(path, stream):
            reader.read(lines)
        if not reader.transcripts:
            raise UserError(
                f"{path} has no exon or transcript that can be read in its {reader.num_lines} lines; GTF has 9 "
                'columns between tabs, the last with gene_id "..."; transcript_id "...";'
            )
        return list(reader.finished(report))


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Millions of objects are made that do not refer to each other: looking for cycles took a quarter of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def blocks(path: str | os.PathLike[str], stream: BinaryIO) -> Iterator[list[bytes]]:
    """Lines with their ends, some hundred at a time."""
    rest = stream.read(_BLOCK_BYTES).removeprefix(_BYTE_ORDER_MARK)
    if rest.startswith(b"##gff-version"):
        raise UserError(f"{path} is GFF3, not GTF; convert it, for example with gffread -T -o genes.gtf {path}")
    while block := stream.read(_BLOCK_BYTES):
        lines = io.BytesIO(rest + block).readlines()  # twice as fast as bytes.split
        rest = b"" if lines[-1].endswith(b"\n") else lines.pop()
        if len(rest) > _MAX_LINE_BYTES:
            raise UserError(f"{path} is not GTF: it has a line of more than {_MAX_LINE_BYTES} bytes")
        yield lines
    if rest:
        yield io.BytesIO(rest).readlines()


class Reader:
    """Puts lines together to transcripts."""

    def __init__(self, path: str | os.PathLike[str], report: Callable[[Problem], None]) -> None:
        self._path, self._report = path, report
        self.transcripts: dict[tuple[bytes, bytes], Transcript] = {}
        self.num_lines = 0
        self._latest: Transcript | None = None
        self._latest_ids = b"\n"

    def read(self, lines: list[bytes]) -> None:
        """Add what the next lines say."""
        number = self.num_lines
        transcript, prefix, suffixes, next_number = _NO_RUN
        starts, ends, own_contig, own_strand = transcript.starts, transcript.ends, b"", b""
        expected = b"\n"
        for line in lines:
            number += 1
            fields = line.split(b"\t", 8)
            if len(fields) < 9:
                self._skip(number, line)
                continue
            contig, _, feature, start, end, _, strand, _, attributes = fields
            if feature == b"exon":
                if start.isdigit() and end.isdigit() and len(start) < _MAX_DIGITS and len(end) < _MAX_DIGITS:
                    first, last = int(start) - 1, int(end)
                else:
                    first = last = 0
                # most exons continue the transcript of the line before: one comparison replaces the parser
                if (
                    attributes.startswith(expected)
                    and contig == own_contig
                    and strand == own_strand
                    and 0 <= first < last
                ):
                    starts.append(first)
                    ends.append(last)
                    next_number += 1
                else:
                    run = self._add_exon(number, contig, strand, first, last, attributes)
                    transcript, prefix, suffixes, next_number = run
                    starts, ends = transcript.starts, transcript.ends
                    own_contig, own_strand = transcript.contig, transcript.strand
                expected = prefix + suffixes[next_number]
            elif feature == b"transcript" and not contig.startswith(b"#"):
                self._add_transcript(number, contig, strand, _interval(start, end), attributes)
        self.num_lines = number

    def _add_transcript(
        self, number: int, contig: bytes, strand: bytes, extent: tuple[int, int] | None, attributes: bytes
    ) -> None:
        """Read a transcript's own line."""
        found = _IDS.match(attributes)
        try:
            key = found.groups() if found else _parse(attributes)[:2]
        except _BrokenLineError as error:
            self._broken(number, f"transcript with {error}")
            return
        transcript = self._get(key, contig, strand, number)
        if transcript.extent is not None:
            transcript.blame("described twice", number)
        transcript.extent = extent
        if extent is None:
            self._broken(number, _WRONG_INTERVAL)
            transcript.blame("its own line is broken", number)
        self._latest, self._latest_ids = transcript, found[0] if found else b"\n"

    def _add_exon(self, number: int, contig: bytes, strand: bytes, start: int, end: int, attributes: bytes) -> _Run:
        """Read an exon that the line before does not foretell; return what it foretells."""
        if contig.startswith(b"#"):  # a comment
            return _NO_RUN
        if not attributes.startswith(self._latest_ids) and (found := _IDS.match(attributes)):
            self._latest, self._latest_ids = self._get(found.groups(), contig, strand, number), found[0]
        exon_number = prefix = None
        if attributes.startswith(self._latest_ids):
            transcript = self._latest
            exon_number, prefix = _usual_exon_number(attributes, len(self._latest_ids))
        if prefix is None:
            try:
                gene_id, transcript_id, exon_number, prefix = _parse(attributes)
            except _BrokenLineError as error:
                self._broken(number, f"exon with {error}")
                if error.key is not None:
                    self._get(error.key, contig, strand, number).blame(_BROKEN_EXON, number)
                return _NO_RUN
            transcript = self._get((gene_id, transcript_id), contig, strand, number)
        if contig != transcript.contig or strand != transcript.strand:
            transcript.blame("on several contigs or strands", number)
        if not 0 <= start < end:
            self._broken(number, _WRONG_INTERVAL)
            transcript.blame(_BROKEN_EXON, number)
        transcript.starts.append(start)
        transcript.ends.append(end)
        count = len(transcript.starts)
        if transcript.numbers is None and exon_number == count and transcript.fault is None:
            if prefix is not None and count + 1 < _NUM_SUFFIXES:
                return transcript, prefix, _SUFFIXES[prefix[-1:]], count + 1
        else:
            if transcript.numbers is None:
                transcript.numbers = list(range(1, count))
            transcript.numbers.append(exon_number)
        return _NO_RUN

    def _get(self, key: tuple[bytes, bytes], contig: bytes, strand: bytes, number: int) -> Transcript:
        transcript = self.transcripts.get(key)
        if transcript is None:
            transcript = self.transcripts[key] = Transcript(*key, contig, strand, number, [], [])
        return transcript

    def _broken(self, number: int, reason: str) -> None:
        self._report(Problem("broken line", number, reason))

    def _skip(self, number: int, line: bytes) -> None:
        """Look at a line without nine columns."""
        if line.startswith(b"#") or not line.strip():
            return
        num_columns = line.count(b"\t") + 1
        self._broken(number, f"{num_columns} column{'s'[: num_columns > 1]} between tabs instead of 9")
        found = _LOOSE_IDS.search(line)
        if found and b"exon" in line.split(None, 5)[:5]:
            self._get(found.groups(), b"", b"", number).blame(_BROKEN_EXON, number)

    def finished(self, report: Callable[[Problem], None]) -> Iterator[Transcript]:
        """Transcripts whose exons make sense; the others are reported."""
        for transcript in self.transcripts.values():
            kind = None if transcript.fault else _arrange(transcript)
            fault = transcript.fault or (kind and transcript.problem(kind))
            if fault:
                report(fault)
            else:
                yield transcript


def _interval(start: bytes, end: bytes) -> tuple[int, int] | None:
    """0-based, end excluded; None unless ``1 <= start <= end``."""
    if start.isdigit() and end.isdigit() and len(start) < _MAX_DIGITS and len(end) < _MAX_DIGITS:
        first, last = int(start) - 1, int(end)
        if 0 <= first < last:
            return first, last
    return None


def _usual_exon_number(attributes: bytes, start: int) -> tuple[int | None, bytes | None]:
    """Exon number, and what comes before it, if it is written as the three consortia do; else None twice.

    Args:
        attributes: Of an exon.
        start: Position after its identifiers.
    """
    at = attributes.find(_EXON_NUMBER, start)
    if at > 0 and attributes[at - 1 : at] == b";" and not attributes.count(b'"', start, at) % 2:
        at += len(_EXON_NUMBER)
        if attributes.startswith(b'"', at):
            at += 1
            end = attributes.find(b'"', at)
        else:
            end = attributes.find(b";", at)
        value = attributes[at:end]
        if end > at and value.isdigit() and end - at < _MAX_DIGITS:
            return int(value), attributes[:at]
    return None, None


def _parse(attributes: bytes) -> _ExonAttributes:
    """Read attributes one by one; of a key that occurs twice the first counts.

    Raises:
        _BrokenLineError: A quote is not closed, an identifier is missing, or the exon number is not a number.
    """
    values: dict[bytes, bytes] = {}
    at, prefix = 0, None
    while len(values) < len(_KEYS) and not _END.match(attributes, at):
        found = _ATTRIBUTE.match(attributes, at)
        if not found:
            raise _BrokenLineError("a quote that is not closed", values)
        key = found[1]
        if key in _KEYS and key not in values:
            value = _VALUE.match(found[2])
            group = 1 if value[1] is not None else 2
            values[key] = value[group]
            if key == b"exon_number" and len(values) == len(_KEYS):  # else it would not say whose exon comes next
                prefix = attributes[: found.start(2) + value.start(group)]
        at = found.end()
    for key in _KEYS[:2]:
        if not values.get(key):
            raise _BrokenLineError(f"no {key.decode()}", values)
    number = values.get(b"exon_number")
    if number is not None and not (number.isdigit() and len(number) < _MAX_DIGITS):
        raise _BrokenLineError(f"exon_number '{text(number)}', which is not a number", values)
    if prefix is not None and prefix[-1:] not in _SUFFIXES:
        prefix = None
    return _ExonAttributes(values[b"gene_id"], values[b"transcript_id"], number and int(number), prefix)


def _arrange(transcript: Transcript) -> str | None:
    """Bring the exons into ascending order; return what is wrong with them, if anything is."""
    if not transcript.starts:
        return "no exons"
    if transcript.strand not in _STRANDS:
        return "strand is not + or -"
    starts, ends, numbers = transcript.starts, transcript.ends, transcript.numbers
    if numbers is not None:
        exons = sorted(zip(starts, ends))
        if None not in numbers:
            if sorted(numbers) != list(range(1, len(numbers) + 1)):
                return "exon numbers are not 1, 2, 3 and so on"
            exons = [(start, end) for _, start, end in sorted(zip(numbers, starts, ends))]
        starts[:], ends[:] = zip(*exons)
    if starts[0] > starts[-1] and transcript.strand == b"-":  # listed from 5' to 3', as usual
        starts.reverse()
        ends.reverse()
    if not all(map(le, ends, starts[1:])):
        return "exons overlap" if starts == sorted(starts) else "exon numbers contradict the positions"
    if transcript.extent not in (None, (starts[0], ends[-1])):
        return "exons end elsewhere than its own line says"
    return None
