# SPDX-License-Identifier: Apache-2.0
"""The tables of planned memory in the documentation are what the code plans."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from evo2_megatron.config import ParallelConfig, WeightFormat
from evo2_megatron.tasks.planning.plan import plan
from evo2_megatron.tasks.planning.plan_inference import Inference, longest_sequence, plan_inference

DOCS = Path(__file__).parents[3] / "docs"
SLOW = pytest.mark.slow
GB = 1e9
FORMATS = get_args(WeightFormat)


def cells(page: str, heading: str, *row: str) -> list[str]:
    """Of the table whose first line contains ``heading``, what follows ``row``, the first cells of a line."""
    table = (DOCS / page).read_text().partition(heading)[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    (found,) = [line[len(row) :] for line in lines if line[: len(row)] == list(row)]
    return found


def inference(use: str, model_size: str, num_tokens: int, *, tensor: int = 1, quantize_weights: WeightFormat = "none"):
    """Weights and all, in GB."""
    parallel = ParallelConfig(tensor=tensor)
    given = {"model_size": model_size, "seq_length": num_tokens, "parallel": parallel}
    (stage,) = plan_inference(Inference(use, quantize_weights=quantize_weights), **given)
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


@pytest.mark.parametrize("weights_in", [pytest.param("none", marks=SLOW), "int8", "int4"])
def test_quantized_weights(megatron, weights_in):
    heading, column = "| bfloat16 | int8 | int4 |", FORMATS.index(weights_in)
    weights, total = inference("score", "evo2_7b", 8_192, quantize_weights=weights_in)
    assert cells("precision.md", heading, "`evo2_7b`: weights")[column] == f"{weights} GB"
    assert cells("precision.md", heading, "to score, to generate")[column].startswith(f"{total}, ")


@SLOW
@pytest.mark.parametrize("weights_in", FORMATS)
def test_quantized_weights_of_the_rest(megatron, weights_in):
    heading, column = "| bfloat16 | int8 | int4 |", FORMATS.index(weights_in)
    _, generate = inference("generate", "evo2_7b", 8_192, quantize_weights=weights_in)
    assert cells("precision.md", heading, "to score, to generate")[column].endswith(f", {generate} GB")
    weights, total = inference("score", "evo2_40b", 8_192, quantize_weights=weights_in)
    assert cells("precision.md", heading, "`evo2_40b`: weights")[column] == f"{weights} GB"
    assert cells("precision.md", heading, "to score")[column] == f"{total} GB"
    longest = longest_sequence(Inference("generate", quantize_weights=weights_in), 16 * GB, model_size="evo2_7b")
    told = cells("precision.md", heading, "longest sequence to generate within 16 GB")[column]
    assert told == f"{longest:,}"


@SLOW
@pytest.mark.parametrize(
    "column, options",
    [
        (0, {}),
        *((n, {"lora_finetune": True, "quantize_weights": name}) for n, name in enumerate(FORMATS, start=1)),
    ],
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
