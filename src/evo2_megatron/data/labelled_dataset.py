# SPDX-License-Identifier: Apache-2.0
"""Labelled sequences as samples of one length.

Shape legend: B sequences, L tokens, T columns of labels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from evo2_megatron.data.labelled import Labels, read_labelled
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.data.tokenizer import PAD

logger = logging.getLogger(__name__)


class LabelledSequences(Dataset):
    """Samples: ``tokens`` (int64 [L], padded at the end), ``pool_mask`` (bool [L]), ``targets`` (float32 [T])."""

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
        self._num_samples = len(self._rows.ids) * self._num_strands
        self._num_filled = -(-self._num_samples // multiple) * multiple
        num_cut = sum(len(ids) > seq_length for ids in self._rows.ids)
        if num_cut:
            logger.warning("%s: %d sequences are cut to %d bases", path, num_cut, seq_length)

    def __len__(self) -> int:
        return self._num_filled

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row, strand = divmod(number % self._num_samples, self._num_strands)
        ids = self._rows.ids[row][: self._seq_length]
        tokens, pool_mask = pad([reverse_complement(ids) if strand else ids], self._seq_length)
        targets = torch.from_numpy(self._rows.targets[row])
        if number >= self._num_samples:
            targets = torch.full_like(targets, torch.nan)
        return {"tokens": tokens[0], "pool_mask": pool_mask[0], "targets": targets}


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
