# SPDX-License-Identifier: Apache-2.0
"""Gradients reach every adapter and every module kept trainable, under recompute and whatever the parallel layout."""

from pathlib import Path

import pytest
import torch

from checkpoint.tiny_adapters import write_tiny_adapters
from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig
from evo2_megatron.ops.zigzag import zigzag_unsplit
from model.layout_worker import LAYOUTS, PATTERN
from model.lora_worker import run
from model.test_layouts import assert_close
from processes import launch

WORKER = Path(__file__).with_name("lora_worker.py")
# layer 5 is on the last of two pipeline stages
KEPT = ["word_embeddings", "output_layer", "final_norm", "*.layers.5.*.filter"]
CASES = [
    pytest.param(
        {"skip_freeze_modules": KEPT},
        ("one", "tensor 2", "tensor 2, sequence", "context 2", "pipeline 2"),
        id="all layers",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        {"target_modules": ["*.layers.4.*.linear_fc1"]}, ("pipeline 2",), id="idle stage", marks=pytest.mark.slow
    ),
]


@pytest.fixture(scope="module")
def base(megatron, tmp_path_factory):
    """A model that the adapters belong to, halves of which have whole groups of 4-bit weights."""
    folder = tmp_path_factory.mktemp("base")
    pattern = {"hybrid_override_pattern": PATTERN, "num_layers": len(PATTERN)}
    return write_tiny_checkpoint(folder, ffn_hidden_size=256, **pattern)


@pytest.mark.parametrize("fields, layouts", CASES)
def test_every_layout_equals_one_process(base, tmp_path, fields, layouts):
    checkpoint = write_tiny_adapters(tmp_path, base, **fields)
    want = run(base, checkpoint, ParallelConfig())
    assert want["gradients"].keys() == expected_names(**fields)
    launch(WORKER, base, checkpoint, "none", *layouts)
    for layout in layouts:
        compare(torch.load(tmp_path / f"{layout}.pt"), want, layout)


@pytest.mark.slow
@pytest.mark.parametrize("weights_in", ["int8", "int4"])
def test_quantized_weights(base, tmp_path, weights_in):
    """The scales of a part are the whole's; products are rounded to bfloat16, each part by itself."""
    checkpoint, layouts = write_tiny_adapters(tmp_path, base), ("tensor 2", "tensor 2, sequence", "pipeline 2")
    want = run(base, checkpoint, ParallelConfig(), quantize_weights=weights_in)
    wide = run(base, checkpoint, ParallelConfig())
    assert distance(want, wide) > 0.03
    launch(WORKER, base, checkpoint, weights_in, *layouts)
    for layout in layouts:
        assert distance(torch.load(tmp_path / f"{layout}.pt"), want) < 0.03, layout


def distance(got, want):
    """Largest relative root mean square by which gradients differ."""
    of_each = (
        (got["gradients"][name] - gradient).norm() / gradient.norm() for name, gradient in want["gradients"].items()
    )
    return max(of_each).item()


def compare(got, want, layout):
    for row in range(4):
        parts = [got["losses"][row, rank] for rank in range(LAYOUTS[layout].context)]
        loss_BL = parts[0] if len(parts) == 1 else zigzag_unsplit(parts, 1)
        assert_close(loss_BL, want["losses"][row, 0], f"{layout}: loss of sequence {row}")
    # under pipeline parallelism the last stage has a copy of a tied embedding
    assert got["gradients"].keys() - {"output_layer.weight"} == want["gradients"].keys()
    for name, gradient in want["gradients"].items():
        assert gradient.abs().max() > 0, name
        assert_close(got["gradients"][name], gradient, f"{layout}: {name}")
    assert got["spread"].keys() == want["spread"].keys()
    for name, spread in want["spread"].items():
        # adapters begin alike; of 512 numbers or more
        assert got["spread"][name] == pytest.approx(spread, rel=0.15), f"{layout}: {name}"


def expected_names(target_modules=None, skip_freeze_modules=()):
    adapted = ["decoder.layers.4.mlp.linear_fc1"]
    if target_modules is None:
        adapted = [
            f"decoder.layers.{i}.{name}"
            for i, symbol in enumerate(PATTERN)
            for name in (
                *(f"mlp.{name}" for name in ("linear_fc1", "linear_fc2")),
                *(
                    ("self_attention.linear_qkv", "self_attention.linear_proj")
                    if symbol == "*"
                    else ("mixer.dense_projection", "mixer.dense")
                ),
            )
        ]
    names = {f"{path}.adapter.linear_{end}.weight" for path in adapted for end in ("in", "out")}
    if skip_freeze_modules:
        names |= {"embedding.word_embeddings.weight", "decoder.final_norm.weight"}
        names |= {f"decoder.layers.5.mixer.mixer.filter.{name}" for name in ("p", "R", "gamma")}
    return names
