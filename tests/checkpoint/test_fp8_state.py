# SPDX-License-Identifier: Apache-2.0
"""Scales of 8-bit projections out of pickles that name classes which are not here, without running anything."""

import io
import pickle

import pytest
import torch

from checkpoint.fp8_states import fp8_state
from evo2_megatron.checkpoint.fp8_state import read_scales
from helpers import Hostile

NAMES = {0: "blocks.0.projections._extra_state", 2: "blocks.2.projections._extra_state"}


def test_scales_are_read_and_empty_entries_have_none():
    state = {NAMES[0]: fp8_state(3.5, 2041.75), NAMES[2]: io.BytesIO(), "blocks.3.x": torch.ones(2)}
    assert read_scales(state, NAMES) == {0: (3.5, 2041.75)}
    assert read_scales(state | {NAMES[2]: None}, NAMES) == {0: (3.5, 2041.75)}
    assert read_scales({}, NAMES) == {}


def test_nothing_that_the_file_names_is_run_or_imported(tmp_path, monkeypatch):
    entry = fp8_state(2.0, 4.0, extra=Hostile(tmp_path / "made"))
    torch.load(entry, weights_only=False)  # it would be
    assert (tmp_path / "made").exists()
    (tmp_path / "made").unlink()
    # its classes cannot be found, as Transformer Engine's on a machine without it
    monkeypatch.delattr("checkpoint.fp8_states.DelayedScaling")
    assert read_scales({NAMES[0]: entry}, NAMES) == {0: (2.0, 4.0)}
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "entry",
    [
        io.BytesIO(b"FP8 history"),
        io.BytesIO(pickle.dumps({"scale_fwd": 1})),
        torch.zeros(5, dtype=torch.uint8),
        fp8_state(0.0, 1.0),
        fp8_state(float("inf"), 1.0),
        fp8_state(1.0, 1.0, scale_fwd=torch.ones(1)),
        fp8_state(1.0, 1.0, scale_fwd="1"),
        fp8_state(1.0, 1.0, scale_fwd=torch.ones(3, dtype=torch.float64)),
    ],
)
def test_what_cannot_be_read_is_told_and_leaves_no_half(entry, caplog):
    state = {NAMES[0]: fp8_state(2.0, 4.0), NAMES[2]: entry}
    assert read_scales(state, NAMES) == {}
    assert "blocks.2.projections._extra_state is not FP8 state" in caplog.text and "will use 1" in caplog.text
