# SPDX-License-Identifier: Apache-2.0
"""The tables of planned memory in the documentation are what the code plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from evo2_megatron.config import ParallelConfig
from evo2_megatron.tasks.planning.plan import plan
from evo2_megatron.tasks.planning.plan_inference import Inference, longest_sequence, plan_inference

DOCS = Path(__file__).parents[3] / "docs"
SLOW = pytest.mark.slow
GB = 1e9


def cells(page: str, heading: str, *row: str) -> list[str]:
    """Of the table whose first line contains ``heading``, what follows ``row``, the first cells of a line."""
    table = (DOCS / page).read_text().partition(heading)[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (found,) = [line[len(row) :] for line in lines if line[: len(row)] == list(row)]
    return found


def inference(use: str, model_size: str, num_tokens: int, *, tensor: int = 1, int8_weights: bool = False):
    """Weights and all, in GB."""
    parallel = ParallelConfig(tensor=tensor)
    given = {"model_size": model_size, "seq_length": num_tokens, "parallel": parallel}
    (stage,) = plan_inference(Inference(use, int8_weights=int8_weights), **given)
    return f"{stage.weight_bytes / GB:.1f}", f"{stage.total_bytes / GB:.1f}"


@pytest.mark.parametrize(
    "model_size, num_gpus, num_tokens",
    [
        ("evo2_1b_base", 1, 8_192),
        pytest.param("evo2_7b", 1, 8_192, marks=SLOW),
        pytest.param("evo2_7b", 1, 131_072, marks=SLOW),
        pytest.param("evo2_40b", 2, 8_192, marks=SLOW),
    ],
)
def test_scoring_and_generation(megatron, model_size, num_gpus, num_tokens):
    row = (f"`{model_size}`", f"{num_gpus}", f"{num_tokens:,}")
    told = cells("long_context.md", "| to score, GB | to generate, GB |", *row)
    (weights, score), (_, generate) = (
        inference(use, model_size, num_tokens, tensor=num_gpus) for use in ("score", "generate")
    )
    assert told == [weights, score, generate]


@pytest.mark.parametrize("int8_weights", [pytest.param(False, marks=SLOW), True])
def test_weights_in_8_bits(megatron, int8_weights):
    heading = "| bfloat16 | `--int8-weights` |"
    weights, total = inference("score", "evo2_7b", 8_192, int8_weights=int8_weights)
    assert cells("precision.md", heading, "`evo2_7b`: weights")[int8_weights] == f"{weights} GB"
    assert cells("precision.md", heading, "to score, to generate")[int8_weights].startswith(f"{total}, ")


@SLOW
@pytest.mark.parametrize("int8_weights", [False, True])
def test_weights_in_8_bits_of_the_rest(megatron, int8_weights):
    heading = "| bfloat16 | `--int8-weights` |"
    _, generate = inference("generate", "evo2_7b", 8_192, int8_weights=int8_weights)
    assert cells("precision.md", heading, "to score, to generate")[int8_weights].endswith(f", {generate} GB")
    weights, total = inference("score", "evo2_40b", 8_192, int8_weights=int8_weights)
    assert cells("precision.md", heading, "`evo2_40b`: weights")[int8_weights] == f"{weights} GB"
    assert cells("precision.md", heading, "to score")[int8_weights] == f"{total} GB"
    longest = longest_sequence(Inference("generate", int8_weights=int8_weights), 16 * GB, model_size="evo2_7b")
    told = cells("precision.md", heading, "longest sequence to generate within 16 GB")[int8_weights]
    assert told == f"{longest:,}"


@SLOW
@pytest.mark.parametrize(
    "column, options", [(0, {}), (1, {"lora_finetune": True}), (2, {"lora_finetune": True, "int8_weights": True})]
)
def test_adapters(megatron, column, options):
    planned = plan(1, model_size="evo2_1b_base", micro_batch_size=1, global_batch_size=1, **options)
    told = cells("lora.md", "`evo2_plan --lora-finetune --micro-batch-size 1", "`evo2_1b_base`, GB")
    assert told[column] == f"{planned.worst.total_bytes / GB:.1f}"


@SLOW
@pytest.mark.parametrize("num_gpus, context", [(256, 16), (512, 32)])
def test_the_published_layouts(megatron, num_gpus, context):
    num_tokens = 65_536 * context
    given = {"parallel": ParallelConfig(tensor=8, context=context), "seq_len_interpolation_factor": 8.0 * context}
    worst = plan(num_gpus, model_size="evo2_40b", seq_length=num_tokens, **given).worst
    figures = (worst.weight_bytes, worst.optimizer_bytes, worst.activation_bytes, worst.total_bytes)
    told = cells("long_context.md", "| activations | GB per GPU |", f"{num_tokens:,}", f"{num_gpus}")
    assert told == [f"TP 8, CP {context}", *(f"{number / GB:.1f}" for number in figures)]
