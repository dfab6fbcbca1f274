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


class _Filled(Dataset, ABC):
    """Samples of which the last ones, without a label, fill up their number to a multiple."""

    def __init__(self, num_samples: int, multiple: int) -> None:
        self._num_samples = num_samples
        self._num_filled = -(-num_samples // multiple) * multiple

    def __len__(self) -> int:
        return self._num_filled

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        sample = self._sample(number % self._num_samples)
        if number >= self._num_samples:
            sample["targets"] = torch.full_like(sample["targets"], torch.nan)
        return sample

    @abstractmethod
    def _sample(self, number: int) -> dict[str, Tensor]: ...


class LabelledSequences(_Filled):
    """Samples: ``tokens`` (int64 [L], padded at the end), ``base_mask`` (bool [L]), ``targets`` (float32 [T])."""

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
            seq_length: Tokens per sample; what is longer is cut off at the end, which is logged.
            both_strands: Every sequence is two samples, itself and its reverse complement.
            multiple: Samples without a label, which count for nothing, fill up their number to a multiple of this.

        Raises:
            UserError: See ``read_labelled``.
        """
        self._rows = read_labelled(path, labels, sequence_column=sequence_column)
        self._seq_length, self._num_strands = seq_length, 2 if both_strands else 1
        super().__init__(len(self._rows.ids) * self._num_strands, multiple)
        num_cut = sum(len(ids) > seq_length for ids in self._rows.ids)
        if num_cut:
            logger.warning("%s: %d sequences are cut to %d bases", path, num_cut, seq_length)

    def _sample(self, number: int) -> dict[str, Tensor]:
        row, strand = divmod(number, self._num_strands)
        ids = self._rows.ids[row][: self._seq_length]
        tokens, base_mask = pad([reverse_complement(ids) if strand else ids], self._seq_length)
        targets = torch.from_numpy(self._rows.targets[row].copy())
        return {"tokens": tokens[0], "base_mask": base_mask[0], "targets": targets}


class LabelledBases(_Filled):
    """Samples: ``tokens``, ``base_mask`` as of ``LabelledSequences``, and ``targets`` (float32 [L, T]).

    If the head is to see both sides of a base, also ``opposite_tokens`` (int64 [L], padded at the end): the reverse
    complement. Of a sequence longer than a sample each window is one, in which each base has its label once.
    """

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
        """Read and check the whole file; arguments and errors as of ``LabelledSequences``.

        Args:
            both_strands: Give the reverse complement, too.
        """
        self._rows = read_labelled(path, labels, sequence_column=sequence_column)
        self._seq_length, self._both_strands = seq_length, both_strands
        self._windows = windows_with_labels(self._rows, seq_length, both_sides=both_strands)
        super().__init__(len(self._windows), multiple)

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
