# SPDX-License-Identifier: Apache-2.0
"""Lineage tags: the taxonomy of a sequence as text, put in front of it every so many tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

from evo2_megatron.config import UserError

_MISSING = "None"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Names of the seven ranks; None where unknown. ``clazz``, because ``class`` is a word of Python."""

    domain: str | None = None
    phylum: str | None = None
    clazz: str | None = None
    order: str | None = None
    family: str | None = None
    genus: str | None = None
    species: str | None = None

    def tag(self, dropout: float = 0.0, rng: random.Random | None = None) -> str:
        """``|d__Bacteria;p__...;s__...|``; an unknown rank, or one lost to dropout, reads ``None``.

        Args:
            dropout: Probability of losing a rank, drawn for each rank.
            rng: Where the draws come from; needed if ``dropout`` is above 0.
        """
        names = (getattr(self, field.name) for field in fields(self))
        kept = (name if not dropout or rng.random() >= dropout else None for name in names)
        return "|" + ";".join(f"{rank}__{name or _MISSING}" for rank, name in zip("dpcofgs", kept, strict=True)) + "|"

    def check_fits(self, period: int, *, key: str) -> None:
        """Raise UserError unless every possible tag can be told from bases, and is shorter than the period at which it
        is repeated, in tokens."""
        names = [getattr(self, field.name) for field in fields(self)]
        for name in names:
            if name and ("|" in name or not name.isprintable()):
                raise UserError(
                    f"the lineage for '{key}' has the name {name!r}; a name has no '|', which ends the tag, and no "
                    "control characters"
                )
        # dropout lengthens the tag where a name is shorter than "None"
        length = len(self.tag()) + sum(max(0, len(_MISSING) - len(name)) for name in names if name)
        if length >= period:
            raise UserError(
                f"prompt_spacer_length is {period}, but the lineage tag for '{key}' takes up to {length} tokens; "
                f"set it above {length}"
            )
