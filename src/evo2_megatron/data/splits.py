# SPDX-License-Identifier: Apache-2.0
"""Divide documents between training, validation and test: by lists of names, or reproducibly from a seed."""

from __future__ import annotations

import math
import random
from itertools import accumulate

from evo2_megatron.config import UserError

SPLITS = ("train", "val", "test")


class Splitter:
    """Assigns records, or the windows of a long record, to splits in the ratio of the weights.

    One record goes to one split at random. The windows of one record are cut into at most one contiguous block per
    split, whose order along the record is random, so that neighbours in a genome seldom end up in different splits.
    As long as a split with a positive weight has received nothing, the next record or window goes to it.

    A split may have a list of names: it gets the records of these names, whole, and no others. The weights then divide
    what is in no list between the splits without one; if there is none of those, what is in no list is left out.
    """

    def __init__(
        self,
        weights: dict[str, float],
        seed: int,
        *,
        names: dict[str, list[str]] | None = None,
        whole_records: bool = False,
    ) -> None:
        """Set up.

        Args:
            weights: Relative size of each of ``SPLITS``; none negative, at least one positive.
            seed: Of the random choices.
            names: Record names by split, for the splits that have a list; no name twice.
            whole_records: Never cut the windows of a record into blocks: they all go to one split.
        """
        names = names or {}
        self._split_of = {name: split for split, listed in names.items() for name in listed}
        self._unseen = dict(self._split_of)
        self._whole = whole_records
        weights = {split: weight for split, weight in weights.items() if weight > 0 and split not in names}
        total = sum(weights.values())
        self._shares = {split: weights[split] / total for split in SPLITS if split in weights}
        self._waiting = sorted(self._shares, key=self._shares.__getitem__, reverse=True)
        self._ends = list(zip(self._shares, accumulate(self._shares.values()), strict=True))
        self._rng = random.Random(f"{seed}/split")
        self.num_assigned = 0

    def assign_record(self, name: str) -> str | None:
        """Split of the next record, or None: it is left out."""
        if self._split_of:
            self._unseen.pop(name, None)
            if name in self._split_of:
                self.num_assigned += 1
                return self._split_of[name]
            if not self._shares:
                return None
        self.num_assigned += 1
        if self._waiting:
            return self._waiting.pop(0)
        point = self._rng.random()
        for split, end in self._ends:
            if point < end:
                return split
        return self._ends[-1][0]  # the shares add up to 1 but for rounding

    def assign_windows(self, name: str, num_windows: int) -> list[str]:
        """Split of each window of the next record, in order along the record; none if it is left out."""
        if num_windows == 1 or self._whole or name in self._split_of or not self._shares:
            split = self.assign_record(name)
            return [split] * num_windows if split else []
        self.num_assigned += num_windows
        order = self._rng.sample(list(self._shares), len(self._shares))
        counts = self._counts(num_windows, order)
        for split in [s for s in self._waiting if not counts[s]]:
            donors = [s for s in self._shares if counts[s] > 1 or (counts[s] and s not in self._waiting)]
            if donors:
                counts[max(donors, key=counts.__getitem__)] -= 1
                counts[split] += 1
        self._waiting = [s for s in self._waiting if not counts[s]]
        return [split for split in order for _ in range(counts[split])]

    def _counts(self, num_windows: int, order: list[str]) -> dict[str, int]:
        """Windows per split, right on average also where a share of the windows is less than one.

        Systematic sampling: ``num_windows`` evenly spaced points with a random start, laid over the shares.
        """
        start, end, taken = self._rng.random(), 0.0, 0
        counts = {}
        for split in order:
            end += self._shares[split]
            # points (i + start) / num_windows below the end of this share; the shares add up to 1 but for rounding
            below = num_windows if split == order[-1] else max(0, math.ceil(end * num_windows - start))
            counts[split] = max(0, below - taken)
            taken = max(taken, below)
        return counts

    def check_complete(self) -> None:
        """Raise UserError if a listed name did not occur, or a split with a positive weight has received nothing."""
        if self._unseen:
            name, split = next(iter(self._unseen.items()))
            others = f" ({len(self._unseen)} such names)" if len(self._unseen) > 1 else ""
            raise UserError(
                f"no record with bases is named '{name}', which the list for {split} names{others}; a name is the "
                "first word after '>', and a record that nnn_filter drops is none"
            )
        if not self.num_assigned:
            raise UserError(
                "the filters left no document; nnn_filter drops whole records unless split_window_length is set"
            )
        if self._waiting:
            remedy = ("split_by to window and " if self._whole else "") + "split_window_length to a number of bases"
            raise UserError(
                f"{self.num_assigned} document(s) are too few for {len(self._shares)} splits with a weight above 0: "
                f"{', '.join(self._waiting)} would be empty; set its weight to 0, or {remedy}, which cuts long records"
            )
