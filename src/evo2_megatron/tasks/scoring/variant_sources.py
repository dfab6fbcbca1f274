# SPDX-License-Identifier: Apache-2.0
"""Where variants come from: the lines of a VCF file, or all substitutions in the intervals of a BED file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evo2_megatron.config import UserError
from evo2_megatron.data.bed import Interval, check_within, read_bed
from evo2_megatron.data.genome import Genome
from evo2_megatron.data.saturation import joined, substitutions
from evo2_megatron.data.vcf import VcfLine, VcfRecord, make_lines, read_lines, read_vcf
from evo2_megatron.tasks.scoring.prediction_settings import TRACKS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VcfFile:
    """Variants of a VCF file, plain, gzip or bgzip."""

    path: Path
    flag, kind, has_tracks = "vcf", "VCF", False

    def records(self, _genome: Genome) -> Iterator[VcfRecord]:
        """The records in the order of the file."""
        return read_vcf(self.path)

    def lines(self, _genome: Genome) -> Iterator[VcfLine]:
        """The whole file."""
        return read_lines(self.path)


@dataclass(frozen=True, slots=True)
class Saturation:
    """All three substitutions of every base in the intervals of a BED file, each once, in the genome's order."""

    path: Path
    flag, kind, has_tracks = "saturate", "BED", True

    def records(self, genome: Genome) -> Iterator[VcfRecord]:
        """A record for each base that is A, C, G or T.

        Raises:
            UserError: The file is not BED, or is about another genome.
        """
        intervals = self._intervals(genome)
        num_records = 0
        for record in substitutions(intervals, genome):
            num_records += 1
            yield record
        left_out = sum(interval.end - interval.start for interval in intervals) - num_records
        if left_out:
            logger.warning("%d bases of %s are not A, C, G or T and are left out", left_out, self.path)

    def lines(self, genome: Genome) -> Iterator[VcfLine]:
        """A VCF file of these records."""
        return make_lines(substitutions(self._intervals(genome), genome), genome.lengths)

    def _intervals(self, genome: Genome) -> list[Interval]:
        lengths = {name.decode("utf-8", "surrogateescape"): length for name, length in genome.lengths.items()}
        intervals = read_bed(self.path)
        check_within(intervals, lengths, self.path)
        return joined(intervals, lengths)


def check_source(source: VcfFile | Saturation, formats: tuple[str, ...]) -> None:
    """Raise UserError where the file is not there, or what is asked for cannot be made of it."""
    path = source.path
    if not path.is_file():
        raise UserError(
            f"no such {source.kind} file: {path}" + "; it is read twice, so not from a pipe" * path.exists()
        )
    for name in formats:
        if name in TRACKS and not source.has_tracks:
            raise UserError(
                f"--output-format {name} has a value for each base of the intervals of --saturate; of a VCF file "
                "choose tsv, parquet, vcf or vcf.gz"
            )
