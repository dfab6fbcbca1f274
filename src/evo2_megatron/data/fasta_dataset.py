# SPDX-License-Identifier: Apache-2.0
"""The records of a FASTA file as samples to score, whole or in windows."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import Dataset

from evo2_megatron.config import UserError
from evo2_megatron.data.fasta import FastaIndex, decode_header
from evo2_megatron.data.genome import Genome
from evo2_megatron.data.nucleotides import letter_of_no_base, reverse_complement
from evo2_megatron.data.phylogenetic_mask import PIPE, phylogenetic_tag_mask
from evo2_megatron.data.record_windows import Windows
from evo2_megatron.data.tokenizer import EOD, encode_sequence

_CHECKED_AT_ONCE = 1 << 20


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
        self.no_dna: dict[str, str] = {}
        """Names of records with a letter that no DNA has, and the letter."""
        for i in range(len(self._index)):
            tokens = self._encode(i)
            if letter := letter_of_no_base(tokens):
                self.no_dna[self.ids[i]] = letter
            if not tokens:
                raise UserError(f"{self._name(i)} has no bases; remove it")
            self.lengths.append(len(tokens) + prepend_bos)
        self.num_bases = [length - prepend_bos for length in self.lengths]
        """Characters per record, those of lineage tags among them."""
        self.windows = Windows(max(self.num_bases), 0)
        """Each record is one."""

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
        return self._sample(index, _opposite_strand(self._encode(index), name=self._name(index)))

    def _sample(self, index: int, ids: bytes) -> dict[str, Tensor]:
        return make_sample(ids, index, prepend_bos=self._prepend_bos, mask_tags=self._mask_tags)

    def samples_of(self, record: int) -> range:
        """Numbers of the samples of a record."""
        return range(record, record + 1)

    def record_of(self, index: int) -> int:
        """Number of the record that a sample is of."""
        return index

    def bases(self, record: int, start: int, end: int) -> bytes:
        """Bases of a record from ``start`` to ``end``, 0-based, as the file has them."""
        return self._index.sequence(record)[start:end]

    def _name(self, index: int) -> str:
        return f"record '{self.ids[index]}' of {self._index.path}"

    def _encode(self, index: int) -> bytes:
        return _to_ids(self._index.sequence(index), keep_tag_case=self._keep_tag_case, name=self._name(index))


class WindowDataset(Dataset):
    """One sample per window of a record, made when it is asked for: of a long record, memory holds a window.

    The windows of the opposite strand begin at the record's end. Their lengths are those of the forward strand's, so
    that sample ``i`` of both strands has as many tokens and scores as many bases.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        windows: Windows,
        *,
        prepend_bos: bool = False,
        keep_tag_case: bool = False,
    ) -> None:
        """Find and check every record; close the dataset, or use it in a ``with`` statement.

        Args:
            path, prepend_bos, keep_tag_case: As for ``FastaDataset``; token 0 is in front of every window.
            windows: Where records are cut.

        Raises:
            UserError: As ``FastaDataset``, or a record that is cut has a lineage tag.
        """
        self.windows, self._path = windows, os.fspath(path)
        self._prepend_bos, self._keep_tag_case = prepend_bos, keep_tag_case
        self._genome = Genome(path)
        with contextlib.ExitStack() as on_error:
            on_error.enter_context(self._genome)
            contigs = self._genome.lengths
            self._contigs, self.num_bases = list(contigs), list(contigs.values())
            self.ids = [decode_header(contig) for contig in self._contigs]
            self.no_dna: dict[str, str] = {}  # as of FastaDataset
            for record in range(len(self.ids)):
                self._check(record)
            on_error.pop_all()
        self._first = [0, *accumulate(map(windows.count, self.num_bases))]
        self.lengths = [
            span.end - span.start + prepend_bos
            for num_bases in self.num_bases
            for span in (windows.span(number, num_bases) for number in range(windows.count(num_bases)))
        ]
        """Tokens per sample, with the prepended one."""

    def __enter__(self) -> WindowDataset:
        return self

    def __exit__(self, *error: object) -> None:
        self._genome.__exit__(*error)

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample, unpadded: as ``FastaDataset`` gives it, with ``loss_mask`` 0 for context, too."""
        return self._window(index, opposite=False)

    def opposite_strand(self, index: int) -> dict[str, Tensor]:
        """The window of the same number of the reverse complement of the record."""
        return self._window(index, opposite=True)

    def samples_of(self, record: int) -> range:
        """Numbers of the samples of a record, in the order of its windows."""
        return range(self._first[record], self._first[record + 1])

    def record_of(self, index: int) -> int:
        """Number of the record that a sample is of."""
        return bisect_right(self._first, index) - 1

    def bases(self, record: int, start: int, end: int) -> bytes:
        """Bases of a record from ``start`` to ``end``, 0-based, as the file has them."""
        return self._genome.bases(self._contigs[record], start, end)

    def _window(self, index: int, *, opposite: bool) -> dict[str, Tensor]:
        record = self.record_of(index)
        num_bases = self.num_bases[record]
        span = self.windows.span(index - self._first[record], num_bases)
        start, end = (num_bases - span.end, num_bases - span.start) if opposite else (span.start, span.end)
        ids = self._encode(record, start, end)
        if opposite:
            ids = _opposite_strand(ids, name=self._name(record))
        sample = make_sample(ids, index, prepend_bos=self._prepend_bos)
        sample["loss_mask"][: self._prepend_bos + span.num_context] = 0
        return sample

    def _check(self, record: int) -> None:
        num_bases = self.num_bases[record]
        if not num_bases:
            raise UserError(f"{self._name(record)} has no bases; remove it")
        for start in range(0, num_bases, _CHECKED_AT_ONCE):
            ids = self._encode(record, start, min(start + _CHECKED_AT_ONCE, num_bases))
            if letter := letter_of_no_base(ids):
                self.no_dna.setdefault(self.ids[record], letter)
            if PIPE in ids and num_bases > self.windows.length:
                raise UserError(
                    f"{self._name(record)} has a lineage tag, which only one of its windows would see; remove it, or "
                    "score the record whole"
                )

    def _name(self, record: int) -> str:
        return f"record '{self.ids[record]}' of {self._path}"

    def _encode(self, record: int, start: int, end: int) -> bytes:
        return _to_ids(self.bases(record, start, end), keep_tag_case=self._keep_tag_case, name=self._name(record))


def _to_ids(sequence: bytes, *, keep_tag_case: bool, name: str) -> bytes:
    return encode_sequence(upper_bases(sequence) if keep_tag_case else sequence.upper(), name=name)


def tag_length(sequence: bytes) -> int:
    """Characters of the lineage tag in front, with both its pipes; 0: there is none."""
    return sequence.find(b"|", 1) + 1 if sequence.startswith(b"|") else 0


def _opposite_strand(ids: bytes, *, name: str) -> bytes:
    start = tag_length(ids)
    if b"|" in ids[start:]:
        raise UserError(f"{name} has a lineage tag after its first base; score one strand only")
    return ids[:start] + reverse_complement(ids[start:])


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
