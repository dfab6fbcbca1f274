# SPDX-License-Identifier: Apache-2.0
"""A table of contigs with labels of each base, for evo2_train_head --per-base, from an annotation or from tracks.

Classes of a GTF file (exon, intron, other) or of a BED file (its names, other), or the values of bigWig files. N has
no label. Make one table for each part of the data, of its own contigs.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import harness
import numpy as np
import pyarrow
from annotation import read_transcripts
from pyarrow import parquet

from evo2_megatron.cli import command
from evo2_megatron.config import UserError
from evo2_megatron.data.bed import Interval, check_within, read_bed
from evo2_megatron.data.gtf import text
from evo2_megatron.data.labels import is_known
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.tasks.transfer import disk_errors, new_files

NAME = "label_bases.py"
OTHER = "other"
"""Class of what lies in no interval."""

EXON, INTRON = "exon", "intron"


class Row(NamedTuple):
    """A contig, or its reverse complement."""

    id: str
    sequence: bytes
    labels: dict[str, pyarrow.Array]
    """A column's values, one for each base."""


def transcript_intervals(path: Path) -> list[Interval]:
    """Transcripts of a GTF file as introns, and behind them their exons, which so have the last word."""
    introns, exons = [], []
    for t in read_transcripts(path):
        contig, strand = text(t.contig), "-" if t.strand == b"-" else "+"
        introns.append(Interval(contig, t.starts[0], t.ends[-1], INTRON, strand))
        exons += [Interval(contig, start, end, EXON, strand) for start, end in zip(t.starts, t.ends)]
    return introns + exons


def check_names(intervals: Sequence[Interval], path: Path) -> None:
    """Raise UserError for an interval whose name a table would read as no class."""
    for interval in intervals:
        if interval.name == "." or not is_known(interval.name):
            raise UserError(
                f"{path}: an interval on {interval.contig} at {interval.start} is named {interval.name!r}, which "
                "is no class; name it"
            )


def check_no_overlap(intervals: Sequence[Interval], path: Path) -> None:
    """Raise UserError for intervals of different names that share a base."""
    ordered = sorted(intervals, key=lambda i: (i.contig, i.start))
    last: Interval | None = None
    for interval in ordered:
        if last is not None and last.contig == interval.contig and interval.start < last.end:
            if last.name != interval.name:
                raise UserError(
                    f"{path}: '{last.name}' and '{interval.name}' overlap on {interval.contig} at {interval.start}, "
                    "and a base has one class; give one file for each, or leave out one"
                )
            if interval.end <= last.end:
                continue
        last = interval


def classes_of(sequence: bytes, intervals: Sequence[Interval], names: Sequence[str]) -> pyarrow.Array:
    """The class of each base, null at N; of overlapping intervals, that of the last."""
    codes = np.full(len(sequence), names.index(OTHER), np.int32)
    for interval in intervals:
        codes[interval.start : interval.end] = names.index(interval.name)
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array(codes, mask=unknown(sequence)), pyarrow.array(names))


def unknown(sequence: bytes) -> np.ndarray:
    """Bool [L], true at N."""
    return np.frombuffer(sequence, np.uint8) == ord("N")


def class_rows(genome: Mapping[str, bytes], intervals: Sequence[Interval], *, each_strand: bool) -> Iterator[Row]:
    """One row per contig; or two, with the intervals of either strand, the second of the reverse complement."""
    names = list(dict.fromkeys([*(interval.name for interval in intervals), OTHER]))
    of_contig: dict[str, list[Interval]] = {}
    for interval in intervals:
        of_contig.setdefault(interval.contig, []).append(interval)
    for contig, sequence in genome.items():
        here = of_contig.get(contig, [])
        if not each_strand:
            yield Row(contig, sequence, {"label": classes_of(sequence, here, names)})
            continue
        for strand in "+-":
            labels = classes_of(sequence, [i for i in here if i.strand == strand], names)
            turned = strand == "-"
            yield Row(
                f"{contig}:{strand}",
                reverse_complement(sequence) if turned else sequence,
                {"label": labels[::-1] if turned else labels},
            )


def signal_rows(
    genome: Mapping[str, bytes], tracks: Mapping[str, Path], *, missing: float | None, log1p: bool
) -> Iterator[Row]:
    """One row per contig; ``missing`` stands for what a track does not tell, None leaves it unknown."""
    import pybigtools

    opened = {}
    for name, path in tracks.items():
        try:
            opened[name] = pybigtools.open(str(path))
        except (ValueError, pybigtools.BBIReadError):
            raise UserError(f"cannot read bigWig file {path}") from None
    lengths = {name: track.chroms() for name, track in opened.items()}
    for contig, sequence in genome.items():
        labels = {}
        for name, track in opened.items():
            length = lengths[name].get(contig, len(sequence))
            if length != len(sequence):
                raise UserError(
                    f"{tracks[name]}: {contig} has {length} bases, and in the FASTA file {len(sequence)}; are both of "
                    "the same assembly?"
                )
            values = np.full(length, np.nan)
            if contig in lengths[name]:
                with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of NaN, as wanted here
                    values = track.values(contig, 0, length)
            if missing is not None:
                values[np.isnan(values)] = missing
            if log1p and (values < 0).any():
                raise UserError(f"{tracks[name]}: {contig} has values below 0; leave out --log1p")
            values = (np.log1p(values) if log1p else values).astype(np.float32)
            labels[name] = pyarrow.array(values, mask=unknown(sequence) | np.isnan(values))
        yield Row(contig, sequence, labels)


def write(path: Path, rows: Iterator[Row]) -> None:
    """Write ``id``, ``sequence`` and a list for each column of labels; a row group for each row."""
    with disk_errors(), new_files([path]) as (partial,):
        writer: parquet.ParquetWriter | None = None
        try:
            for row in rows:
                lists = {
                    name: pyarrow.LargeListArray.from_arrays(pyarrow.array([0, len(values)], pyarrow.int64()), values)
                    for name, values in row.labels.items()
                }
                table = pyarrow.table({"id": [row.id], "sequence": [row.sequence.decode()], **lists})
                writer = writer or parquet.ParquetWriter(partial, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = command.Parser(NAME, __doc__)
    parser.add_argument("--fasta", type=Path, required=True, metavar="FILE", help="genome, plain or gzip")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="table to write: .parquet")
    parser.add_argument("--contigs", nargs="+", metavar="NAME", help="of the table (default: all)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--gtf", type=Path, metavar="FILE", help="transcripts, plain or gzip: exon, intron or other")
    what.add_argument("--bed", type=Path, metavar="FILE", help="intervals whose names are classes; else other")
    what.add_argument(
        "--bigwig",
        type=_track,
        nargs="+",
        metavar="NAME=FILE",
        help="columns of numbers, and where they are",
    )
    parser.add_argument(
        "--each-strand",
        action="store_true",
        help="of --gtf and --bed: two rows for each contig, of its strands, each with the labels of its own",
    )
    parser.add_argument(
        "--missing", type=float, metavar="X", help="of --bigwig: value of bases without one (default: unknown)"
    )
    parser.add_argument("--log1p", action="store_true", help="of --bigwig: ln(1 + value), which suits coverage")
    return parser


def _track(given: str) -> tuple[str, Path]:
    name, sign, path = given.partition("=")
    if not (name and sign and path):
        raise argparse.ArgumentTypeError(f"{given!r} is not NAME=FILE")
    return name, Path(path)


def _rows(args: argparse.Namespace, genome: dict[str, bytes]) -> Iterator[Row]:
    chosen = {name: harness.contig_of(genome, name, "--contigs") for name in args.contigs or genome}
    if args.bigwig:
        if args.each_strand:
            raise UserError("--each-strand goes with --gtf or --bed; make a table of each strand's track")
        if len({name for name, _ in args.bigwig}) < len(args.bigwig):
            raise UserError("--bigwig: two tracks have one name")
        return signal_rows(chosen, dict(args.bigwig), missing=args.missing, log1p=args.log1p)
    if args.missing is not None or args.log1p:
        raise UserError("--missing and --log1p go with --bigwig")
    source = args.gtf or args.bed
    intervals = transcript_intervals(source) if args.gtf else read_bed(source, named=True)
    check_within(intervals, harness.lengths(genome), source)
    if args.bed:
        check_names(intervals, source)
        for strand in "+-" if args.each_strand else [None]:
            check_no_overlap([i for i in intervals if strand in (None, i.strand)], source)
    return class_rows(chosen, intervals, each_strand=args.each_strand)


def main() -> None:
    """Entry point."""
    args = build_parser().parse_args()

    def work() -> None:
        if args.output.suffix != ".parquet":
            raise UserError(f"{args.output}: the table is Parquet; end its name with .parquet")
        write(args.output, _rows(args, harness.read_genome(args.fasta)))

    harness.run(NAME, work)


if __name__ == "__main__":
    main()
