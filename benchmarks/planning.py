# SPDX-License-Identifier: Apache-2.0
"""Memory of a training step as evo2_plan plans it: for published layouts, and beside real steps of small models.

``python benchmarks/planning.py``, on a CPU, prints Markdown. Measured is the most that a real step adds, by the events
of PyTorch's allocator: unlike resident memory, these leave out what the process keeps after freeing it.
"""

from __future__ import annotations

import os
import time
from typing import Any

from evo2_megatron.config import ParallelConfig

ROWS = (
    # tokens, GPUs, layout, and how far positions are stretched beyond the model size's own
    (2**20, 256, ParallelConfig(tensor=8, context=16), None),
    (2**21, 512, ParallelConfig(tensor=8, context=32), 256.0),
)
SMALL = {"hidden 128, SDH*": "SDH*", "hidden 128, SDHS": "SDHS"}


def measured(**given: Any) -> int:
    """Bytes that a real step adds at its peak."""
    from torch.profiler import ProfilerActivity, profile

    from evo2_megatron.recipes.options import TrainingOptions
    from evo2_megatron.runtime import megatron
    from evo2_megatron.runtime.distributed import process_groups

    megatron.enter()
    from evo2_megatron.tasks import plan_step

    with process_groups(ParallelConfig()):
        config = plan_step.step_config(TrainingOptions(mock_data=True, **given), 512)
        model = plan_step.build_model(config)
        plan_step.run_step(config, model, 1)  # what is made at the first use only
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            plan_step.run_step(config, model, 1)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main() -> None:
    """Print both tables."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # that fake groups have no real backend
    from evo2_megatron.tasks.plan import plan

    print("| tokens | GPUs | layout | weights + gradients | optimizer | activations | GB per GPU | planned in |")
    print("|---|---|---|---|---|---|---|---|")
    for length, num_gpus, layout, stretch in ROWS:
        start = time.perf_counter()
        given = {} if stretch is None else {"seq_len_interpolation_factor": stretch}
        worst = plan(
            num_gpus, model_size="evo2_40b", seq_length=length, global_batch_size=2, parallel=layout, **given
        ).worst
        seconds = time.perf_counter() - start
        parts = (worst.weight_bytes, worst.optimizer_bytes, worst.activation_bytes, worst.total_bytes)
        figures = " | ".join(f"{size / 1e9:.1f}" for size in parts)
        print(f"| {length:,} | {num_gpus} | TP {layout.tensor}, CP {layout.context} | {figures} | {seconds:.0f} s |")
    from evo2_megatron.ops import toeplitz

    toeplitz._GPU_SLICE = toeplitz._CPU_SLICE  # what is planned here is compared with a CPU, not with a GPU
    print("\n| model | precision | recompute | planned, MB | measured, MB | planned / measured |")
    print("|---|---|---|---|---|---|")
    for name, pattern in SMALL.items():
        for precision in ("fp32", "bf16_mixed"):
            for recompute in ("full", "none"):
                given = {"model_size": "evo2_tiny", "hybrid_override_pattern": pattern, "seq_length": 2048}
                given |= {"global_batch_size": 1, "precision": precision, "recompute": recompute}
                planned, real = plan(1, **given).worst.activation_bytes, measured(**given)
                figures = f"{planned / 1e6:.1f} | {real / 1e6:.1f} | {planned / real:.3f}"
                print(f"| {name} | {precision} | {recompute} | {figures} |")


if __name__ == "__main__":
    main()
