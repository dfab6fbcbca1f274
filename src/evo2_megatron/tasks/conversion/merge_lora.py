# SPDX-License-Identifier: Apache-2.0
"""Make one whole model of LoRA adapters and the base model that they belong to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evo2_megatron.architectures import Architecture
from evo2_megatron.checkpoint import distcp, layout
from evo2_megatron.checkpoint.adapter import base_checkpoint, merged_tensors
from evo2_megatron.checkpoint.load import find_tokenizer, language_model_config, load_model
from evo2_megatron.checkpoint.run_config import RunConfig, read_run_config
from evo2_megatron.checkpoint.write import describe_as, new_checkpoint
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.runtime import megatron
from evo2_megatron.runtime.distributed import process_groups
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.conversion.verify_logits import LENGTHS, compare, random_dna
from evo2_megatron.tasks.transfer import check_space, disk_errors, moving

logger = logging.getLogger(__name__)

MAX_ROUNDED_RMS = 0.02
"""Of the difference of logits where merged matrices are rounded to 16 bits, over that of the logits: five times what a
number in bfloat16 can be off by."""


@disk_errors()
def merge_lora(
    ckpt_dir: Path,
    target: Path,
    *,
    base_ckpt_dir: Path | None = None,
    float32: bool = False,
    verify: bool = False,
    with_self_test: bool | None = None,
) -> Path:
    """Write a checkpoint with ``W + alpha / dim * B A`` in place of every adapted matrix W.

    Each tensor keeps the number format that it has in the base. The sum is taken in float32 and rounded once. Memory
    does not grow with the model.

    Args:
        ckpt_dir: A checkpoint of a LoRA run, or the folder of its checkpoints (the newest is taken).
        target: Folder to write to; the checkpoint keeps its name in it.
        base_ckpt_dir: Where the base is now; None: where it was in training.
        float32: Store the merged matrices in float32, so that they are not rounded.
        verify: Compare the logits of the result with those of base and adapters, in float32.
        with_self_test: Score fixed sequences and store the result for ``--self-test``; None: if the weights are
            small.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: No such checkpoint, no adapters in it, tensors that do not fit, or something is in the way.
    """
    checkpoint = layout.resolve_checkpoint_path(ckpt_dir)
    run_config = language_model_config(checkpoint)
    if not run_config.is_lora:
        raise UserError(f"{checkpoint} is a whole model and not one of LoRA adapters; there is nothing to merge")
    base = base_checkpoint(checkpoint, run_config, base_ckpt_dir)
    iteration = layout.iteration_of(checkpoint)
    megatron.enter()
    tensors = merged_tensors(checkpoint, run_config, base, float32=float32)
    tokenizer = find_tokenizer(checkpoint, base)
    origin: dict[str, Any] = {"merged_from": {"base": str(base.absolute()), "adapters": str(checkpoint.absolute())}}
    scales = read_run_config(base).sections.get("fp8_scales")
    if scales:
        origin["fp8_scales"] = scales
    total = sum(tensor.nbytes for tensor in tensors.values())
    with new_checkpoint(target, iteration) as folder:
        check_space(target, total)
        with moving(len(tensors), total) as on_bytes:
            distcp.write_tensors(tensors, folder, on_bytes=on_bytes)
        model = {**run_config.model, "quantize_weights": "none"}
        sections = {**run_config.sections, "model": model, "peft": None, **origin}
        describe_as(folder, sections, tokenizer=tokenizer, iteration=iteration)
        if self_test.wants_numbers(with_self_test, total):
            self_test.store(folder, _architecture(run_config))
        if verify:
            exact = float32 or all(tensor.dtype == torch.float32 for tensor in tensors.values())
            _verify(checkpoint, base, folder, exact=exact)
    return target / layout.iteration_name(iteration)


def _architecture(run_config: RunConfig) -> Architecture:
    from evo2_megatron.model.provider import architecture_of

    return architecture_of(run_config.provider())


def _verify(checkpoint: Path, base: Path, merged: Path, *, exact: bool) -> None:
    batches = random_dna()
    difference = compare(_logits(merged, None, batches), _logits(checkpoint, base, batches))
    text = f"largest difference of the logits {difference.max_abs:.2g}, relative rms {difference.relative_rms:.2g}"
    if not (difference.is_rounding if exact else difference.relative_rms <= MAX_ROUNDED_RMS):
        raise UserError(f"verification failed: {text}; please report this; nothing was written")
    logger.info("verified on %d sequences of up to %d bases: %s", 2 * len(LENGTHS), max(LENGTHS), text)


def _logits(checkpoint: Path, base: Path | None, batches: list[Tensor]) -> list[Tensor]:
    one = ParallelConfig()
    with process_groups(one), torch.inference_mode():
        # how a model is meant to be run is not what is being checked
        overrides = {"vortex_style_fp8": False, "quantize_weights": "none"}
        model = load_model(
            checkpoint, parallel=one, precision="fp32", provider_overrides=overrides, base_ckpt_dir=base
        ).model
        device = next(model.parameters()).device
        return [model(tokens_BL.to(device)).float().cpu() for tokens_BL in batches]
