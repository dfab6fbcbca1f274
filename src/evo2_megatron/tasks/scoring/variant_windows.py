# SPDX-License-Identifier: Apache-2.0
"""Which two sequences are compared for an ALT, on each strand, and which comparisons can share work.

Both sequences have the same number of bases and begin at the same base, where reading starts: the left end of the
window on the forward strand, its right end on the reverse strand. So a strand reads the same context before the
variant whichever allele follows, and it is the far end that gives way to an insertion or deletion. Positions are
0-based, ends excluded, on the forward strand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from evo2_megatron.data.nucleotides import reverse_complement

WINDOW_LENGTH = 8_192
"""Bases, unless others are asked for."""

_ALIGN_BASES = 1_024
_CUTS_PER_WINDOW = 256
"""Shared context is cut to a multiple of this part of the window: more windows then go through together."""


class Bases(Protocol):
    """Where windows come from: a ``Genome``, or sequences in memory."""

    def bases(self, contig: bytes, start: int, end: int) -> bytes:
        """Bases from ``start`` to ``end``, 0-based, end excluded, within the contig."""


class Edit(NamedTuple):
    """Replace the bases from ``start`` to ``end`` of a contig."""

    start: int
    end: int
    bases: bytes

    @property
    def num_lost(self) -> int:
        """Bases by which the contig becomes shorter; negative: longer."""
        return self.end - self.start - len(self.bases)


class WindowSettings(NamedTuple):
    """How long windows are and where they begin."""

    length: int = WINDOW_LENGTH
    """Bases."""

    step: int = 1
    """Windows begin at multiples of this many bases: variants that lie close share a reference window."""


@dataclass(slots=True)
class Group:
    """Comparisons with the same reference sequence, whose first ``num_shared`` bases are also those of every ALT."""

    contig: bytes
    reverse: bool
    start: int
    """Of the reference window."""

    length: int
    """Bases of each sequence."""

    num_shared: int
    edits: list[Edit] = field(default_factory=list)
    jobs: list[int] = field(default_factory=list)
    """Number of the comparison that each edit belongs to."""

    def reference(self, genome: Bases) -> bytes:
        """Upper-case bases as they are read."""
        return _as_read(genome.bases(self.contig, self.start, self.start + self.length), self.reverse)

    def alternatives(self, genome: Bases) -> list[bytes]:
        """The same with each edit made."""
        return [self._alternative(genome, edit) for edit in self.edits]

    def _alternative(self, genome: Bases, edit: Edit) -> bytes:
        end = self.start + self.length
        if self.reverse:
            bases = edit.bases + genome.bases(self.contig, edit.end, end)
            first = max(edit.start - max(self.length - len(bases), 0), 0)
            return _as_read((genome.bases(self.contig, first, edit.start) + bases)[-self.length :], True)
        bases = genome.bases(self.contig, self.start, edit.start) + edit.bases
        last = edit.end + max(self.length - len(bases), 0)
        return _as_read((bases + genome.bases(self.contig, edit.end, last))[: self.length], False)


def _as_read(bases: bytes, reverse: bool) -> bytes:
    return (reverse_complement(bases) if reverse else bases).upper()


def edit_of(genome: Bases, contig: bytes, position: int, ref: bytes, alt: bytes) -> Edit:
    """What REF and ALT do, without the bases they share, as far to the left as it goes (as ``bcftools norm``).

    Different spellings of one variant so have the same window.

    Args:
        genome: Where REF has been found.
        contig: Name.
        position: 0-based, of the first base of REF.
        ref, alt: Different, upper case.
    """
    end = position + len(ref)
    while ref and alt and ref[-1] == alt[-1]:
        ref, alt, end = ref[:-1], alt[:-1], end - 1
    shared = 0
    while shared < min(len(ref), len(alt)) and ref[shared] == alt[shared]:
        shared += 1
    ref, alt, start = ref[shared:], alt[shared:], position + shared
    unit = ref or alt  # one of the two is empty if the variant can be moved
    if ref and alt:
        return Edit(start, end, alt)
    while start:
        low = max(0, start - _ALIGN_BASES)
        before = genome.bases(contig, low, start).upper()
        num = 0
        while num < len(before) and before[-1 - num] == unit[-1 - num % len(unit)]:
            num += 1
        turn = num % len(unit)
        unit = unit[len(unit) - turn :] + unit[: len(unit) - turn]
        start -= num
        if num < len(before):
            break
    return Edit(start, start + len(unit), b"") if ref else Edit(start, start, unit)


def why_no_window(edit: Edit, contig_length: int, settings: WindowSettings) -> str | None:
    """Why an edit cannot be scored; None: it can.

    ``too_long``: an allele has more than half as many bases as the window, less the step; ``contig_end``: bases are
    added or lost at the very end of a contig, so that one strand sees nothing after them; ``contig_too_short``.
    """
    if max(edit.end - edit.start, len(edit.bases)) > settings.length // 2 - settings.step:
        return "too_long"
    if edit.num_lost and (edit.start == 0 or edit.end == contig_length):
        return "contig_end"
    return "contig_too_short" if contig_length - max(edit.num_lost, 0) < 2 else None


def group_of(contig: bytes, contig_length: int, edit: Edit, settings: WindowSettings, *, reverse: bool) -> Group:
    """The window of an edit, without the edit.

    The edit is in the middle, as far as the contig allows; the window has the length asked for, as far as it allows.
    """
    lost = max(edit.num_lost, 0)
    length = min(settings.length, contig_length - lost)
    start = (edit.start - settings.length // 2) // settings.step * settings.step
    start = max(0, min(start, contig_length - settings.length))
    if reverse:  # the ALT reads further to the left
        end = min(contig_length, max(start + min(settings.length, contig_length), length + lost))
        start, before = end - length, end - edit.end
    else:  # to the right
        start = max(0, min(start, contig_length - length - lost))
        before = edit.start - start
    unit = max(settings.step, settings.length // _CUTS_PER_WINDOW, 1)
    # the first changed base is predicted from the base before it, which is so read by each allele
    return Group(contig, reverse, start, length, max(before - 1, 0) // unit * unit)


class Comparison(NamedTuple):
    """An ALT on one strand."""

    contig: bytes
    edit: Edit
    reverse: bool


def make_groups(
    comparisons: Sequence[Comparison], contig_lengths: dict[bytes, int], settings: WindowSettings
) -> list[Group]:
    """Put comparisons with the same reference window together, in the order of the first of each."""
    groups: dict[tuple, Group] = {}
    for job, (contig, edit, reverse) in enumerate(comparisons):
        new = group_of(contig, contig_lengths[contig], edit, settings, reverse=reverse)
        group = groups.setdefault((contig, reverse, new.start, new.length, new.num_shared), new)
        group.edits.append(edit)
        group.jobs.append(job)
    return list(groups.values())


def plan_groups(groups: Sequence[Group], *, max_tokens: int) -> list[list[int]]:
    """Which groups go through the model together: with equally long shared context, the longest windows first.

    Args:
        groups: From ``make_groups``.
        max_tokens: Most tokens of all their sequences' ends, and of their shared starts.

    Returns:
        Positions in ``groups``, each once.
    """
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(groups)), key=lambda i: (-groups[i].length, -groups[i].num_shared, i)):
        group = groups[index]
        ends = (1 + len(group.edits)) * (group.length - group.num_shared)
        size = max(ends, group.num_shared)
        last = groups[batches[-1][0]] if batches else None
        same = last and (last.length, last.num_shared) == (group.length, group.num_shared)
        if same and used + size <= max_tokens:
            batches[-1].append(index)
            used += size
        else:
            batches.append([index])
            used = size
    return batches
