# SPDX-License-Identifier: Apache-2.0
"""What Megatron Bridge asks for training data: settings that go into run_config.yaml and build the three datasets.

Call ``evo2_megatron.runtime.megatron.enter`` before importing this.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron.bridge.training.config import DatasetBuildContext, DatasetProvider
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from torch.utils.data import Dataset

from evo2_megatron.config import UserError
from evo2_megatron.data.blend import SPLITS, Blend, read_blends
from evo2_megatron.data.datasets import Evo2Dataset, Evo2DatasetConfig, Evo2DatasetPadEodLossMask
from evo2_megatron.data.labelled_dataset import LabelledBases, LabelledSequences
from evo2_megatron.data.labels import Labels, Task
from evo2_megatron.data.mock import MockEvo2Dataset
from evo2_megatron.data.sharded_windows import ShardedWindows
from evo2_megatron.data.window_database import SequenceDatabases, open_windows

Datasets = tuple[Dataset | None, Dataset | None, Dataset | None]
"""Training, validation and test; None where no samples are wanted."""


@dataclass(kw_only=True)
class Evo2DatasetProvider(DatasetProvider):
    """Indexed datasets, blended as a YAML file says."""

    dataset_config_path: str
    """The YAML file, see ``evo2_megatron.data.blend``."""

    seq_length: int
    """Tokens per sample."""

    dataset_dir: str | None = None
    """Where relative prefixes of the YAML start; None: the current directory."""

    random_seed: int = 1234
    """Seed of the order of documents and samples."""

    eod_mask_loss: bool = False
    """Do not score the first base after the end of a document."""

    index_cache_dir: str | None = None
    """Folder for the index of the samples, shared by all processes; None: next to each dataset."""

    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = "single"

    create_attention_mask = False  # no field: Megatron Bridge asks, and there is only one answer

    def build_datasets(self, context: DatasetBuildContext) -> Datasets:
        """Build the datasets; every process must call this.

        Raises:
            UserError: A dataset is missing or damaged, or the index cannot be written.
        """
        samples = _num_samples(context)
        wanted = [split for split in SPLITS if samples[split]]
        blends = read_blends(self.dataset_config_path, dataset_dir=self.dataset_dir, required=wanted)
        blends = {split: blends[split] for split in wanted}
        self._check_cache_folders(blends)
        config = Evo2DatasetConfig(
            random_seed=self.random_seed,
            sequence_length=self.seq_length,
            blend_per_split=[tuple(blends[split]) if split in blends else None for split in SPLITS],
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=self.eod_mask_loss,
            create_attention_mask=False,
            tokenizer=context.tokenizer,
            index_cache_dir=self.index_cache_dir,
        )
        dataset_class = Evo2DatasetPadEodLossMask if self.eod_mask_loss else Evo2Dataset
        train, valid, test = BlendedMegatronDatasetBuilder(
            dataset_class, list(samples.values()), lambda: True, config
        ).build()
        return train, valid, test

    def _check_cache_folders(self, blends: dict[str, Blend]) -> None:
        """A process that cannot write would leave the others waiting for it: all of them look first."""
        folders = [self.index_cache_dir] if self.index_cache_dir else [p for b in blends.values() for p in b.prefixes]
        for folder in folders:
            existing = Path(folder).absolute()
            while not existing.is_dir():
                existing = existing.parent
            if not os.access(existing, os.W_OK):
                raise UserError(
                    f"cannot write the sample index under {existing}; set index_cache_dir to a writable folder"
                )


@dataclass(kw_only=True)
class ShardedWindowsProvider(DatasetProvider):
    """Windows of contigs in SQLite databases."""

    sequence_db_dir: str
    """Folder of the samples' sequence databases."""

    train_window_db: str
    """Which windows make up the training split."""

    seq_length: int
    """Tokens per sample; the windows must have as many bases."""

    valid_window_db: str | None = None
    """The same for validation; needed if there is any."""

    test_window_db: str | None = None
    """The same for testing."""

    stride: int | None = None
    """Bases between the starts of windows, which the databases must have been made with; None: any."""

    min_length: int | None = None
    """Fewest bases of a window, which the databases must have been made with; None: any."""

    reverse_complement: bool = False
    """Read the opposite strand of half of the training samples."""

    former_layout: bool = False
    """End every window with EOS, as the former loader did; see ``ShardedWindows``."""

    random_seed: int = 1234

    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = "single"

    create_attention_mask = False

    def build_datasets(self, context: DatasetBuildContext) -> Datasets:
        """Open the databases; training is shuffled, and the other two are in the order of their database.

        Raises:
            UserError: A database is missing, damaged, or was made for something else.
        """
        sequences = SequenceDatabases(self.sequence_db_dir)
        paths = {"train": self.train_window_db, "validation": self.valid_window_db, "test": self.test_window_db}
        train, valid, test = (
            ShardedWindows(
                open_windows(paths[split], stride=self.stride, min_length=self.min_length),
                sequences,
                num_samples=num,
                seq_length=self.seq_length,
                seed=self.random_seed,
                shuffle=split == "train",
                reverse_complement=self.reverse_complement and split == "train",
                former_layout=self.former_layout,
            )
            if num
            else None
            for split, num in _num_samples(context).items()
        )
        return train, valid, test


@dataclass(kw_only=True)
class MockEvo2DatasetProvider(DatasetProvider):
    """Random nucleotides."""

    seq_length: int
    """Tokens per sample."""

    random_seed: int = 1234

    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = "single"

    create_attention_mask = False

    def build_datasets(self, context: DatasetBuildContext) -> Datasets:
        """Build the datasets; no files are read or written."""
        train, valid, test = (
            MockEvo2Dataset(num, self.seq_length, seed=self.random_seed, split=number) if num else None
            for number, num in enumerate(_num_samples(context).values())
        )
        return train, valid, test


@dataclass(kw_only=True)
class LabelledSequencesProvider(DatasetProvider):
    """Sequences with labels, for a prediction head."""

    train_data: str
    """Table, see ``evo2_megatron.data.labelled``; the others likewise."""

    seq_length: int
    """Tokens per sample."""

    task: Task
    label_columns: list[str]
    classes: list[str]
    sequence_column: str
    val_data: str | None = None
    test_data: str | None = None
    per_base: bool = False
    """Whether each base has labels."""

    both_strands: bool = False
    """Every sequence is two samples, itself and its reverse complement; with labels per base, one sample has both."""

    samples_at_once: int = 1
    """Of all processes together. To a multiple of this, training data are filled up with what does not count: Bridge
    would leave the last ones out in every pass."""

    global_batch_size: int = 1
    """To a multiple of this, validation and test data are filled up likewise: each sample is seen once."""

    num_samples: list[int] | None = None
    """Of the three, before they are filled up: for who goes on with a run."""

    data_digests: dict[str, str] | None = None
    """Of sequences and labels by ``train``, ``val`` and ``test``, likewise."""

    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = "cyclic"
    """In another order in every pass."""

    def build_datasets(self, context: DatasetBuildContext) -> Datasets:
        """Read the tables; every process must call this."""
        valid, test = (path and self._read(path, self.global_batch_size) for path in (self.val_data, self.test_data))
        return self.training_data(), valid, test

    def training_data(self) -> LabelledSequences | LabelledBases:
        """Read the table of training alone."""
        return self._read(self.train_data, self.samples_at_once)

    @property
    def labels(self) -> Labels:
        """What is read of the tables."""
        return Labels(
            task=self.task, columns=tuple(self.label_columns), classes=tuple(self.classes), per_base=self.per_base
        )

    def _read(self, path: str, multiple: int) -> LabelledSequences | LabelledBases:
        kind = LabelledBases if self.per_base else LabelledSequences
        return kind(
            Path(path),
            self.labels,
            sequence_column=self.sequence_column,
            seq_length=self.seq_length,
            both_strands=self.both_strands,
            multiple=multiple,
        )


def _num_samples(context: DatasetBuildContext) -> dict[str, int]:
    return dict(zip(SPLITS, (context.train_samples, context.valid_samples, context.test_samples), strict=True))
