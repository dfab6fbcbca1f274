# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of LoRA runs: adapters and the modules kept trainable, without the base model that they belong to.

They look like other checkpoints. Section ``peft`` of ``run_config.yaml`` describes the adapters, and
``checkpoint.pretrained_checkpoint`` says where the base is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.run_config import RunConfig, read_run_config
from evo2_megatron.config import UserError

if TYPE_CHECKING:
    from evo2_megatron.model.lora import Evo2LoRA

_TARGETS = ("evo2_megatron.model.lora.Evo2LoRA", "bionemo.evo2.models.evo2_lora.Evo2LoRA")
_READ: dict[str, type | tuple[type, ...]] = {
    "target_modules": list,
    "skip_freeze_modules": list,
    "dim": int,
    "alpha": (int, float),
    "dropout": (int, float),
    "dropout_position": str,
}
"""Fields of the section that loading needs, and their types."""


def base_checkpoint(checkpoint: Path, run_config: RunConfig, base_ckpt_dir: Path | None = None) -> Path:
    """The checkpoint that fills a model before adapters do; without adapters, the checkpoint itself.

    Args:
        checkpoint: One iteration.
        run_config: What it describes.
        base_ckpt_dir: Where the base is now; None: where it was in training.

    Raises:
        UserError: The base is not there, or is not a whole model.
    """
    if not run_config.is_lora:
        if base_ckpt_dir is not None:
            raise UserError(
                f"--base-ckpt-dir goes with LoRA adapters, and {checkpoint} is a whole model; leave it out"
            )
        return checkpoint
    if base_ckpt_dir is None:
        base_ckpt_dir = run_config.pretrained_checkpoint
        if base_ckpt_dir is None:
            raise UserError(f"{run_config.path} does not say what its adapters belong to; give --base-ckpt-dir")
        if not base_ckpt_dir.is_dir():
            raise UserError(
                f"the base model of the adapters in {checkpoint} is no longer in {base_ckpt_dir}; say where it is with "
                "--base-ckpt-dir"
            )
    base = resolve_checkpoint_path(base_ckpt_dir, flag="--base-ckpt-dir")
    check_whole(read_run_config(base))
    return base


def check_whole(run_config: RunConfig) -> None:
    """Raise UserError for a checkpoint that holds adapters only."""
    if run_config.is_lora:
        raise UserError(
            f"{run_config.path.parent} holds LoRA adapters without their base model "
            f"({run_config.pretrained_checkpoint}); make a whole model of the two with evo2_merge_lora"
        )


def read_adapters(run_config: RunConfig) -> Evo2LoRA:
    """The adapters that a checkpoint describes; apply them to its base model.

    Raises:
        UserError: The section is damaged, or describes adapters that this version cannot run.
    """
    from evo2_megatron.model.lora import Evo2LoRA

    section = run_config.sections["peft"]
    if not isinstance(section, dict) or section.get("_target_") not in _TARGETS:
        raise UserError(f"{run_config.path}: section 'peft' does not describe LoRA adapters of an Evo 2 model")
    values: dict[str, Any] = {}
    for name, kind in _READ.items():
        if section.get(name) is None:
            continue
        values[name] = section[name]
        if not isinstance(values[name], kind) or (kind is int and values[name] < 1):
            raise UserError(f"{run_config.path}: peft.{name} is {values[name]!r}; the file is damaged")
    return Evo2LoRA(**values)
