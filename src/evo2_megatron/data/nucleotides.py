# SPDX-License-Identifier: Apache-2.0
"""Strands and alphabets of nucleic acids.

Complement, in both cases: A-T, C-G, and the IUPAC codes R-Y (purine, pyrimidine), K-M (keto, amino), B-V (not A, not
T), D-H (not C, not G); S, W and N are their own complements. U is read as T, so its complement is A, and the
complement of A is T: the reverse complement of RNA is DNA. Everything else (gaps, ``@``, ``#``, digits) stays.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TypeVar

logger = logging.getLogger(__name__)

Sequence = TypeVar("Sequence", bytes, str)

_CODES = "ACGTURYKMBVDH"
_COMPLEMENTS = "TGCAAYRMKVBHD"


def _tables(source: str, target: str) -> tuple[bytes, dict[int, int]]:
    """Translation in both cases, once for bytes and once for str."""
    source, target = source + source.lower(), target + target.lower()
    return bytes.maketrans(source.encode(), target.encode()), str.maketrans(source, target)


COMPLEMENT, _COMPLEMENT_STR = _tables(_CODES, _COMPLEMENTS)
"""256-byte table for ``bytes.translate``."""

COMPLEMENT_UPPER_DNA = bytes.maketrans(b"ACGT", b"TGCA")
"""256-byte table of the former recipe: A, C, G and T in upper case only."""

TRANSCRIBE, _TRANSCRIBE_STR = _tables("T", "U")
"""256-byte table: DNA letters to RNA letters."""

_NOT_ASKED_ABOUT = bytes(set(range(256)) - set(b"EFIJLOPQUXZ"))
"""All but the letters that are no base of DNA and no IUPAC code for bases."""

BACK_TRANSCRIBE, _BACK_TRANSCRIBE_STR = _tables("U", "T")
"""256-byte table: RNA letters to DNA letters."""


def complement(sequence: Sequence) -> Sequence:
    """Replace every base by its partner; case is kept. The table is in this module's docstring."""
    return sequence.translate(COMPLEMENT if isinstance(sequence, bytes) else _COMPLEMENT_STR)


def reverse_complement(sequence: Sequence) -> Sequence:
    """The opposite strand, read 5' to 3'; case is kept."""
    return complement(sequence[::-1])


def letter_of_no_base(sequence: bytes) -> str | None:
    """The first letter, in upper case, that no DNA has: of a protein, or U; None: there is none.

    Not looked for in text with signs of lineage tags or of special tokens' names, which have any letter.
    """
    found = sequence.upper().translate(None, _NOT_ASKED_ABOUT)
    return chr(found[0]) if found and not any(sign in sequence for sign in b"|_;<") else None


def log_no_dna(letters: Mapping[str, str], total: int, what: str) -> None:
    """Warn in one line of letters that no DNA has, if there are any.

    Args:
        letters: Names of those that have one, and what ``letter_of_no_base`` gives for each.
        total: How many were looked at.
        what: Sequences or prompts.
    """
    if letters:
        name, letter = next(iter(letters.items()))
        logger.warning(
            "%d of %d %s have letters that no DNA has; the first is %r in %r. They are tokens as they are, which "
            "models of DNA do not know: give the DNA of a protein, and T for U",
            len(letters), total, what, letter, name,
        )  # fmt: skip


def look_for_no_dna(names: Iterable[str], sequences: Iterable[bytes], what: str) -> None:
    """``log_no_dna`` for these sequences."""
    letters = [(name, letter_of_no_base(sequence)) for name, sequence in zip(names, sequences)]
    log_no_dna({name: letter for name, letter in letters if letter}, len(letters), what)


def transcribe(sequence: Sequence) -> Sequence:
    """T to U, t to u: the RNA with the letters of this strand."""
    return sequence.translate(TRANSCRIBE if isinstance(sequence, bytes) else _TRANSCRIBE_STR)


def back_transcribe(sequence: Sequence) -> Sequence:
    """U to T, u to t."""
    return sequence.translate(BACK_TRANSCRIBE if isinstance(sequence, bytes) else _BACK_TRANSCRIBE_STR)
