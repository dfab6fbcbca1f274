# SPDX-License-Identifier: Apache-2.0
"""Schema of the dataset YAML of ``train_evo2 --dataset-config``: which files make up which split, in what ratio."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evo2_megatron.config import UserError
from evo2_megatron.data.indexed_dataset import check_indexed_dataset
from evo2_megatron.data.yaml_schema import check_fields, expand_home, read_yaml_list

SPLITS = ("train", "validation", "test")


class Blend(NamedTuple):
    """Datasets of one split and the ratio in which they are drawn from."""

    prefixes: list[str]
    """Absolute paths without ``.bin`` and ``.idx``."""

    weights: list[float]
    """One per prefix; their sum is 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlendEntry:
    """One entry of the file. Field names are the keys of the YAML."""

    dataset_prefix: str
    """Path without ``.bin`` and ``.idx``; a relative one starts at the dataset directory."""

    dataset_weight: float
    """Share of this dataset in its split, relative to the others of the split; above 0."""

    dataset_split: str
    """One of ``SPLITS``; the whole dataset belongs to it."""

    def __post_init__(self) -> None:
        if not 0 < self.dataset_weight < math.inf:
            raise UserError(f"dataset_weight is {self.dataset_weight:g}; it must be above 0, or remove the entry")
        if self.dataset_split not in SPLITS:
            raise UserError(f"dataset_split is '{self.dataset_split}'; use one of {', '.join(SPLITS)}")
        if self.dataset_prefix.endswith((".bin", ".idx")):
            raise UserError(f"dataset_prefix is '{self.dataset_prefix}'; leave off the ending")


def read_blends(
    config_path: str | os.PathLike[str],
    *,
    dataset_dir: str | os.PathLike[str] | None = None,
    required: Collection[str] = SPLITS,
) -> dict[str, Blend]:
    """Read the dataset YAML and check that every file it names is there and whole.

    Args:
        config_path: The YAML file, a list of mappings with the fields of ``BlendEntry``.
        dataset_dir: Where relative prefixes start; None: the current directory.
        required: Splits that must have at least one dataset.

    Returns:
        A blend for each split that occurs.

    Raises:
        UserError: The file, or a dataset it names, is missing or wrong; or a required split has no dataset.
    """
    base = Path(dataset_dir or ".").absolute()
    if not base.is_dir():
        raise UserError(f"no such dataset directory: {dataset_dir}")
    by_split: dict[str, list[tuple[str, float]]] = {}
    for number, values in enumerate(read_yaml_list(config_path), 1):
        try:
            entry = _entry(values)
            prefix = str(base / expand_home(entry.dataset_prefix))
            check_indexed_dataset(prefix)
        except UserError as error:
            raise UserError(f"{config_path}, entry {number}: {error}") from None
        by_split.setdefault(entry.dataset_split, []).append((prefix, entry.dataset_weight))
    missing = [split for split in required if split not in by_split]
    if missing:
        raise UserError(
            f"{config_path} has no dataset for {' and '.join(missing)}; add an entry with that dataset_split"
        )
    blends = {}
    for split, pairs in by_split.items():
        total = sum(weight for _, weight in pairs)
        blends[split] = Blend([prefix for prefix, _ in pairs], [weight / total for _, weight in pairs])
    return blends


def _entry(values: dict) -> BlendEntry:
    checked = check_fields(BlendEntry, values)
    missing = [name for name in BlendEntry.__slots__ if name not in checked]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing")
    return BlendEntry(**checked)
