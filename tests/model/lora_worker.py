# SPDX-License-Identifier: Apache-2.0
"""Two processes of a test of LoRA: one step's gradients under several layouts, one after the other.

Run by test_lora_layouts.py: ``lora_worker.py BASE CHECKPOINT WEIGHTS LAYOUT...``, WEIGHTS as ``--quantize-weights``.
Rank 0 saves, in ``<layout>.pt`` beside the checkpoint of adapters, the loss of every sequence and, as full tensors by
global name, gradients of what is trained.
"""

import sys
from pathlib import Path

import torch

from evo2_megatron.runtime.distributed import process_groups, rank
from evo2_megatron.runtime.megatron import enter_training
from model.layout_worker import LAYOUTS, LOADS, build, global_name, merged, train_step, whole
from processes import fork


def run(base, adapter_checkpoint, layout, quantize_weights="none"):
    """What is compared, on every process."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    from evo2_megatron.checkpoint import load
    from evo2_megatron.checkpoint.adapter import read_adapters
    from evo2_megatron.checkpoint.load_weights import load_weights
    from evo2_megatron.checkpoint.run_config import read_run_config

    adapters = read_adapters(read_run_config(adapter_checkpoint))

    spread = {}

    def adapt(stage):
        stage.config.use_cpu_initialization = False  # as in training
        adapters(stage)
        for name, parameter in stage.named_parameters():
            if "adapter.linear_in" in name:
                spread[global_name(name, stage)] = parameter.std().item()
        stored = load.tensor_shapes(adapter_checkpoint)
        load_weights(stage, adapter_checkpoint, stored, dropped_layers=(), only=adapters.adapter_key_filter)

    with process_groups(layout, seed=1):
        model = build(base, layout, adapt, quantize_weights=quantize_weights)
        inner, context = unwrap_model(model), parallel_state.get_context_parallel_rank()
        losses = train_step(model)
        if not parallel_state.is_pipeline_last_stage():
            losses = {}
        trained = {global_name(n, inner): p for n, p in inner.named_parameters() if p.requires_grad}
        return {
            "spread": merged(spread),
            "losses": merged({(row, context): loss for row, loss in losses.items()}),
            "gradients": merged(
                {n: whole(p, in_halves="linear_fc1.adapter.linear_out" in n).clone() for n, p in trained.items()}
            ),
        }


def main(base, adapter_checkpoint, layout, quantize_weights, output):
    result = run(base, adapter_checkpoint, layout, quantize_weights)
    if rank() == 0:
        torch.save(result, output)


if __name__ == "__main__":
    enter_training()
    base, checkpoint, quantize_weights, *layouts = sys.argv[1:]
    for name in layouts:
        output = Path(checkpoint).with_name(f"{name}.pt")
        fork(2, main, Path(base), Path(checkpoint), LAYOUTS[name], quantize_weights, output, loads=LOADS)
