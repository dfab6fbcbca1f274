# SPDX-License-Identifier: Apache-2.0
"""Names and contents of what ``variants_evo2`` writes; every file has the order of the variants.

::

    variants.tsv, variants.parquet   one line per ALT
    variants.vcf, variants.vcf.gz    the VCF file with INFO fields EVO2_DELTA and, of what was not scored, EVO2_SKIPPED
    delta.bedgraph, delta.bigwig     mean delta of the substitutions of each base, for genome browsers
    skipped.tsv                      line, reason and detail of each ALT that was not scored, if there are any
    manifest.json                    what made all this; written last
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from evo2_megatron.data.bgzf import BgzfWriter
from evo2_megatron.data.vcf import InfoField, VcfLine, VcfRecord, write_annotated
from evo2_megatron.tasks.scoring.allele_scoring import Score
from evo2_megatron.tasks.scoring.prediction_files import ResultNames, write_beside
from evo2_megatron.tasks.scoring.prediction_settings import TRACKS
from evo2_megatron.tasks.scoring.prediction_tables import Bases
from evo2_megatron.tasks.scoring.prediction_tracks import write_bedgraph, write_bigwig
from evo2_megatron.tasks.scoring.variant_alleles import Allele

FORMATS = ("tsv", "parquet", "vcf", "vcf.gz", *TRACKS)
TRACK = "delta"
"""Name of the values of ``write_track``."""

SKIPPED_FILE = "skipped.tsv"
RESULTS = ResultNames(r"variants\.(tsv|parquet|vcf|vcf\.gz)|delta\.(bedgraph|bigwig)|skipped\.tsv|manifest\.json")


class Row(NamedTuple):
    """A line of ``variants``; the numbers are None where the ALT was not scored."""

    chrom: str
    pos: int
    id: str
    ref: str
    alt: str
    delta: float | None
    """Log-likelihood of the window with ALT minus that with REF: their sum, or per scored token."""

    ref_log_likelihood: float | None
    """Sum over the scored tokens, in nat; of two strands the mean."""

    alt_log_likelihood: float | None
    num_scored: int | None
    """Tokens of each window that are scored."""

    status: str
    """``scored``, or why not."""


def rows(alleles: Iterable[Allele], scores: Iterator[Score]) -> Iterator[Row]:
    """Lines of ``variants``; ``scores``: of the alleles that have one."""
    for allele in alleles:
        record = allele.record
        texts = [text.decode("utf-8", "backslashreplace") for text in (record.id, record.ref, allele.alt)]
        numbers = next(scores) if allele.is_scored else (None,) * len(Score._fields)
        yield Row(record.contig.decode(), record.position, *texts, *numbers, allele.status)


def write_vcf(
    path: Path, lines: Iterable[VcfLine], alleles: list[Allele], scores: Iterator[Score], *, meaning: str
) -> None:
    """Write a VCF file again with a delta for each ALT, bgzip if the name ends with ``.gz``.

    Args:
        path: File to write.
        lines: What to annotate.
        alleles: What was read from it.
        scores: Of the alleles that have one.
        meaning: Of the delta, for the header.
    """
    fields = (
        InfoField("EVO2_DELTA", "Float", f"Evo 2: {meaning}"),
        InfoField("EVO2_SKIPPED", "String", "Why variants_evo2 did not score the ALT"),
    )

    def values() -> Iterator[tuple[str | None, ...]]:
        position = 0
        while position < len(alleles):
            of_record = alleles[position : position + len(alleles[position].record.alts)]
            position += len(of_record)
            deltas = [f"{next(scores).delta:.9g}" if allele.is_scored else "." for allele in of_record]
            reasons = ["." if allele.is_scored else allele.status for allele in of_record]
            yield ",".join(deltas), ",".join(reasons) if set(reasons) != {"."} else None

    def write(file: BinaryIO) -> None:
        if path.suffix != ".gz":
            write_annotated(lines, file, fields, values())
            return
        compressed = BgzfWriter(file)
        write_annotated(lines, compressed, fields, values())
        compressed.close()

    write_beside(path, write)


def write_track(path: Path, lengths: Mapping[bytes, int], alleles: Iterable[Allele], scores: Iterator[Score]) -> None:
    """Write the mean delta of the ALTs at each position, as bedGraph or bigWig by the name of the file.

    Args:
        path: File to write.
        lengths: Bases of each contig.
        alleles: Substitutions of single bases, contig by contig.
        scores: Of the alleles that have one.

    Raises:
        UserError: Of bigWig, as ``write_bigwig``.
    """
    scored = ((allele.record, next(scores).delta) for allele in alleles if allele.is_scored)
    contigs = {name: _means(name, found) for name, found in groupby(scored, key=lambda pair: pair[0].contig)}
    if path.suffix == ".bedgraph":
        write_bedgraph(path, TRACK, contigs.values())
    else:
        in_order = sorted(contigs)
        bases = [contigs[name] for name in in_order]
        write_bigwig(path, TRACK, {contigs[name].id: lengths[name] for name in in_order}, bases)


def _means(contig: bytes, scored: Iterable[tuple[VcfRecord, float]]) -> Bases:
    all_positions, deltas = zip(*((record.position, delta) for record, delta in scored))
    positions, where = np.unique(all_positions, return_inverse=True)
    means = np.bincount(where, deltas) / np.bincount(where)
    return Bases(contig.decode("utf-8", "backslashreplace"), positions, b"", {TRACK: means})


def write_skipped(output_dir: Path, alleles: Iterable[Allele]) -> None:
    """Write ``skipped.tsv``, unless everything was scored."""
    lines = ["line\tchrom\tpos\tref\talt\treason\tdetail\n"]
    for allele in alleles:
        if not allele.is_scored:
            record = allele.record
            texts = [text.decode("utf-8", "backslashreplace") for text in (record.contig, record.ref, allele.alt)]
            columns = (record.line, texts[0], record.position, *texts[1:], allele.status, allele.detail)
            lines.append("\t".join(map(str, columns)) + "\n")
    if len(lines) > 1:
        write_beside(output_dir / SKIPPED_FILE, lambda file: file.write("".join(lines).encode()))
