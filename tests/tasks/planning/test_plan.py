# SPDX-License-Identifier: Apache-2.0
"""What evo2_plan says is what a step takes."""

from __future__ import annotations

import logging

import pytest

from evo2_megatron.cli import plan as cli
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.recipes.options import TrainingOptions
from evo2_megatron.tasks.planning.plan import nearest_fit, plan
from evo2_megatron.tasks.training import train_checks
from helpers import PARAMETERS
from tasks.planning.allocations import as_on_a_cpu, of_training_step

SMALL = {"model_size": "evo2_tiny", "seq_length": 2048, "global_batch_size": 1}


@pytest.mark.parametrize("recompute", ["full", "none", pytest.param("selective", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16_mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", ["SDH*", pytest.param("SDHS", marks=pytest.mark.slow)])
def test_activations_are_what_a_real_step_takes(megatron, monkeypatch, pattern, precision, recompute):
    as_on_a_cpu(monkeypatch)
    given = SMALL | {"hybrid_override_pattern": pattern, "recompute": recompute, "precision": precision}
    planned = plan(1, **given).worst.activation_bytes
    assert planned == pytest.approx(of_training_step(**given), rel=0.015)


def test_attention_alone_computed_again_saves_next_to_nothing(megatron):
    """Fused attention keeps no scores; the type of its mask is a number that planning must know."""
    whole, selective = (plan(1, **SMALL | {"recompute": recompute}).worst for recompute in ("none", "selective"))
    assert 0.99 * whole.activation_bytes < selective.activation_bytes <= whole.activation_bytes
    assert whole.flops < selective.flops


@pytest.mark.parametrize("weights_in", [pytest.param("none", marks=pytest.mark.slow), "int8", "int4"])
def test_adapters(megatron, monkeypatch, caplog, weights_in):
    as_on_a_cpu(monkeypatch)
    caplog.set_level(logging.INFO)
    lora = {"lora_finetune": True, "lora_dim": 4, "quantize_weights": weights_in, "precision": "fp32"}
    (stage,) = plan(1, **SMALL | lora).stages
    # beside them the base's weights, of which nothing is kept but themselves
    adapters = stage.parameters - PARAMETERS["evo2_tiny"]
    assert 0 < adapters < 0.2 * stage.parameters and f"LoRA: {adapters} parameters of adapters" in caplog.text
    assert stage.optimizer_bytes == pytest.approx(8 * adapters, rel=0.02)
    weights = 4 * PARAMETERS["evo2_tiny"] + 8 * adapters
    # matrices are nearly all there is
    low, high = {"none": (0.99, 1.01), "int8": (0.3, 0.45), "int4": (0.2, 0.33)}[weights_in]
    assert low * weights < stage.weight_bytes < high * weights
    assert stage.activation_bytes == pytest.approx(of_training_step(**SMALL | lora), rel=0.015)


def test_stages_and_the_whole_model(megatron):
    """16 bits: two bytes of weight and four of gradient; three times four in the optimizer, shared by the replicas."""
    layout = ParallelConfig(tensor=2, context=2, pipeline=2)
    planned = plan(16, **SMALL | {"parallel": layout, "global_batch_size": 8})
    assert planned.parameters == PARAMETERS["evo2_tiny"]
    assert [stage.stage for stage in planned.stages] == [0, 1]
    for stage in planned.stages:
        # half-precision weights; filters stay in float32 or not: their share is small
        assert stage.weight_bytes == pytest.approx(6 * stage.parameters, rel=0.02)
        # the replicas and the context-parallel processes share the optimizer's state
        assert stage.optimizer_bytes == pytest.approx(12 * stage.parameters / 4, rel=0.02)
    assert planned.worst.total_bytes == max(stage.total_bytes for stage in planned.stages)


@pytest.mark.slow
def test_a_nearest_layout_fits(megatron):
    one = plan(2, **SMALL | {"global_batch_size": 2}).worst.total_bytes
    layout = nearest_fit(2, 0.8 * one, parallel=ParallelConfig(), **SMALL | {"global_batch_size": 2})
    assert plan(2, **SMALL | {"global_batch_size": 2, "parallel": layout}).worst.total_bytes <= 0.8 * one
    assert nearest_fit(2, 1000, parallel=ParallelConfig(), **SMALL | {"global_batch_size": 2}) is None


@pytest.mark.parametrize(
    "given, message",
    [
        ({"parallel": ParallelConfig(tensor=3), "seq_length": 2046}, "tensor parallel size 3 does not divide"),
        ({"parallel": ParallelConfig(context=4), "seq_length": 2050}, "multiple of 8"),
        ({"precision": "bf16_with_fp8_current_scaling_mixed"}, "cannot be planned without a GPU"),
        ({"quantize_weights": "int8"}, "--quantize-weights goes with --lora-finetune"),
        ({"lora_finetune": True, "lora_target_modules": ["dnse"]}, "'dnse' matches no module"),
    ],
)
def test_refusals(megatron, given, message):
    layout = given.get("parallel", ParallelConfig())
    with pytest.raises(UserError, match=message):
        plan(layout.model_size, **SMALL | given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"seq_len_interpolation_factor": float("inf")}, "--seq-len-interpolation-factor is inf; it must be above 0"),
        ({"rotary_base": 10**25}, "--rotary-base is 1.*; it must be from 1 to"),
    ],
)
def test_what_training_refuses_is_refused(megatron, given, message):
    with pytest.raises(UserError, match=message):
        plan(1, **SMALL | given)
    with pytest.raises(UserError, match=message):
        train_checks.check(TrainingOptions(mock_data=True, **SMALL | given))


def test_rows_that_cannot_be_split(megatron):
    """Refused where they are asked for, and passed over where another layout is looked for."""
    given = SMALL | {"vocab_size": 511, "global_batch_size": 2}
    with pytest.raises(UserError, match="--vocab-size 511 is not a multiple of --tensor-parallel-size 2"):
        plan(2, parallel=ParallelConfig(tensor=2), **given)
    assert nearest_fit(2, 1000, parallel=ParallelConfig(), **given) is None


def test_a_plan_logs_nothing(megatron, caplog):
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine

    destroy_rerun_state_machine()
    with caplog.at_level(logging.WARNING):
        plan(1, **SMALL)
    assert caplog.messages == []


@pytest.mark.parametrize("text", ["nan", "inf", "-5", "0", "much"])
def test_memory_that_no_gpu_has(text, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(["--model-size", "evo2_tiny", "--gpu-memory", text])
    assert ending.value.code == 2 and "argument --gpu-memory: " in capsys.readouterr().err


@pytest.mark.slow
def test_the_1m_row_of_the_40b_model(megatron):
    """As published: 256 GPUs of 80 GB, tensor 8 x context 16."""
    layout = ParallelConfig(tensor=8, context=16)
    planned = plan(256, model_size="evo2_40b", seq_length=2**20, global_batch_size=2, parallel=layout)
    assert planned.parameters == PARAMETERS["evo2_40b"]
    assert planned.worst.total_bytes < 80e9


def test_time_and_price(megatron, capsys):
    """By hand: operations and tokens of a step, by the speed of two GPUs; of both what training itself counts."""
    given = ["--model-size", "evo2_tiny", "--seq-length", "1024", "--global-batch-size", "6", "--num-gpus", "2"]
    cli.main([*given, "--tflops", "0.5", "--num-tokens", "3e9", "--gpu-hour-price", "2"])
    *_, line = capsys.readouterr().out.splitlines()
    planned = plan(2, **SMALL | {"seq_length": 1024, "global_batch_size": 6})
    assert planned.num_tokens == 6 * 1024
    seconds = planned.model_flops / 2 / 0.5e12
    hours = 3e9 / (6 * 1024) * seconds * 2 / 3600
    assert line == (
        f"at 0.5 TFLOP/s: {seconds:.3g} s per step, {6 * 1024 / seconds / 2:,.0f} tokens per second and GPU; "
        f"3,000,000,000 tokens take {hours:,.4g} GPU hours, price {2 * hours:,.4g}"
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num-tokens", "1e9"], "add --tflops"),
        (["--gpu-hour-price", "2"], "add --tflops"),
        (["--for", "generate", "--tflops", "100"], "--tflops says nothing about --for generate; leave it out"),
        (["--tflops", "fast"], "fast is not a finite number above 0"),
    ],
)
def test_prices_without_a_speed(flags, message, capsys):
    with pytest.raises(SystemExit) as ending:
        cli.main(["--model-size", "evo2_tiny", *flags])
    assert ending.value.code == 2 and message in capsys.readouterr().err
