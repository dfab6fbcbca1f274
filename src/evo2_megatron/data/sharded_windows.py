# SPDX-License-Identifier: Apache-2.0
"""Training samples from windows of contigs that are kept in SQLite databases, one for each sequenced sample."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from evo2_megatron.config import UserError
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.data.phylogenetic_mask import CONTROL_TAGS
from evo2_megatron.data.tokenizer import BOS, EOD, PAD, SEP, encode_sequence
from evo2_megatron.data.window_database import SequenceDatabases, WindowDatabase

_BASES = torch.tensor(list(b"ACGT"))
_UNSCORED_BEFORE = torch.tensor([EOD, PAD, BOS, SEP, *map(ord, CONTROL_TAGS)])
_32_BITS = 0xFFFFFFFF


class ShardedWindows(Dataset):
    """One window per sample, in upper case, ``num_samples`` of them: as many rounds through the windows as that takes.

    A sample is BOS, then the window's bases; EOS (0) follows where the contig ends within the window, and PAD fills
    the rest. Labels are the next tokens; A, C, G and T are scored.
    """

    def __init__(
        self,
        windows: WindowDatabase,
        sequences: SequenceDatabases,
        *,
        num_samples: int,
        seq_length: int,
        seed: int,
        shuffle: bool = False,
        reverse_complement: bool = False,
        former_layout: bool = False,
    ) -> None:
        """Set up, and look at the first and the last window.

        Args:
            windows: What to read; its windows must be as long as ``seq_length``.
            sequences: Where the bases are.
            num_samples: Length of the dataset.
            seq_length: Tokens per sample.
            seed: Of the order and of the strands. A sample depends on it and on its number only.
            shuffle: Every round has an order of its own; otherwise all are in the order of the database.
            reverse_complement: Read the opposite strand of half of the samples.
            former_layout: BOS, the first ``seq_length - 2`` bases and EOS, wherever the contig ends, and N and IUPAC
                codes are scored, as by the former loader.

        Raises:
            UserError: The windows have another length, or those looked at cannot be read.
        """
        if windows.plan.window_size != seq_length:
            raise UserError(
                f"the windows have {windows.plan.window_size} bases and samples {seq_length} tokens; "
                "make them equal, for example with --seq-length"
            )
        self._windows, self._sequences = windows, sequences
        self._num_samples, self._seq_length = num_samples, seq_length
        self._seed, self._shuffle = seed, shuffle
        self._reverse_complement, self._former_layout = reverse_complement, former_layout
        rounds = -(-num_samples // len(windows))
        self._round_seeds = np.random.default_rng(seed).integers(0, 2**31 - 1, size=rounds)
        for number in {0, len(windows) - 1}:
            self._read(number)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (float32), all [seq_length]."""
        if not 0 <= idx < self._num_samples:
            raise IndexError(f"sample {idx} of {self._num_samples}")
        bases, at_start, at_end = self._read(self.window_number(idx))
        if self._reverse_complement and np.random.default_rng((self._seed, idx)).integers(2):
            bases, at_end = reverse_complement(bases), at_start
        text = [BOS, *bases]
        if self._former_layout:
            text = [*text[: self._seq_length - 1], EOD]
        elif at_end:
            text.append(EOD)
        text = (text + [PAD] * (self._seq_length + 1 - len(text)))[: self._seq_length + 1]
        tokens = torch.tensor(text)
        labels = tokens[1:]
        former = self._former_layout
        is_scored = ~torch.isin(labels, _UNSCORED_BEFORE) if former else torch.isin(labels, _BASES)
        return {
            "tokens": tokens[:-1],
            "labels": labels,
            "loss_mask": is_scored.float(),
            "position_ids": torch.arange(self._seq_length),
        }

    def window_number(self, idx: int) -> int:
        """Window of a sample."""
        epoch, number = divmod(idx, len(self._windows))
        return permute(number, len(self._windows), int(self._round_seeds[epoch])) if self._shuffle else number

    def _read(self, number: int) -> tuple[bytes, bool, bool]:
        """Bases of a window, and whether the contig starts and ends with it."""
        contig, start = self._windows.window(number)
        size = self._windows.plan.window_size
        text = self._sequences.bases(contig, start, size + 1)
        if not text:
            raise UserError(f"contig '{contig}' has no base {start}; were the windows made from other data?")
        bases = encode_sequence(text.encode().upper(), name=f"contig '{contig}'")
        return bases[:size], start == 0, len(bases) <= size


def permute(number: int, length: int, seed: int) -> int:
    """Place of ``number`` in a shuffle of ``range(length)``, without the memory of a list.

    The hash and its constants are those of A. Kensler, Correlated Multi-Jittered Sampling, Pixar technical memo 13-01
    (2013); ``length`` is at most 2**32.
    """
    mask = (1 << (length - 1).bit_length()) - 1
    i, p = number, seed
    while True:
        i = (i ^ p) * 0xE170893D & _32_BITS
        i ^= p >> 16
        i ^= (i & mask) >> 4
        i = (i ^ p >> 8) * 0x0929EB3F & _32_BITS
        i ^= p >> 23
        i ^= (i & mask) >> 1
        i = i * (1 | p >> 27) & _32_BITS
        i = i * 0x6935FA69 & _32_BITS
        i = (i ^ (i & mask) >> 11) * 0x74DCB303 & _32_BITS
        i = (i ^ (i & mask) >> 2) * 0x9E501CC3 & _32_BITS
        i = (i ^ (i & mask) >> 2) * 0xC860A3DF & _32_BITS
        i &= mask
        i ^= i >> 5
        if i < length:
            return (i + p) % length
