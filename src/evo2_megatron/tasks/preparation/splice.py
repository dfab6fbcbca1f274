# SPDX-License-Identifier: Apache-2.0
"""Transcripts from a genome and its annotation: exons joined 5' to 3', or stitched together with what surrounds them.

Bases keep their case. On the reverse strand they are complemented, IUPAC codes and lower case too.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from evo2_megatron.config import UserError
from evo2_megatron.data import gtf_halves
from evo2_megatron.data.genome import Genome
from evo2_megatron.data.gtf import Problem, Transcript, no_garbage_collection, read_gtf, text
from evo2_megatron.data.gtf_halves import OddPartError
from evo2_megatron.data.nucleotides import COMPLEMENT
from evo2_megatron.tasks.preparation.two_processes import Channel, Gone, PlacedWriter, second_process, worth_two
from evo2_megatron.tasks.transfer import check_no_input, disk_errors, new_files

JOIN = b"@"
"""Between the pieces of a stitched transcript; a control tag of the training data, never scored."""

_BUFFER_BYTES = 1 << 18
_LONGEST_SPAN = 1 << 23  # a transcript that spans more than this is read exon by exon
_FORMER_COMPLEMENT = bytes.maketrans(b"ACGT", b"TGCA")


@dataclass(frozen=True, kw_only=True, slots=True)
class StitchedSettings:
    """What a stitched transcript has besides its exons, in bases."""

    promoter: int = 1024
    """Upstream of the first exon, in the direction of transcription."""

    intron: int = 32
    """On every other side of an exon."""

    overlap: bool = False
    """Let the flanks of neighbouring exons overlap where the intron between them is short."""


class SpliceSummary(NamedTuple):
    """What was written and what was left out."""

    num_transcripts: int
    num_bases: int
    """Written; ``@`` is not counted."""

    left_out: dict[str, int]
    """Problems by kind."""

    seconds: float

    def __str__(self) -> str:
        left_out = ", ".join(f"{num} {kind}" for kind, num in self.left_out.items())
        return f"{self.num_transcripts} transcripts, {self.num_bases} bases in {self.seconds:.2f} s" + (
            f"; left out: {left_out}" if left_out else ""
        )


def splice(
    fasta_path: Path,
    gtf_path: Path,
    output_path: Path | None = None,
    *,
    stitched: StitchedSettings | None = None,
    only_longest: bool = False,
    former: bool = False,
    report: Callable[[Problem], None] = lambda problem: None,
) -> SpliceSummary:
    """Write one FASTA record ``>contig|gene|transcript``, on one line, for every transcript, in the order of the GTF.

    Args:
        fasta_path: Genome, plain or gzip.
        gtf_path: Annotation, plain or gzip.
        output_path: File to write, replaced if it exists; None: standard output.
        stitched: Add promoter and intron flanks and join the pieces with ``@``; None: exons only.
        only_longest: Of each gene only the transcript with the most exon bases; the first in the file of several.
        former: Reproduce the output of the former tool, errors included (docs/data.md lists them).
        report: Called with everything that is left out.

    Raises:
        UserError: An input cannot be used, nothing is left to write, or writing fails.
    """
    start, inputs = time.perf_counter(), (fasta_path, gtf_path)
    left_out: Counter[str] = Counter()

    def count(problem: Problem) -> None:
        left_out[problem.kind] += 1
        report(problem)

    with no_garbage_collection(), Genome(fasta_path) as genome:
        lengths = genome.lengths
        sequences = _Sequences(genome, lengths, stitched, former=former)
        is_file = output_path is not None and (output_path.is_file() or not output_path.exists())
        if is_file and stitched is None and not only_longest and worth_two(gtf_path):
            with contextlib.suppress(*Gone, OddPartError), disk_errors(), _output(output_path, inputs) as out:
                num, num_bases = _splice_halves(gtf_path, out.fileno(), sequences, count)
                return SpliceSummary(num, num_bases, dict(left_out), time.perf_counter() - start)
        transcripts = [t for t in read_gtf(gtf_path, count) if _fits(t, lengths, count)]
        if not transcripts:
            raise UserError(_nothing_left(gtf_path, fasta_path, lengths, left_out))
        if only_longest:
            transcripts = _longest(transcripts)
        with disk_errors(), _output(output_path, inputs) as out:
            num_bases = _write(out, transcripts, sequences)
    return SpliceSummary(len(transcripts), num_bases, dict(left_out), time.perf_counter() - start)


def _splice_halves(
    gtf_path: Path, out: int, sequences: _Sequences, report: Callable[[Problem], None]
) -> tuple[int, int]:
    """Write the transcripts of either half of the GTF file in a process of its own, to their places.

    Returns the numbers of transcripts and bases. Raises OddPartError, or what ``Gone`` lists, if one process has to do
    it all; nothing has been reported then.
    """
    middle = gtf_halves.middle(gtf_path)
    if middle is None:
        raise OddPartError("no gene begins near the middle")

    def write_second_half(channel: Channel) -> None:
        reader = gtf_halves.read_part(gtf_path, middle, None)
        channel.send(list(reader.transcripts))
        problems: list[Problem] = []
        transcripts = [t for t in reader.finished(problems.append) if _fits(t, sequences.lengths, problems.append)]
        num_bases = _write(PlacedWriter(out, channel.receive()), transcripts, sequences)
        channel.send((len(transcripts), num_bases, [tuple(problem) for problem in problems]))

    with second_process(write_second_half) as channel:
        reader = gtf_halves.read_part(gtf_path, 0, middle)
        if not reader.transcripts.keys().isdisjoint(channel.receive()):
            raise OddPartError("a transcript has lines in both halves")
        problems: list[Problem] = []
        transcripts = [t for t in reader.finished(problems.append) if _fits(t, sequences.lengths, problems.append)]
        channel.send(sum(map(_num_bytes, transcripts)))
        num_bases = _write(PlacedWriter(out, 0), transcripts, sequences)
        num_others, num_other_bases, other_problems = channel.receive()
    if not transcripts and not num_others:
        raise OddPartError("nothing to write")
    for problem in [*problems, *(Problem(*values) for values in other_problems)]:
        report(problem)
    return len(transcripts) + num_others, num_bases + num_other_bases


def _num_bytes(transcript: Transcript) -> int:
    """What ``_write`` writes for the exons of a transcript."""
    return (
        transcript.num_bases + len(transcript.contig) + len(transcript.gene_id) + len(transcript.id) + len(">||\n\n")
    )


def _fits(transcript: Transcript, lengths: dict[bytes, int], report: Callable[[Problem], None]) -> bool:
    length = lengths.get(transcript.contig)
    if length is None:
        report(transcript.problem("contig is not in the FASTA file"))
        return False
    if transcript.ends[-1] > length:
        report(transcript.problem("past the end of its contig"))
        return False
    return True


def _nothing_left(gtf_path: Path, fasta_path: Path, lengths: dict[bytes, int], left_out: Counter[str]) -> str:
    reasons = ", ".join(f"{num} {kind}" for kind, num in left_out.items())
    names = ", ".join(text(name) for name in list(lengths)[:3])
    return (
        f"no transcript of {gtf_path} can be written from {fasta_path} ({reasons}); its contigs are {names}"
        f"{', ...' if len(lengths) > 3 else ''}"
    )


def _longest(transcripts: list[Transcript]) -> list[Transcript]:
    longest: dict[bytes, tuple[int, Transcript]] = {}
    for transcript in transcripts:
        num_bases = transcript.num_bases
        if transcript.gene_id not in longest or num_bases > longest[transcript.gene_id][0]:
            longest[transcript.gene_id] = (num_bases, transcript)
    return [transcript for _, transcript in longest.values()]


class _Sequences:
    """Makes the sequence of a transcript."""

    def __init__(
        self, genome: Genome, lengths: dict[bytes, int], stitched: StitchedSettings | None, *, former: bool
    ) -> None:
        self._genome, self.lengths, self._stitched, self._former = genome, lengths, stitched, former
        self.joined = stitched is not None
        self._complement = _FORMER_COMPLEMENT if former else COMPLEMENT

    def __call__(self, transcript: Transcript) -> bytes:
        """Bases, 5' to 3'."""
        starts, ends, join, skip = transcript.starts, transcript.ends, b"", 0
        reverse = transcript.strand == b"-"
        if self._stitched is not None:
            length = self.lengths[transcript.contig]
            if self._former:
                starts, ends = former_flanks(starts, ends, length, self._stitched, reverse=reverse)
                join, skip = (JOIN, 0) if reverse else (b"", 1)
            else:
                starts, ends = flanks(starts, ends, length, self._stitched, reverse=reverse)
                join = JOIN
        low, high = (min(starts), max(ends)) if self._former else (starts[0], ends[-1])
        if high - low > _LONGEST_SPAN:
            pieces = [self._genome.bases(transcript.contig, start, end) for start, end in zip(starts, ends)]
        else:
            first, bases = self._genome.around(transcript.contig, low, high)
            pieces = [bases[start - first : end - first] for start, end in zip(starts, ends)]
        sequence = join.join(pieces)
        return sequence[::-1].translate(self._complement) if reverse else sequence[skip:]


def flanks(
    starts: list[int], ends: list[int], length: int, settings: StitchedSettings, *, reverse: bool
) -> tuple[list[int], list[int]]:
    """Exons with what surrounds them, cut at the ends of the contig.

    Args:
        starts: Of the exons, ascending, on the forward strand, 0-based.
        ends: Of the exons, excluded.
        length: Of the contig.
        settings: Sizes of the flanks.
        reverse: Whether the transcript is on the reverse strand, its promoter right of its last exon.
    """
    before, after = [settings.intron] * len(starts), [settings.intron] * len(ends)
    if not settings.overlap:
        for i in range(1, len(starts)):
            gap = starts[i] - ends[i - 1]
            after[i - 1], before[i] = min(settings.intron, (gap + 1) // 2), min(settings.intron, gap // 2)
    if reverse:
        after[-1] = settings.promoter
    else:
        before[0] = settings.promoter
    return (
        [max(start - num, 0) for start, num in zip(starts, before)],
        [min(end + num, length) for end, num in zip(ends, after)],
    )


def former_flanks(
    starts: list[int], ends: list[int], length: int, settings: StitchedSettings, *, reverse: bool
) -> tuple[list[int], list[int]]:
    """The same as the former tool had it: with ``reverse``, gaps are measured between the far edges of neighbours, and
    a piece that would begin before its contig is empty, unless it reaches over to the end."""
    exons = list(zip(starts, ends))[:: -1 if reverse else 1]  # by number
    new_starts, new_ends = [], []
    for i, (start, end) in enumerate(exons):
        before = after = settings.intron
        if not settings.overlap and i > 0:
            before = min(before, abs(start - exons[i - 1][1]) // 2)
        if not settings.overlap and i + 1 < len(exons):
            after = min(after, (abs(exons[i + 1][0] - end) + 1) // 2)
        if i == 0 and reverse:
            after = settings.promoter
        elif i == 0:
            before = settings.promoter
        start, end = start - before, min(end + after, length)
        if start < 0:
            start = min(max(start + length, 0), end)
        new_starts.append(start)
        new_ends.append(end)
    return (new_starts[::-1], new_ends[::-1]) if reverse else (new_starts, new_ends)


def _write(out: BinaryIO | PlacedWriter, transcripts: list[Transcript], sequences: _Sequences) -> int:
    num_bases = num_waiting = 0
    parts: list[bytes] = []
    for transcript in transcripts:
        sequence = sequences(transcript)
        num_bases += len(sequence) - sequence.count(JOIN) if sequences.joined else len(sequence)
        num_waiting += len(sequence)
        parts += (b">", transcript.contig, b"|", transcript.gene_id, b"|", transcript.id, b"\n", sequence, b"\n")
        if num_waiting > _BUFFER_BYTES:  # joined once and longer than the stream's buffer: copied no further
            out.write(b"".join(parts))
            parts.clear()
            num_waiting = 0
    out.write(b"".join(parts))
    return num_bases


@contextlib.contextmanager
def _output(path: Path | None, inputs: tuple[Path, Path]) -> Iterator[BinaryIO]:
    """Where to write: a file that appears when it is complete, a pipe or device as it is, or standard output."""
    if path is None:
        # not sys.stdout.buffer: with PYTHONUNBUFFERED it writes to a pipe only what the pipe has room for
        with open(sys.stdout.fileno(), "wb", buffering=_BUFFER_BYTES, closefd=False) as out:
            yield out
        return
    check_no_input([path], inputs)
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb", buffering=_BUFFER_BYTES) as out:
            yield out
        return
    with new_files([path]) as (partial,), partial.open("wb", buffering=_BUFFER_BYTES) as out:
        yield out
