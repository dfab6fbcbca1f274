# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of LoRA runs: adapters and the modules kept trainable, without the base model that they belong to.

They look like other checkpoints. Section ``peft`` of ``run_config.yaml`` describes the adapters, and
``checkpoint.pretrained_checkpoint`` says where the base is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evo2_megatron.checkpoint.distcp import read_index, stored_tensors, tensor_entries
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.names import (
    EMBEDDING,
    check_tensors,
    is_trained,
    is_weight,
    parameter_shapes,
    usual_names,
)
from evo2_megatron.checkpoint.run_config import RunConfig, check_kind, read_run_config
from evo2_megatron.checkpoint.tensors import StoredTensor, each_row
from evo2_megatron.config import UserError
from evo2_megatron.runtime import megatron

if TYPE_CHECKING:
    from evo2_megatron.architectures import Architecture
    from evo2_megatron.model.lora import Choice, Evo2LoRA

_TARGETS = ("evo2_megatron.model.lora.Evo2LoRA", "bionemo.evo2.models.evo2_lora.Evo2LoRA")
_LINEAR_IN, _LINEAR_OUT = "adapter.linear_in.weight", "adapter.linear_out.weight"
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
                f"the base model of the adapters in {checkpoint} is not in {base_ckpt_dir} any more; give its folder "
                "with --base-ckpt-dir"
            )
    base = resolve_checkpoint_path(base_ckpt_dir, flag="--base-ckpt-dir")
    check_whole(read_run_config(base))
    return base


def check_whole(run_config: RunConfig) -> None:
    """Raise UserError for a checkpoint that holds adapters only, or a prediction head."""
    check_kind(run_config, head=False)
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
    megatron.enter_training()
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


def trained_tensors(
    adapters: Evo2LoRA, architecture: Architecture, *, vocab_size: int
) -> tuple[Choice, dict[str, tuple[int, ...]]]:
    """What adapters train in a model, found without building it.

    Args:
        adapters: Which modules, and which rank.
        architecture: Of the model.
        vocab_size: Rows of its embedding.

    Returns:
        The modules, and name and global shape of every tensor that a checkpoint of the adapters holds.

    Raises:
        UserError: See ``model.lora.choose``.
    """
    from evo2_megatron.model.lora import OUTPUT, choose

    shapes = parameter_shapes(architecture, vocab_size=vocab_size)
    owners = {name: name.rpartition(".")[0] for name in shapes if is_trained(name)}
    choice = choose(
        {*owners.values(), OUTPUT},
        targets=adapters.target_modules,
        skip_freeze=adapters.skip_freeze_modules,
        tied_embeddings=architecture.tied_embeddings,
    )
    trained = {name: shapes[name] for name, path in owners.items() if path in choice.kept}
    for path in sorted(choice.adapted):
        num_out, num_in = shapes[f"{path}.weight"]
        trained[f"{path}.{_LINEAR_IN}"] = (adapters.dim, num_in)
        trained[f"{path}.{_LINEAR_OUT}"] = (num_out, adapters.dim)
    return choice, trained


def merged_tensors(
    checkpoint: Path, run_config: RunConfig, base: Path, *, float32: bool = False
) -> dict[str, StoredTensor]:
    """The whole model that adapters make of their base: ``W + alpha / dim * B A`` for every adapted matrix W.

    Args:
        checkpoint: One iteration of a LoRA run.
        run_config: What it describes.
        base: The checkpoint that the adapters belong to.
        float32: Give the merged matrices in float32 instead of the base's format.

    Returns:
        Tensors by the names of checkpoints. A sum is taken in float32, as its rows are read, and rounded once.

    Raises:
        UserError: Either has tensors that are missing, not understood or of another shape.
    """
    from evo2_megatron.model.provider import architecture_of

    adapters, weights, own = read_adapters(run_config), _weights(base), _weights(checkpoint)
    if EMBEDDING not in weights:
        raise UserError(f"{base} has no tensor {EMBEDDING}; it is not a checkpoint of an Evo 2 model")
    rows = weights[EMBEDDING].shape[0]
    architecture = architecture_of(run_config.provider(vocab_size=rows))
    choice, trained = trained_tensors(adapters, architecture, vocab_size=rows)
    shapes = parameter_shapes(architecture, vocab_size=rows)
    usual = usual_names(weights, shapes)
    weights = {usual[name]: tensor for name, tensor in weights.items()}
    for found, wanted, folder in ((weights, shapes, base), (own, trained, checkpoint)):
        check_tensors(
            {name: tensor.shape for name, tensor in found.items()},
            wanted,
            source=f"the weights in {folder} are not those that {run_config.path} describes",
            remedy="check that adapters and base belong together",
        )
    merged = {name: own.get(name, tensor) for name, tensor in weights.items()}
    for path in choice.adapted:
        name, scale = f"{path}.weight", adapters.alpha / adapters.dim
        dtype = torch.float32 if float32 else merged[name].dtype
        merged[name] = _sum(merged[name], own[f"{path}.{_LINEAR_IN}"], own[f"{path}.{_LINEAR_OUT}"], scale, dtype)
    return merged


def _weights(checkpoint: Path) -> dict[str, StoredTensor]:
    index = read_index(checkpoint)
    return stored_tensors(checkpoint, index, {name: name for name in tensor_entries(index) if is_weight(name)})


def _sum(
    weight: StoredTensor, linear_in: StoredTensor, linear_out: StoredTensor, scale: float, dtype: torch.dtype
) -> StoredTensor:
    def add(weight_OI: Tensor, out_OR: Tensor) -> Tensor:
        return (weight_OI.float() + scale * (out_OR.float() @ linear_in.read().float())).to(dtype)

    return each_row(add, weight, linear_out)
