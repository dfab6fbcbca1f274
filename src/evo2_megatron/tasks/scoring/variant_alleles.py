# SPDX-License-Identifier: Apache-2.0
"""Every ALT beside the genome: what it changes there, or why it is not scored."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from evo2_megatron.config import UserError
from evo2_megatron.data.genome import Genome
from evo2_megatron.data.vcf import VcfRecord, why_not_scored
from evo2_megatron.tasks.scoring.variant_sources import Saturation, VcfFile
from evo2_megatron.tasks.scoring.variant_windows import Bases, Comparison, Edit, WindowSettings, edit_of, why_no_window

logger = logging.getLogger(__name__)

SCORED = "scored"

_LINES_SHOWN = 3
_MEANING = {
    "no_alt": "there is no ALT",
    "spanning_deletion": "ALT is *, a deletion that another record describes",
    "symbolic": "ALT is a symbol, not a sequence",
    "breakend": "ALT is a breakend, not a sequence",
    "not_acgt": "REF or ALT has letters other than A, C, G and T",
    "same_as_ref": "ALT is REF",
    "unknown_contig": "the FASTA file has no such contig",
    "outside_contig": "the position is not on the contig",
    "ref_mismatch": "REF is not what the FASTA file has there",
    "too_long": "an allele is longer than half of the window; raise --window-length",
    "contig_end": "bases are added or lost at the very end of a contig",
    "contig_too_short": "the contig has no two bases",
}


class Allele(NamedTuple):
    """One ALT of a record."""

    record: VcfRecord
    alt: bytes
    edit: Edit | None
    """None: it is not scored."""

    status: str
    """``SCORED``, or why not."""

    detail: str
    """What a person wants to know besides; mostly empty."""

    @property
    def is_scored(self) -> bool:
        return self.edit is not None


def read_alleles(source: VcfFile | Saturation, genome: Genome, settings: WindowSettings) -> list[Allele]:
    """Every ALT in the order of the source.

    Raises:
        UserError: The file cannot be read, or nothing can be scored and it is about another genome than the FASTA
            file.
    """
    lengths = genome.lengths
    alleles = [
        find_allele(record, alt, genome, lengths, settings) for record in source.records(genome) for alt in record.alts
    ]
    counts = Counter(allele.status for allele in alleles)
    if not counts[SCORED] and (counts["unknown_contig"] or counts["ref_mismatch"]):
        first = next(a for a in alleles if a.status in ("unknown_contig", "ref_mismatch"))
        raise UserError(
            f"{source.path}: none of {len(alleles)} ALT alleles can be scored; line {first.record.line}: "
            f"{_MEANING[first.status]} ({first.detail}); give the genome that the variants were called on"
        )
    return alleles


def comparisons(alleles: Iterable[Allele], *, both_strands: bool) -> list[Comparison]:
    """Of those that are scored, one for each strand."""
    strands = (False, True) if both_strands else (False,)
    return [
        Comparison(allele.record.contig, allele.edit, reverse)
        for allele in alleles
        if allele.edit is not None
        for reverse in strands
    ]


def find_allele(
    record: VcfRecord, alt: bytes, genome: Bases, lengths: Mapping[bytes, int], settings: WindowSettings
) -> Allele:
    """What an ALT of a record changes, or why it is not scored.

    Args:
        record, alt: The variant.
        genome, lengths: Contigs, and their bases.
        settings: Windows.
    """

    def skipped(status: str, detail: str = "") -> Allele:
        return Allele(record, alt, None, status, detail)

    contig, start = record.contig, record.position - 1
    if reason := why_not_scored(record.ref, alt):
        return skipped(reason)
    if contig not in lengths:
        return skipped("unknown_contig", _contig_hint(contig, lengths))
    if start < 0 or start + len(record.ref) > lengths[contig]:
        return skipped("outside_contig", f"{contig.decode()} has {lengths[contig]} bases")
    found = genome.bases(contig, start, start + len(record.ref)).upper()
    if found != record.ref:
        return skipped("ref_mismatch", f"REF {_short(record.ref)}, there {_short(found)}")
    edit = edit_of(genome, contig, start, record.ref, alt)
    if reason := why_no_window(edit, lengths[contig], settings):
        return skipped(reason)
    return Allele(record, alt, edit, SCORED, "")


def _short(bases: bytes) -> str:
    text = bases.decode("ascii", "backslashreplace")
    return text if len(text) <= 20 else f"{text[:20]}... ({len(text)} bases)"


def _contig_hint(contig: bytes, lengths: Mapping[bytes, int]) -> str:
    name = contig.decode()
    other = [contig.removeprefix(b"chr"), b"chr" + contig]
    other += [b"chrM"] if contig in (b"MT", b"M") else [b"MT", b"M"] if contig in (b"chrM", b"chrMT") else []
    for candidate in other:
        if candidate != contig and candidate in lengths:
            return f"{name}; it has {candidate.decode()}: bcftools annotate --rename-chrs makes the names alike"
    shown = ", ".join(_decoded(list(lengths)[:_LINES_SHOWN])) + (", ..." if len(lengths) > _LINES_SHOWN else "")
    return f"{name}; it has {shown}"


def _decoded(names: Iterable[bytes]) -> list[str]:
    return [name.decode("utf-8", "backslashreplace") for name in names]


def report_skipped(alleles: list[Allele]) -> None:
    """Log one line for each reason, with its first lines of the file."""
    reasons: dict[str, list[Allele]] = {}
    for allele in alleles:
        if not allele.is_scored:
            reasons.setdefault(allele.status, []).append(allele)
    for reason, found in reasons.items():
        shown = [f"{a.record.line}{a.detail and f' ({a.detail})'}" for a in found[:_LINES_SHOWN]]
        more = ", ..." if len(found) > _LINES_SHOWN else ""
        logger.warning("Not scored: %d ALT, %s; line %s%s", len(found), _MEANING[reason], ", ".join(shown), more)
