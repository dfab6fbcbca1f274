# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters with random weights as a checkpoint, for tests of whatever loads one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ALL_LINEAR = ["dense_projection", "dense", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


def write_tiny_adapters(directory: Path, base: Path, *, iteration: int = 1, **fields: Any) -> Path:
    """Write ``iter_<iteration>`` into a folder and return it; starts and stops its own process group.

    Args:
        directory: Folder of the checkpoints.
        base: Checkpoint that they belong to.
        iteration: Its number.
        fields: Of Evo2LoRA; rank 4 on all linear layers, scaled by 2, unless given.
    """
    import torch

    from evo2_megatron.checkpoint.distcp import write_tensors
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.checkpoint.tensors import in_memory
    from evo2_megatron.checkpoint.write import describe_as, new_checkpoint, whole_weights
    from evo2_megatron.config import ParallelConfig
    from evo2_megatron.model.lora import Evo2LoRA
    from evo2_megatron.runtime.distributed import process_groups

    one = ParallelConfig()
    with process_groups(one, seed=2):
        loaded = load_model(base, parallel=one, precision="fp32")
        adapters = Evo2LoRA(**({"target_modules": ALL_LINEAR, "dim": 4, "alpha": 8} | fields))
        adapters(loaded.model)
        # as after training: B is zero at the start, and what is kept trainable is the base's
        generator = torch.Generator().manual_seed(5)
        weights = whole_weights(loaded.model)
        trained = {name: tensor for name, tensor in weights.items() if adapters.adapter_key_filter(name)}
        for tensor in trained.values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    values = {name: value for name, value in vars(adapters).items() if isinstance(value, (str, int, float, list))}
    section = {"_target_": "evo2_megatron.model.lora.Evo2LoRA", **values}
    sections = {**loaded.run_config.sections, "peft": section, "checkpoint": {"pretrained_checkpoint": str(base)}}
    with new_checkpoint(directory, iteration) as folder:
        write_tensors({name: in_memory(tensor) for name, tensor in trained.items()}, folder)
        describe_as(folder, sections, tokenizer=loaded.tokenizer_dir, iteration=iteration)
    return directory / f"iter_{iteration:07d}"
