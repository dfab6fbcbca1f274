# SPDX-License-Identifier: Apache-2.0
"""Where a long record is cut, so that every base is scored once and has context before it.

Positions are 0-based, ends excluded, in the direction of reading. With 10 bases, windows of 5 and an overlap of 2
(``s``: scored; ``c``: context only)::

    0  1  2  3  4  5  6  7  8  9
    s  s  s  s  s
             c  c  s  s  s
                      c  c  s  s
"""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """One window of a record."""

    start: int
    end: int
    num_context: int
    """Bases at its start that another window scores."""


class Windows(NamedTuple):
    """How records are cut; a record that is not longer than a window is one window."""

    length: int
    """Bases of a window."""

    overlap: int
    """Bases before the first that a window scores, but for the first window; at most ``length - 1``."""

    @property
    def step(self) -> int:
        """Bases that a window scores, but for the first and the last."""
        return self.length - self.overlap

    def count(self, num_bases: int) -> int:
        """How many windows a record has."""
        return 1 + max(0, -(-(num_bases - self.length) // self.step))

    def span(self, number: int, num_bases: int) -> Span:
        """Window ``number``, from 0, of a record of so many bases."""
        start = number * self.step
        return Span(start, min(start + self.length, num_bases), self.overlap if number else 0)

    def covering(self, start: int, end: int) -> range:
        """Numbers of the windows that score the bases from ``start`` to ``end``; ``end > start``."""
        return range(self._of_base(start), self._of_base(end - 1) + 1)

    def _of_base(self, position: int) -> int:
        return 0 if position < self.length else 1 + (position - self.length) // self.step
