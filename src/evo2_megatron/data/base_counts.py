# SPDX-License-Identifier: Apache-2.0
"""Count what a FASTA file is made of, fast enough to do it on the way: two passes of ``bytes.translate``."""

from __future__ import annotations

from dataclasses import dataclass

from evo2_megatron.data.tokenizer import encode_sequence

_LETTERS = b"abcdefghijklmnopqrstuvwxyz"
_UPPER, _LOWER = b"ACGTU", b"acgtu"
_UNKNOWN = b"Nn"
_AMBIGUOUS = b"RYSWKMBDHVryswkmbdhv"


@dataclass(slots=True)
class BaseCounts:
    """Characters of sequences by kind."""

    bases: int = 0
    """All characters of the sequences."""

    soft_masked: int = 0
    """Lower-case letters."""

    unknown: int = 0
    """N in either case."""

    ambiguous: int = 0
    """The other IUPAC codes for more than one base, in either case."""

    other: int = 0
    """Neither A, C, G, T, U nor an IUPAC code: gaps, lineage tags, control tags, mistakes."""

    first_other: str = ""
    """The first of those, and where it was."""

    def add(self, bases: bytes, name: str, path: str) -> None:
        """Count the bases of a record, or a part of them.

        Raises:
            UserError: They hold a character that has no token.
        """
        self.bases += len(bases)
        not_upper = bases.translate(None, _UPPER)
        if not not_upper:
            return
        rest = not_upper.translate(None, _LOWER)
        self.soft_masked += len(not_upper) - len(rest)
        if not rest:
            return
        self.soft_masked += len(rest) - len(rest.translate(None, _LETTERS))
        known = rest.translate(None, _UNKNOWN)
        self.unknown += len(rest) - len(known)
        if not known:
            return
        other = known.translate(None, _AMBIGUOUS)
        self.ambiguous += len(known) - len(other)
        if other:
            self._add_other(other, f"record '{name}' of {path}")

    def _add_other(self, other: bytes, where: str) -> None:
        encode_sequence(other, name=where)
        self.first_other = self.first_other or f"{chr(other[0])!r} in {where}"
        self.other += len(other)
