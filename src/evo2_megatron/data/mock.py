# SPDX-License-Identifier: Apache-2.0
"""Random nucleotides in the form of training samples, to try a training command without data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

_BASES = np.frombuffer(b"ACGT", dtype=np.uint8).astype(np.int64)


class MockEvo2Dataset(Dataset):
    """Uniform A, C, G, T; a sample depends on seed, split and its number only.

    No model does better on it than ln 4 = 1.386 nats per base.
    """

    def __init__(self, num_samples: int, seq_length: int, *, seed: int, split: int) -> None:
        """``seq_length``: bases per sample. ``split``: 0, 1, 2 for training, validation, test."""
        self.num_samples = num_samples
        self.seq_length = seq_length
        self._seed = (seed, split)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (float32), all [seq_length]."""
        if not 0 <= idx < self.num_samples:
            raise IndexError(f"sample {idx} of {self.num_samples}")
        bases = _BASES[np.random.default_rng((*self._seed, idx)).integers(0, 4, size=self.seq_length + 1)]
        text = torch.from_numpy(bases)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }
