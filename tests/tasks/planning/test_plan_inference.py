# SPDX-License-Identifier: Apache-2.0
"""What evo2_plan says about scoring and generation is what they take."""

from __future__ import annotations

import subprocess
import sys

import pytest

from evo2_megatron.architectures import architecture
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.tasks.planning.plan_inference import Inference, longest_sequence, plan_inference
from helpers import PARAMETERS
from tasks.planning.allocations import as_on_a_cpu, generate, of_inference

SMALL = {"model_size": "evo2_tiny", "seq_length": 2048}


@pytest.mark.parametrize("chunk_length", [4096, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16_mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", ["SDH*", pytest.param("SDHS", marks=pytest.mark.slow)])
@pytest.mark.parametrize("use", ["score", "generate"])
def test_what_a_real_run_takes(megatron, monkeypatch, use, pattern, precision, chunk_length):
    as_on_a_cpu(monkeypatch)
    given, inference = SMALL | {"hybrid_override_pattern": pattern}, Inference(use, 1, chunk_length)
    (stage,) = plan_inference(inference, **given, precision=precision)
    real = of_inference(inference, **given, precision=precision)
    assert stage.activation_bytes == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("use, weights_in", [("score", "int8"), ("generate", "int8"), ("generate", "int4")])
def test_quantized_weights(megatron, monkeypatch, use, weights_in):
    as_on_a_cpu(monkeypatch)
    inference = Inference(use, 1, 512, quantize_weights=weights_in)
    (stage,), (wide,) = (plan_inference(i, **SMALL, precision="fp32") for i in (inference, Inference(use, 1, 512)))
    assert stage.activation_bytes == pytest.approx(of_inference(inference, **SMALL, precision="fp32"), rel=0.05)
    ffn = architecture("evo2_tiny").ffn_hidden_size
    numbers, rows = 4 * 128**2 + 3 * ffn * 128, 4 * 128 + 2 * ffn + 128
    # of each layer's four matrices: a byte, and two for each row; or half a byte, and four for 64 or 32 numbers of one
    groups = (4 * 128 + 2 * ffn) * 128 // 64 + ffn * 128 // 32
    narrow = {"int8": numbers + 2 * rows, "int4": numbers // 2 + 4 * groups}[weights_in]
    # and a number in the place of each matrix
    assert wide.weight_bytes - stage.weight_bytes == 4 * (4 * numbers - narrow - 4)


def test_published_models_have_their_size(megatron):
    """Two bytes a parameter, and some filters in four."""
    for size, layout in (("evo2_7b", ParallelConfig()), ("evo2_40b", ParallelConfig(pipeline=2))):
        stages = plan_inference(Inference("score"), model_size=size, seq_length=256, parallel=layout)
        # the table of the embedding is on the first and the last stage
        shared = 0 if len(stages) == 1 else 512 * 8192
        assert sum(stage.parameters for stage in stages) == PARAMETERS[size] + shared
        for stage in stages:
            assert stage.weight_bytes == pytest.approx(2 * stage.parameters, rel=0.01)


def test_skipped_pieces_of_a_prompt_change_nothing(megatron, monkeypatch):
    """The same peak and operations as with all pieces run."""
    from evo2_megatron.tasks.planning import plan_inference as module

    given = SMALL | {"seq_length": 1000}
    (some,) = plan_inference(Inference("generate", 1, 100), **given)
    monkeypatch.setattr(module, "_generate", generate)
    (whole,) = plan_inference(Inference("generate", 1, 100), **given)
    assert some.flops == whole.flops
    assert some.activation_bytes == pytest.approx(whole.activation_bytes, rel=1e-3)


def test_several_sequences_share_the_weights(megatron):
    one, four = (plan_inference(Inference("generate", n), **SMALL)[0] for n in (1, 4))
    assert four.weight_bytes == one.weight_bytes
    assert 3 * one.activation_bytes < four.activation_bytes <= 4 * one.activation_bytes


@pytest.mark.parametrize("use, chunk_length", [("score", 1024), ("generate", 256)])
@pytest.mark.slow
def test_the_longest_sequence_fits_and_no_longer_one(megatron, use, chunk_length):
    given, inference = {"model_size": "evo2_tiny"}, Inference(use, 1, chunk_length)

    def needed(length, inference=inference):
        return plan_inference(inference, **given, seq_length=length)[0].total_bytes

    for wanted in (chunk_length, 2 * chunk_length, 5 * chunk_length):
        found = longest_sequence(inference, needed(wanted) + 1, **given)
        assert found == wanted
        assert needed(found + chunk_length) > needed(wanted) + 1
    assert longest_sequence(inference, 1e12, **given) == 8192
    assert longest_sequence(inference, 1000, **given) == 0
    at_once = Inference(use, 1, 4096)
    assert longest_sequence(at_once, needed(1024, at_once) + 1, **given) == 1024


def test_refusals(megatron):
    with pytest.raises(UserError, match="beyond the position range of evo2_tiny, 8192 tokens"):
        plan_inference(Inference("score"), model_size="evo2_tiny", seq_length=8193)
    for layout, message in (
        (ParallelConfig(context=2), "generation does not split a sequence"),
        (ParallelConfig(tensor=2, sequence_parallel=True), "leave out --sequence-parallel"),
    ):
        with pytest.raises(UserError, match=message):
            plan_inference(Inference("generate"), **SMALL, parallel=layout)
    with pytest.raises(UserError, match="cannot be planned without a GPU"):
        plan_inference(Inference("score"), **SMALL, precision="bf16_with_fp8_current_scaling_mixed")


def test_command():
    """In a process of its own, which has loaded nothing before."""
    code = """
from evo2_megatron.cli.plan import main
small = ["--model-size", "evo2_tiny", "--seq-length", "1001", "--tensor-parallel-size", "2"]
main(["--for", "score", *small])
main(["--for", "generate", *small, "--gpu-memory", "0.001"])
"""
    ended = subprocess.run([sys.executable, "-c", code], check=True, stdout=-1, text=True)
    heading, stage, fits, longest, *rest = ended.stdout.splitlines()
    assert heading.split()[:3] == ["stage", "parameters", "weights"] and stage.split()[0] == "0"
    assert fits.startswith("fits 80 GB: 0.0 GB")
    assert longest == "longest sequence within 80 GB: 8,192 tokens, all that the model has positions for"
    assert any("does not fit 0.001 GB" in line for line in rest)
    assert "not even 512 tokens fit; use --tensor-parallel-size" in rest[-1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--for", "score", "--micro-batch-size", "2"], "--micro-batch-size says nothing about --for score"),
        (["--for", "generate", "--no-activation-checkpointing"], "--no-activation-checkpointing says nothing"),
        (["--num-sequences", "2"], "--num-sequences says nothing about --for train"),
        (["--quantize-weights", "int8"], "--quantize-weights goes with --lora-finetune"),
        (["--for", "score", "--lora-finetune"], "--lora-finetune says nothing about --for score"),
    ],
)
def test_flags_of_another_use(flags, message, capsys):
    from evo2_megatron.cli.plan import main

    with pytest.raises(SystemExit) as ending:
        main(flags)
    assert ending.value.code == 2
    assert message in capsys.readouterr().err


def test_time_of_scoring(megatron, capsys):
    """Stages work on a batch in turn; GPU hours count all of them."""
    from evo2_megatron.cli.plan import main

    given = ["--for", "score", "--model-size", "evo2_tiny", "--seq-length", "1000", "--num-sequences", "3"]
    main([*given, "--pipeline-parallel-size", "2", "--tflops", "0.25"])
    line = capsys.readouterr().out.splitlines()[-2]
    layout = ParallelConfig(pipeline=2)
    stages = plan_inference(Inference("score", 3), model_size="evo2_tiny", seq_length=1000, parallel=layout)
    seconds = sum(stage.flops for stage in stages) / 0.25e12
    hours = 1e6 / 3000 * seconds * 2 / 3600
    assert line == (
        f"at 0.25 TFLOP/s: {seconds:.3g} s per batch, {3000 / seconds / 2:,.0f} tokens per second and GPU; "
        f"1,000,000 tokens take {hours:,.4g} GPU hours"
    )
