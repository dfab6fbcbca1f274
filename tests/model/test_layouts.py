# SPDX-License-Identifier: Apache-2.0
"""Every parallel layout gives the loss, the logits and the gradients of one process."""

from pathlib import Path

import pytest
import torch

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig
from evo2_megatron.ops.zigzag import zigzag_unsplit
from model.layout_worker import LAYOUTS, PATTERN, run
from processes import launch

WORKER = Path(__file__).with_name("layout_worker.py")
QUICK = ("one", "tensor 2, sequence", "context 2", "pipeline 4", "context 2 x pipeline 2")
REST = tuple(name for name in LAYOUTS if name not in QUICK)
STYLES = [
    pytest.param(("evo2_tiny", QUICK), id="evo2_tiny"),
    pytest.param(("evo2_tiny", REST), id="evo2_tiny, rest", marks=pytest.mark.slow),
    pytest.param(("striped_hyena_tiny_nv", tuple(LAYOUTS)), id="striped_hyena_tiny_nv", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=STYLES)
def answers(request, megatron, tmp_path_factory):
    """One process's answer, and that of four under each of some layouts."""
    folder = tmp_path_factory.mktemp("layouts")
    model_size, layouts = request.param
    checkpoint = write_tiny_checkpoint(
        folder / "checkpoint", model_size=model_size, hybrid_override_pattern=PATTERN, num_layers=len(PATTERN)
    )
    launch(WORKER, checkpoint, folder, *layouts)
    return run(checkpoint, ParallelConfig()), {name: torch.load(folder / f"{name}.pt") for name in layouts}


def assert_close(got, want, name, rtol=1e-5):
    """Largest difference relative to the largest value."""
    assert got.shape == want.shape, name
    assert (got - want).abs().max() <= rtol * want.abs().max(), (
        f"{name}: {(got - want).abs().max() / want.abs().max():.2g} relative"
    )


def test_every_layout_equals_one_process(answers):
    want, of_layouts = answers
    for layout, got in of_layouts.items():
        _compare(got, want, layout)


def _compare(got, want, layout):
    for row in range(4):
        parts = [got["losses"][row, rank] for rank in range(LAYOUTS[layout].context)]
        loss_BL = parts[0] if len(parts) == 1 else zigzag_unsplit(parts, 1)
        assert_close(loss_BL, want["losses"][row, 0], f"loss of sequence {row}")
    assert_close(got["logits"], want["logits"], "logits")
    tied = got["gradients"].keys() - want["gradients"].keys()
    assert tied <= {"output_layer.weight"} and want["gradients"].keys() <= got["gradients"].keys()
    for name in tied:  # the last stage's copy of the embedding
        assert_close(got["gradients"][name], want["gradients"]["embedding.word_embeddings.weight"], name)
    for name, gradient in want["gradients"].items():
        assert gradient.abs().max() > 0, name
        assert_close(got["gradients"][name], gradient, name)
    if "decoded" in got:
        assert_close(got["decoded"], want["decoded"], "cached logits")
        assert len(got["generated"]) == 4 and all(ids == 3 * [want["generated"][0][0]] for ids in got["generated"])
