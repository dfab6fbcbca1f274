# SPDX-License-Identifier: Apache-2.0
"""The records of a FASTA file as samples to score."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils.data import Dataset

from evo2_megatron.config import UserError
from evo2_megatron.data.fasta import FastaIndex
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.data.phylogenetic_mask import phylogenetic_tag_mask
from evo2_megatron.data.tokenizer import EOD, encode_sequence


class FastaDataset(Dataset):
    """One sample per record, in the order of the file; tokens are made when a sample is asked for."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        prepend_bos: bool = False,
        mask_tags: bool = False,
        keep_tag_case: bool = False,
    ) -> None:
        """Find and check every record.

        Everything is upper-cased, as what models read in training was; lineage tags, too.

        Args:
            path: FASTA, plain or gzip, with unique names.
            prepend_bos: Begin every sample with token 0 (EOD), which separated documents in training, so that the
                first base is scored too.
            mask_tags: Take lineage tags out of ``loss_mask``.
            keep_tag_case: Leave the case of lineage tags, text between pipes that contains ``_`` or ``;``.

        Raises:
            UserError: The file is no FASTA, two records share a name, one is empty, or one holds a character that has
                no token.
        """
        self._index = FastaIndex(path)
        self._prepend_bos = prepend_bos
        self._mask_tags = mask_tags
        self._keep_tag_case = keep_tag_case
        self.lengths: list[int] = []
        """Tokens per sample, with the prepended one."""
        for i in range(len(self._index)):
            tokens = self._encode(i)
            if not tokens:
                raise UserError(f"{self._name(i)} has no bases; remove it")
            self.lengths.append(len(tokens) + prepend_bos)

    @property
    def ids(self) -> list[str]:
        """Names of the records; a sample's ``seq_idx`` is its position here."""
        return self._index.ids

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample, unpadded.

        Returns:
            ``tokens``, ``position_ids`` and ``loss_mask`` (1: scored when it is the target; 0: prepended or masked),
            all int64 [length]; ``seq_idx``, int64 scalar.
        """
        return self._sample(index, self._encode(index))

    def opposite_strand(self, index: int) -> dict[str, Tensor]:
        """The sample of the reverse complement; a lineage tag in front stays there, as it is.

        Raises:
            UserError: A lineage tag stands elsewhere.
        """
        sequence = self._encode(index)
        start = sequence.find(b"|", 1) + 1 if sequence.startswith(b"|") else 0
        if b"|" in sequence[start:]:
            raise UserError(f"{self._name(index)} has a lineage tag after its first base; score one strand only")
        return self._sample(index, sequence[:start] + reverse_complement(sequence[start:]))

    def _sample(self, index: int, ids: bytes) -> dict[str, Tensor]:
        return make_sample(ids, index, prepend_bos=self._prepend_bos, mask_tags=self._mask_tags)

    def sequence(self, index: int) -> bytes:
        """Bases of one record as the file has them."""
        return self._index.sequence(index)

    def _name(self, index: int) -> str:
        return f"record '{self.ids[index]}' of {self._index.path}"

    def _encode(self, index: int) -> bytes:
        sequence = self.sequence(index)
        sequence = upper_bases(sequence) if self._keep_tag_case else sequence.upper()
        return encode_sequence(sequence, name=self._name(index))


def make_sample(ids: bytes, index: int, *, prepend_bos: bool = False, mask_tags: bool = False) -> dict[str, Tensor]:
    """One sample, as ``FastaDataset`` gives it.

    Args:
        ids: Of ``encode_sequence``.
        index: For ``seq_idx``.
        prepend_bos, mask_tags: As for ``FastaDataset``.
    """
    prefix = bytes([EOD]) if prepend_bos else b""
    tokens = torch.frombuffer(bytearray(prefix + ids), dtype=torch.uint8).long()
    loss_mask = torch.ones_like(tokens)
    if mask_tags:
        loss_mask[:] = torch.from_numpy(phylogenetic_tag_mask(tokens.numpy(), eod=EOD))
    loss_mask[: len(prefix)] = 0
    return {
        "tokens": tokens,
        "position_ids": torch.arange(len(tokens)),
        "loss_mask": loss_mask,
        "seq_idx": torch.tensor(index),
    }


def upper_bases(sequence: bytes) -> bytes:
    """Bases in upper case; lineage tags between pipes as they are."""
    if b"|" not in sequence:
        return sequence.upper()
    parts = sequence.split(b"|")
    return b"|".join(part if b"_" in part or b";" in part else part.upper() for part in parts)
