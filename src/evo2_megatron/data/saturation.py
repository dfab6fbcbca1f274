# SPDX-License-Identifier: Apache-2.0
"""All single-base substitutions in intervals of a genome, as records of VCF: saturation mutagenesis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from evo2_megatron.data.bed import Interval
from evo2_megatron.data.genome import Genome
from evo2_megatron.data.vcf import VcfRecord

_BASES = b"ACGT"
_BASES_AT_A_TIME = 1 << 16


def joined(intervals: Iterable[Interval], contigs: Iterable[str]) -> list[Interval]:
    """Intervals in the order of ``contigs`` and of their starts; those that overlap or touch are one."""
    place = {contig: number for number, contig in enumerate(contigs)}
    result: list[Interval] = []
    for interval in sorted(intervals, key=lambda i: (place[i.contig], i.start)):
        last = result[-1] if result else None
        if last is not None and last.contig == interval.contig and interval.start <= last.end:
            result[-1] = last._replace(end=max(last.end, interval.end))
        else:
            result.append(Interval(*interval[:3]))
    return result


def substitutions(intervals: Iterable[Interval], genome: Genome) -> Iterator[VcfRecord]:
    """A record for each base that is A, C, G or T, upper or lower case, whose ALTs are the three others."""
    others = {base: tuple(bytes([alt]) for alt in _BASES if alt != base) for base in _BASES}
    number = 0
    for interval in intervals:
        contig = interval.contig.encode()
        for start in range(interval.start, interval.end, _BASES_AT_A_TIME):
            bases = genome.bases(contig, start, min(start + _BASES_AT_A_TIME, interval.end)).upper()
            for position, base in enumerate(bases, start + 1):
                if base in others:
                    number += 1
                    yield VcfRecord(number, contig, position, b".", bytes([base]), others[base])
