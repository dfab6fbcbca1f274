# SPDX-License-Identifier: Apache-2.0
"""Over how many GPUs ``--devices auto`` divides a model whose weights are too much for one."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evo2_megatron.checkpoint.adapter import base_checkpoint
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.load import precision_of, provider_of, stored_shapes
from evo2_megatron.checkpoint.names import is_weight
from evo2_megatron.checkpoint.run_config import RunConfig, read_run_config
from evo2_megatron.config import ParallelConfig, UserError, WeightFormat
from evo2_megatron.ops.int4 import BYTES_PER_WEIGHT
from evo2_megatron.recipes.options import LORA_TARGETS
from evo2_megatron.runtime import megatron

logger = logging.getLogger(__name__)

SHARE_OF_WEIGHTS = 0.75
"""Of a GPU's memory; the rest is for activations and caches: of 8,192 bases, 2.4 GB in the largest model."""


def tensor_parallel_size(
    ckpt_dir: Path,
    *,
    base_ckpt_dir: Path | None,
    precision: str | None,
    quantize_weights: WeightFormat | None,
    num_gpus: int,
    gpu_bytes: int,
) -> int:
    """The fewest GPUs over which a model can be divided so that its weights take ``SHARE_OF_WEIGHTS`` of each.

    Args:
        ckpt_dir: Checkpoint, or a folder of them.
        base_ckpt_dir: Of LoRA adapters: where their base is now; None: where it was in training.
        precision: Name of a recipe; None: the checkpoint's.
        quantize_weights: What linear layers keep their weights in; None: as the checkpoint was trained.
        num_gpus: GPUs that there are.
        gpu_bytes: Memory of the smallest.

    Raises:
        UserError: No checkpoint, or not even ``num_gpus`` hold the model.
    """
    megatron.enter()
    checkpoint = resolve_checkpoint_path(ckpt_dir)
    run_config = read_run_config(checkpoint)
    stored = stored_shapes(base_checkpoint(checkpoint, run_config, base_ckpt_dir))
    needed = weight_bytes(run_config, stored, precision=precision, quantize_weights=quantize_weights)
    overrides = {} if quantize_weights is None else {"quantize_weights": quantize_weights}
    for size in range(math.ceil(needed / (SHARE_OF_WEIGHTS * gpu_bytes)), num_gpus + 1):
        if _divides(run_config, stored, size, overrides):
            if size > 1:
                logger.info("The weights take %.1f GB and are divided over %d GPUs", needed / 1e9, size)
            return size
    raise UserError(
        f"the weights of {checkpoint} take {needed / 1e9:.1f} GB, and {num_gpus} GPUs of {gpu_bytes / 1e9:.1f} GB "
        "cannot hold them; take --quantize-weights, larger GPUs, or several machines with torchrun"
    )


def weight_bytes(
    run_config: RunConfig,
    stored: Mapping[str, tuple[int, ...]],
    *,
    precision: str | None = None,
    quantize_weights: WeightFormat | None = None,
) -> int:
    """Memory of a model's weights, without LoRA adapters.

    Args:
        run_config: What says how it is run.
        stored: Names and shapes of a checkpoint of the whole model.
        precision, quantize_weights: As for ``tensor_parallel_size``.
    """
    _, settings = precision_of(run_config, precision)
    if quantize_weights is None:
        quantize_weights = run_config.model.get("quantize_weights", "none")
    wide = settings.params_dtype.itemsize
    narrow = tuple(f".{name}.weight" for name in LORA_TARGETS)
    per_weight = {"none": wide, "int8": 1, "int4": BYTES_PER_WEIGHT}[quantize_weights]
    return math.ceil(
        sum(
            math.prod(shape) * (per_weight if name.endswith(narrow) else wide)
            for name, shape in stored.items()
            if is_weight(name)
        )
    )


def _divides(
    run_config: RunConfig, stored: Mapping[str, tuple[int, ...]], size: int, overrides: dict[str, Any]
) -> bool:
    try:
        provider_of(run_config, stored, ParallelConfig(tensor=size), overrides).finalize()
    except UserError:
        return False
    return True
