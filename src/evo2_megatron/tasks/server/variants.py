# SPDX-License-Identifier: Apache-2.0
"""Effects of variants, asked for over HTTP: on a sequence that comes with them, or on the server's genome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from evo2_megatron.data.genome import Genome
from evo2_megatron.data.vcf import VcfRecord
from evo2_megatron.tasks.scoring.allele_scoring import Score, make_item
from evo2_megatron.tasks.scoring.batching import Item
from evo2_megatron.tasks.scoring.variant_alleles import Allele, comparisons, find_allele
from evo2_megatron.tasks.scoring.variant_windows import WINDOW_LENGTH, Group, WindowSettings, make_groups
from evo2_megatron.tasks.server import schemas
from evo2_megatron.tasks.server.jobs import Refused

MAX_TOKENS = 2**22
"""Of all windows of a request: 128 variants on both strands, with a reference each."""

_GIVEN = b"sequence"


class GivenSequence(NamedTuple):
    """A contig in memory."""

    text: bytes

    @property
    def lengths(self) -> dict[bytes, int]:
        """As of a ``Genome``."""
        return {_GIVEN: len(self.text)}

    def bases(self, contig: bytes, start: int, end: int) -> bytes:
        """As of a ``Genome``."""
        assert contig == _GIVEN
        return self.text[start:end]


@dataclass(slots=True)
class Asked:
    """What a request is about."""

    alleles: list[Allele]
    groups: list[Group]
    items: list[Item]
    window_length: int
    num_strands: int

    def effects(self, rows: Sequence[dict[str, np.ndarray]]) -> list[dict[str, Any]]:
        """The answer for each variant, from the results of the comparisons."""
        following = iter(rows)
        effects: list[dict[str, Any]] = []
        for allele in self.alleles:
            effect: dict[str, Any] = {"status": allele.status, "detail": allele.detail or None}
            if allele.is_scored:
                score = Score.of_strands([next(following) for _ in range(self.num_strands)], "mean")
                effect |= {
                    "delta": score.delta,
                    "ref_log_likelihood": score.reference,
                    "alt_log_likelihood": score.alternative,
                    "num_scored": score.num_scored,
                }
            effects.append(effect)
        return effects


def read(body: schemas.VariantsRequest, given: bytes | None, genome: Genome | None, max_seq_length: int) -> Asked:
    """Windows of the variants that can be scored.

    Args:
        body: The request.
        given: Token ids of its sequence, if it has one.
        genome: The server's.
        max_seq_length: Most tokens of a window.

    Raises:
        Refused: The fields do not go together, or ask for too much.
        UserError: A contig holds a character that has no token.
    """
    limit = max_seq_length - body.prepend_bos
    length = min(WINDOW_LENGTH, limit) if body.window_length is None else body.window_length
    if length > limit:
        raise Refused(
            413,
            f"window_length {length} is more than the {limit} bases that this server has for a window "
            "(--max-seq-length)",
        )
    source = _source(body, given, genome)
    lengths, settings = source.lengths, WindowSettings(length)
    records = [_record(number, variant) for number, variant in enumerate(body.variants)]
    alleles = [find_allele(record, record.alts[0], source, lengths, settings) for record in records]
    groups = make_groups(comparisons(alleles, both_strands=body.both_strands), lengths, settings)
    num_tokens = sum(group.length * (1 + len(group.edits)) for group in groups)
    if num_tokens > MAX_TOKENS:
        raise Refused(
            413,
            f"the windows have {num_tokens} bases, more than {MAX_TOKENS}; send fewer variants, or a shorter "
            "window_length",
        )
    items = [make_item(group, source, prepend_bos=body.prepend_bos) for group in groups]
    return Asked(alleles, groups, items, length, 1 + body.both_strands)


def _source(body: schemas.VariantsRequest, given: bytes | None, genome: Genome | None) -> Genome | GivenSequence:
    with_contig = [variant.chrom is not None for variant in body.variants]
    if given is not None:
        if any(with_contig):
            raise Refused(422, "chrom is for variants of the server's genome; leave it out, or leave out sequence")
        return GivenSequence(given)
    if genome is None:
        raise Refused(422, "sequence is missing: this server was started without --fasta, so that it has no genome")
    if not all(with_contig):
        raise Refused(422, f"variants.{with_contig.index(False)}: give chrom, or the sequence around the variants")
    return genome


def _record(number: int, variant: schemas.Variant) -> VcfRecord:
    contig = _GIVEN if variant.chrom is None else variant.chrom.encode()
    ref, alt = variant.ref.upper().encode(), variant.alt.upper().encode()
    return VcfRecord(number, contig, variant.position, b".", ref, (alt,))
