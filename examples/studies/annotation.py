# SPDX-License-Identifier: Apache-2.0
"""Intervals of a genome from GTF, and genes from GTF or BED, for the studies."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from evo2_megatron.config import UserError
from evo2_megatron.data.bed import Interval, read_bed
from evo2_megatron.data.gtf import Transcript, read_gtf, text

logger = logging.getLogger(f"evo2_megatron.{__name__}")


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
        genes = read_bed(path, named=True)
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


def covered(intervals: Iterable[Interval], length: int) -> np.ndarray:
    """Bool [length]: bases of one contig that lie in any of the intervals."""
    mask = np.zeros(length, dtype=bool)
    for interval in intervals:
        mask[interval.start : interval.end] = True
    return mask
