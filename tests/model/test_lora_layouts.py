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
ADAPTERS = {
    "all layers": {"skip_freeze_modules": ["word_embeddings", "output_layer", "final_norm", "*.layers.2.*.filter"]},
    # so that the first pipeline stage has nothing to train
    "one layer": {"target_modules": ["*.layers.4.*.linear_fc1"]},
}
QUICK = ("tensor 2, sequence", "pipeline 2")
SLOW = ("one", "tensor 2", "context 2")


@pytest.fixture(scope="module")
def alone(megatron, tmp_path_factory):
    """The base, and for each kind of adapters their checkpoint and one process's answer."""
    folder = tmp_path_factory.mktemp("lora")
    base = write_tiny_checkpoint(folder / "base", hybrid_override_pattern=PATTERN, num_layers=len(PATTERN))
    checkpoints = {
        kind: write_tiny_adapters(folder / "adapters", base, iteration=number, **fields)
        for number, (kind, fields) in enumerate(ADAPTERS.items(), 1)
    }
    return base, {kind: (folder, run(base, folder, ParallelConfig())) for kind, folder in checkpoints.items()}


@pytest.fixture(scope="module", params=[QUICK, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["quick", "slow"])
def answers(request, alone):
    """By kind of adapters and layout: what two processes give, and what one does."""
    base, checkpoints = alone
    launch(WORKER, base, next(iter(checkpoints.values()))[0].parent, *request.param)
    return {
        (kind, name): (torch.load(checkpoint.parent / f"{checkpoint.name}-{name}.pt"), want)
        for kind, (checkpoint, want) in checkpoints.items()
        for name in request.param
    }


def test_every_layout_equals_one_process(answers):
    for (_, layout), (got, want) in answers.items():
        for row in range(4):
            parts = [got["losses"][row, rank] for rank in range(LAYOUTS[layout].context)]
            loss_BL = parts[0] if len(parts) == 1 else zigzag_unsplit(parts, 1)
            assert_close(loss_BL, want["losses"][row, 0], f"{layout}: loss of sequence {row}")
        # under pipeline parallelism the last stage has a copy of a tied embedding
        assert got["gradients"].keys() - {"output_layer.weight"} == want["gradients"].keys()
        for name, gradient in want["gradients"].items():
            assert gradient.abs().max() > 0, name
            assert_close(got["gradients"][name], gradient, f"{layout}: {name}")


def test_adapters_begin_alike(answers):
    for (_, layout), (got, want) in answers.items():
        assert got["spread"].keys() == want["spread"].keys()
        for name, spread in want["spread"].items():
            # of 512 numbers or more
            assert got["spread"][name] == pytest.approx(spread, rel=0.15), f"{layout}: {name}"


def test_what_is_trained(alone):
    names = {kind: set(one["gradients"]) for kind, (_, one) in alone[1].items()}
    adapters = {name for name in names["all layers"] if ".adapter." in name}
    assert len(adapters) == 2 * 4 * len(PATTERN)
    assert names["all layers"] - adapters == {
        "embedding.word_embeddings.weight",
        "decoder.final_norm.weight",
        *(f"decoder.layers.2.mixer.mixer.filter.{name}" for name in ("p", "R", "gamma")),
    }
    assert names["one layer"] == {
        f"decoder.layers.4.mlp.linear_fc1.adapter.linear_{end}.weight" for end in ("in", "out")
    }
