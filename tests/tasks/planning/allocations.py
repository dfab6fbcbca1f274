# SPDX-License-Identifier: Apache-2.0
"""What real steps and runs of small models allocate, beside what evo2_plan says; for tests and benchmarks/planning.py.

Megatron Bridge can be used only after ``runtime.megatron.enter``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import pytest

from evo2_megatron.config import ParallelConfig
from evo2_megatron.tasks.planning.plan_inference import Inference, score


def of_training_step(**given: Any) -> int:
    """Bytes that a training step adds at its peak; ``given``: fields of TrainingOptions."""
    import torch

    from evo2_megatron.recipes.options import TrainingOptions
    from evo2_megatron.runtime.distributed import process_groups
    from evo2_megatron.tasks.planning import plan_step

    with process_groups(ParallelConfig()):
        config = plan_step.step_config(TrainingOptions(mock_data=True, **given), 512)
        with contextlib.redirect_stdout(sys.stderr):  # Megatron prints the number of parameters
            model = plan_step.build_model(config)
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                parameter.zero_()  # nothing was loaded
        peak = largest(lambda: plan_step.run_step(config, model, 1))
        assert all(torch.isfinite(p.main_grad).all() for p in model.parameters() if p.requires_grad)
    return peak


def of_inference(inference: Inference, **given: Any) -> int:
    """Bytes that scoring or generation adds at its peak; ``given``: fields of TrainingOptions."""
    import torch

    from evo2_megatron.recipes.options import TrainingOptions
    from evo2_megatron.runtime.distributed import process_groups
    from evo2_megatron.tasks.planning import plan_step

    with process_groups(ParallelConfig()), torch.no_grad():
        config = plan_step.step_config(TrainingOptions(mock_data=True, global_batch_size=1, **given), 512)
        config.model.quantize_weights = inference.quantize_weights
        with contextlib.redirect_stdout(sys.stderr):
            (model,) = config.model.provide_distributed_model(wrap_with_ddp=False)
        model.eval()
        tokens_BL = torch.full((inference.num_sequences, given["seq_length"]), ord("A"))
        run = score if inference.use == "score" else generate
        return largest(lambda: run(model, tokens_BL, inference.piece, given["precision"]))


def as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned is for a GPU: norms are one kernel, long filters scan in another way and in larger parts."""
    from evo2_megatron.model import torch_modules
    from evo2_megatron.ops import modal, toeplitz

    monkeypatch.setattr(torch_modules, "rms_norm", torch_modules._rms_norm_in_steps)
    monkeypatch.setattr(torch_modules, "_wants_float32", lambda x_TH, weight_DH: False)
    monkeypatch.setattr(toeplitz, "_GPU_SLICE", toeplitz._CPU_SLICE)
    monkeypatch.setattr(modal, "SCAN_RADIX", modal.CPU_BLOCKS_ONE_BY_ONE)


def generate(model: Any, tokens_BL: Any, piece: int, *_: Any) -> None:
    """All tokens but the last as a prompt, piece by piece, and the last one after it."""
    from megatron.core.utils import unwrap_model

    from evo2_megatron.tasks.forward import forward_last, prefill

    inner = unwrap_model(model)
    state = inner.new_inference_state(*tokens_BL.shape, last_token_logits_only=True)
    prefill(inner, tokens_BL[:, :-1], state, chunk=piece)
    forward_last(inner, tokens_BL[:, -1:], state)


def largest(run: Callable[[], object]) -> int:
    """By the events of PyTorch's allocator, in a second run: the first makes what stays.

    Not the process's resident memory, which keeps what is freed and grows with code and libraries.
    """
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
