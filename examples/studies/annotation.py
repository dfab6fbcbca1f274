# SPDX-License-Identifier: Apache-2.0
"""Intervals of a genome from BED and GTF, for the studies."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evo2_megatron.config import UserError
from evo2_megatron.data.gtf import Transcript, read_gtf, text

logger = logging.getLogger(f"evo2_megatron.{__name__}")


class Interval(NamedTuple):
    """0-based, end excluded, on the forward strand."""

    contig: str
    start: int
    end: int
    name: str
    strand: str
    """``+`` or ``-``; ``+`` where the file does not say."""


def read_bed(path: Path) -> list[Interval]:
    """Lines of a BED file with a name in the fourth column.

    Raises:
        UserError: No such file; a line that is none; or no interval at all.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"cannot read BED file {path}: {reason}") from None
    intervals = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(("#", "track", "browser")):
            continue
        fields = line.split("\t")
        if len(fields) < 4 or not (fields[1].isdecimal() and fields[2].isdecimal()):
            raise UserError(f"{path}, line {number}: BED has contig, start, end and name between tabs")
        interval = Interval(fields[0], int(fields[1]), int(fields[2]), fields[3], _strand(fields))
        if interval.start >= interval.end:
            raise UserError(f"{path}, line {number}: start {interval.start} is not before end {interval.end}")
        intervals.append(interval)
    if not intervals:
        raise UserError(f"{path} has no intervals; BED has contig, start, end and name between tabs")
    return intervals


def _strand(fields: list[str]) -> str:
    return "-" if len(fields) > 5 and fields[5].strip() == "-" else "+"


def read_transcripts(path: Path) -> list[Transcript]:
    """Of a GTF file; what is left out is logged."""
    return read_gtf(path, lambda problem: logger.warning("%s, line %d: %s", path, problem.line, problem.text))


def read_genes(path: Path) -> list[Interval]:
    """Genes of a BED file, or of a GTF file the extent of the first transcript of each gene.

    A gene is taken to begin with its start codon: give coding sequences.

    Raises:
        UserError: The file cannot be read, or two genes share a name.
    """
    if path.name.removesuffix(".gz").endswith((".gtf", ".gff")):
        genes = list({gene.name: gene for gene in reversed(_genes_of(read_transcripts(path)))}.values())[::-1]
    else:
        genes = read_bed(path)
    seen: set[str] = set()
    for gene in genes:
        if gene.name in seen:
            raise UserError(f"{path}: two genes are named '{gene.name}'; give each its own name")
        seen.add(gene.name)
    return genes


def _genes_of(transcripts: Iterable[Transcript]) -> list[Interval]:
    return [
        Interval(text(t.contig), t.starts[0], t.ends[-1], text(t.gene_id), "-" if t.strand == b"-" else "+")
        for t in transcripts
    ]


def check_within(intervals: Iterable[Interval], genome: dict[str, bytes], path: Path) -> None:
    """Raise UserError for an interval that lies outside the genome."""
    for interval in intervals:
        if interval.contig not in genome:
            raise UserError(f"{path} names contig '{interval.contig}', which the FASTA file does not have")
        if interval.end > len(genome[interval.contig]):
            raise UserError(
                f"{path}: '{interval.name}' ends at {interval.end}, beyond the {len(genome[interval.contig])} bases "
                f"of {interval.contig}; are FASTA and annotation of the same assembly?"
            )


def covered(intervals: Iterable[Interval], length: int) -> np.ndarray:
    """Bool [length]: bases of one contig that lie in any of the intervals."""
    mask = np.zeros(length, dtype=bool)
    for interval in intervals:
        mask[interval.start : interval.end] = True
    return mask
