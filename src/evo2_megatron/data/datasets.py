# SPDX-License-Identifier: Apache-2.0
"""Training samples: windows of packed documents from Megatron's indexed datasets, with the mask of what is scored."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor

from evo2_megatron.data.phylogenetic_mask import id_table, phylogenetic_tag_mask
from evo2_megatron.ops.casing import to_upper

_DNA = id_table("ACGTacgt")
_INDEX_FILES = ("description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy")


@dataclass
class Evo2DatasetConfig(GPTDatasetConfig):
    """Megatron's settings of a packed dataset, and where the index of its samples is kept."""

    index_cache_dir: str | None = None
    """Folder for the sample index; None: ``<prefix>/cache/<class>_indices``, next to the data."""


def scored_labels(labels: Tensor, eod: int = 0) -> Tensor:
    """Which labels [length] count in the loss: A, C, G and T in either case, outside lineage tags. Boolean."""
    ids = labels.numpy()
    return torch.from_numpy(_DNA[ids] & phylogenetic_tag_mask(ids, eod=eod))


class Evo2Dataset(GPTDataset):
    """Windows of ``sequence_length + 1`` tokens over the shuffled, concatenated documents.

    A sample holds ``tokens`` (int64, upper case: what the model reads), ``labels`` (int64, case kept: the loss weighs
    lower case), ``loss_mask`` (float32, see ``scored_labels``) and ``position_ids`` (int64), all [sequence_length].
    """

    keep_eod_mask = False

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """Sample number ``idx``; None gives a sample of the same shape that is not scored."""
        sample = super().__getitem__(idx)
        if idx is not None:
            scored = scored_labels(sample["labels"], self.config.tokenizer.eod).float()
            sample["loss_mask"] = sample["loss_mask"] * scored if self.keep_eod_mask else scored
        sample["tokens"] = to_upper(sample["tokens"])
        return sample

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Build the index on rank 0, or load it; upstream's, with two differences.

        Its cache key does not see the data, so a rewritten dataset would meet the index of the old one: the key gets
        the lengths of the documents. And it writes files under their final names, so a process that is killed leaves
        half an index behind: they are written beside and renamed.
        """
        name = type(self).__name__
        lengths = np.ascontiguousarray(self.dataset.sequence_lengths)
        self.unique_identifiers["sequence_lengths"] = hashlib.md5(lengths, usedforsecurity=False).hexdigest()
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda part: part.unique_identifiers
        )
        description = self.unique_description.encode()
        self.unique_description_hash = hashlib.md5(description, usedforsecurity=False).hexdigest()

        folder = Path(self.config.index_cache_dir or f"{self.dataset.path_prefix}/cache/{name}_indices")
        stem = f"{self.unique_description_hash}-{name}-{self.index_split.name}"
        paths = [folder / f"{stem}-{file}" for file in _INDEX_FILES]
        builds = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self.config = copy.copy(self.config)  # it is shared by the datasets of a blend
        if builds and not all(path.is_file() for path in paths):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as self.config.path_to_cache:
                super()._build_document_sample_shuffle_indices()
                for path in paths:
                    Path(self.config.path_to_cache, path.name).replace(path)
        self.config.path_to_cache = str(folder)
        return super()._build_document_sample_shuffle_indices()


class Evo2DatasetPadEodLossMask(Evo2Dataset):
    """The same, but a base whose input is an end of document is not scored; one behind padding is."""

    keep_eod_mask = True
