# SPDX-License-Identifier: Apache-2.0
"""Labelled sequences as samples of one length.

Shape legend: B sequences, L tokens, T columns of labels.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from evo2_megatron.data.labelled import Labelled, read_labelled
from evo2_megatron.data.labels import Labels
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.data.record_windows import Windows
from evo2_megatron.data.tokenizer import PAD

logger = logging.getLogger(__name__)


class _Labelled(Dataset, ABC):
    """Samples of a table. Those of a subclass are ``tokens`` (int64 [L], padded at the end), ``base_mask`` (bool [L]),
    ``targets`` (float32, NaN where nothing is known) and what it says."""

    def __init__(
        self,
        path: Path,
        labels: Labels,
        *,
        sequence_column: str,
        seq_length: int,
        both_strands: bool = False,
        multiple: int = 1,
    ) -> None:
        """Read and check the whole file.

        Args:
            path: A table, see ``data.labelled``.
            labels: What of it.
            sequence_column: Column of the bases.
            seq_length: Tokens per sample.
            both_strands: Of every sequence, give the reverse complement, too.
            multiple: Samples without a label, which count for nothing, fill up their number to a multiple of this.

        Raises:
            UserError: See ``read_labelled``.
        """
        self._rows = read_labelled(path, labels, sequence_column=sequence_column)
        self._path, self._seq_length, self._both_strands = path, seq_length, both_strands
        self._num_samples = self._prepare()
        self._num_filled = -(-self._num_samples // multiple) * multiple

    def __len__(self) -> int:
        return self._num_filled

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        sample = self._sample(number % self._num_samples)
        if number >= self._num_samples:
            sample["targets"] = torch.full_like(sample["targets"], torch.nan)
        return sample

    @abstractmethod
    def _prepare(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def _sample(self, number: int) -> dict[str, Tensor]: ...


class LabelledSequences(_Labelled):
    """A sequence, or each of its strands, is a sample, with ``targets`` [T]; too long ones are cut off at the end."""

    def _prepare(self) -> int:
        num_cut = sum(len(ids) > self._seq_length for ids in self._rows.ids)
        if num_cut:
            logger.warning("%s: %d sequences are cut to %d bases", self._path, num_cut, self._seq_length)
        return len(self._rows.ids) * (2 if self._both_strands else 1)

    def _sample(self, number: int) -> dict[str, Tensor]:
        row, strand = divmod(number, 2) if self._both_strands else (number, 0)
        ids = self._rows.ids[row][: self._seq_length]
        tokens, base_mask = pad([reverse_complement(ids) if strand else ids], self._seq_length)
        return {"tokens": tokens[0], "base_mask": base_mask[0], "targets": torch.from_numpy(self._rows.targets[row])}


class LabelledBases(_Labelled):
    """A sequence, or each window of a longer one, is a sample, with ``targets`` [L, T]; each label is in one of them.

    With both strands it also has ``opposite_tokens`` (int64 [L], padded at the end), its reverse complement.
    """

    def _prepare(self) -> int:
        self._windows = windows_with_labels(self._rows, self._seq_length, both_sides=self._both_strands)
        return len(self._windows)

    def _sample(self, number: int) -> dict[str, Tensor]:
        window = self._windows[number]
        ids = self._rows.ids[window.row][window.start : window.end]
        tokens, base_mask = pad([ids], self._seq_length)
        targets = torch.full((self._seq_length, self._rows.targets.shape[1]), torch.nan)
        first, last = window.kept
        told = self._rows.targets[window.place : window.place + last - first]
        targets[first:last] = torch.from_numpy(told)
        sample = {"tokens": tokens[0], "base_mask": base_mask[0], "targets": targets}
        if self._both_strands:
            sample["opposite_tokens"] = pad([reverse_complement(ids)], self._seq_length)[0][0]
        return sample


class BaseWindow(NamedTuple):
    """Bases of a sequence that go through a model together."""

    row: int
    """Of the sequence."""

    start: int
    end: int
    """In the sequence, 0-based, end excluded."""

    kept: tuple[int, int]
    """From which to which base of the window results count; the others are context."""

    place: int
    """Of the first of those, among all bases of all sequences, one after the other."""


def base_windows(lengths: Sequence[int], length: int, *, both_sides: bool) -> list[BaseWindow]:
    """Windows in which each base counts once; those of a sequence overlap by half.

    A model sees what comes before a base: in all windows but a sequence's first, the first half is context. Where
    the head sees the other strand, too, what comes after it counts as much, and the first and last quarter are.

    Args:
        lengths: Bases of each sequence.
        length: Of a window; a sequence that is not longer is one.
        both_sides: Whether the head sees the reverse complement, too.
    """
    windows, found, place = Windows(length, length // 2), [], 0
    after = windows.overlap // 2 if both_sides else 0
    for row, num_bases in enumerate(lengths):
        count = windows.count(num_bases)
        for number in range(count):
            span = windows.span(number, num_bases)
            num_bases_here = span.end - span.start
            first = span.num_context - after if number else 0
            last = num_bases_here - after if number < count - 1 else num_bases_here
            found.append(BaseWindow(row, span.start, span.end, (first, last), place + span.start + first))
        place += num_bases
    return found


def windows_with_labels(rows: Labelled, length: int, *, both_sides: bool) -> list[BaseWindow]:
    """Those of ``base_windows`` in which a base that counts has a label."""
    known = ~np.isnan(rows.targets).all(1)
    return [
        window
        for window in base_windows([len(ids) for ids in rows.ids], length, both_sides=both_sides)
        if known[window.place : window.place + window.kept[1] - window.kept[0]].any()
    ]


def pad(sequences: Sequence[bytes], length: int) -> tuple[Tensor, Tensor]:
    """Token ids, int64 [B, L], cut and padded to a length; and where there are bases, bool [B, L].

    Padding follows the bases, so that a causal model's hidden states of bases do not depend on it.
    """
    tokens_BL = torch.full((len(sequences), length), PAD)
    mask_BL = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        bases = torch.frombuffer(bytearray(ids[:length]), dtype=torch.uint8)
        tokens_BL[row, : len(bases)], mask_BL[row, : len(bases)] = bases.long(), True
    return tokens_BL, mask_BL
