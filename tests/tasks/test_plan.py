# SPDX-License-Identifier: Apache-2.0
"""What evo2_plan says is what a step takes."""

from __future__ import annotations

import pytest

from evo2_megatron.config import ParallelConfig
from evo2_megatron.tasks.plan import plan

SMALL = {"model_size": "evo2_tiny", "seq_length": 2048, "global_batch_size": 1}


def measured(**given):
    """Bytes that a real step adds at its peak, by the events of PyTorch's allocator.

    Not the process's resident memory, which keeps what is freed and grows with code and libraries.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from evo2_megatron.recipes.options import TrainingOptions
    from evo2_megatron.runtime.distributed import process_groups
    from evo2_megatron.tasks import plan_step

    with process_groups(ParallelConfig()):
        config = plan_step.step_config(TrainingOptions(mock_data=True, **given), 512)
        model = plan_step.build_model(config)
        plan_step.run_step(config, model, 1)  # what is made at the first use only
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            plan_step.run_step(config, model, 1)
        assert torch.isfinite(next(model.parameters()).main_grad).all()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("recompute", ["full", "none"])
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
@pytest.mark.parametrize("pattern", ["SDH*", "SDHS"])
def test_activations_are_what_a_real_step_takes(megatron, monkeypatch, pattern, precision, recompute):
    from evo2_megatron.ops import toeplitz

    # on a GPU the convolutions take more channels at a time; here both do as on a CPU
    monkeypatch.setattr(toeplitz, "_GPU_SLICE", toeplitz._CPU_SLICE)
    given = SMALL | {"hybrid_override_pattern": pattern, "recompute": recompute, "precision": precision}
    planned = plan(1, **given).worst.activation_bytes
    real = measured(**given)
    print("RATIO", pattern, precision, recompute, planned, real, planned / real)
    assert planned == pytest.approx(real, rel=0.15)
