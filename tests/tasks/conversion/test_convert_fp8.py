# SPDX-License-Identifier: Apache-2.0
"""The precision contract, from the source to the checkpoint: who says it, who has to, and the scales."""

import logging
from dataclasses import replace

import pytest
import torch
import yaml

from checkpoint.fp8_states import fp8_state
from checkpoint.savanna_model import savanna_state
from evo2_megatron.checkpoint.run_config import read_run_config
from evo2_megatron.checkpoint.vortex import to_vortex, vortex_config
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.tasks.conversion.convert import savanna_to_mbridge, vortex_to_mbridge
from tasks.conversion.conversions import TINY, WEIGHTS, left_behind, new_result, save

pytestmark = pytest.mark.usefixtures("megatron")
SCALES = {0: (2.0, 900.0), 1: (3.0, 800.0), 2: (4.5, 1000.25)}


@pytest.fixture
def result(tmp_path):
    return new_result(tmp_path)


@pytest.fixture
def sensitive(monkeypatch):
    """As if the size of the tests were one of Arc's that need 8 bits."""
    monkeypatch.setattr("evo2_megatron.tasks.conversion.convert.FP8_SENSITIVE", {"evo2_tiny"})


def vortex_file(folder, fp8):
    state = to_vortex(WEIGHTS, TINY)
    state |= {f"blocks.{i}.projections._extra_state": fp8_state(*pair) for i, pair in SCALES.items()}
    torch.save(state, folder / "model.pt")
    (folder / "model.yml").write_text(yaml.safe_dump(vortex_config(TINY, vocab_size=512, fp8_projections=fp8)))
    return folder / "model.pt"


def test_sizes_that_need_it_are_known():
    from evo2_megatron.architectures import ARCHITECTURES, FP8_SENSITIVE

    assert ARCHITECTURES.keys() > FP8_SENSITIVE and not any("7b" in key for key in FP8_SENSITIVE)


def test_vortex_scales_are_kept(result, tmp_path):
    folder = vortex_to_mbridge(vortex_file(tmp_path, True), replace(result, vortex_style_fp8=True))
    run_config = read_run_config(folder)
    assert run_config.fp8_scales == SCALES and run_config.model["vortex_style_fp8"] is True
    assert not run_config.fp8_was_not_said


@pytest.mark.parametrize("prefix", ["", "module."])
def test_savanna_scales_are_kept(result, tmp_path, prefix):
    state = savanna_state(WEIGHTS, TINY)
    for i, pair in SCALES.items():
        state[f"sequential.{i + 2}.mixer.dense_projection._extra_state"] = fp8_state(*pair)
    source = save({prefix + name: value for name, value in state.items()}, tmp_path / "model.pt")
    assert read_run_config(savanna_to_mbridge(source, result, verify=True)).fp8_scales == SCALES


def test_a_file_that_says_so_makes_the_user_choose(result, sensitive, tmp_path):
    source = vortex_file(tmp_path, True)
    with pytest.raises(UserError, match="give --vortex-style-fp8 .* or --no-vortex-style-fp8"):
        vortex_to_mbridge(source, result, config=tmp_path / "model.yml")
    assert not left_behind(result)
    folder = vortex_to_mbridge(source, replace(result, vortex_style_fp8=False), config=tmp_path / "model.yml")
    run_config = read_run_config(folder)
    assert run_config.model["vortex_style_fp8"] is False and not run_config.fp8_was_not_said


def test_a_size_that_does_not_care_needs_no_choice(result, tmp_path, caplog):
    folder = vortex_to_mbridge(vortex_file(tmp_path, True), result, config=tmp_path / "model.yml")
    assert read_run_config(folder).model["vortex_style_fp8"] is False
    assert "8-bit" not in caplog.text


def test_nobody_said(result, sensitive, tmp_path, caplog):
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.runtime.distributed import process_groups

    folder = vortex_to_mbridge(vortex_file(tmp_path, False), result)
    assert "(and the source has FP8 state)" in caplog.text and "--no-vortex-style-fp8" in caplog.text
    assert read_run_config(folder).fp8_was_not_said
    caplog.clear()
    with process_groups(ParallelConfig()), caplog.at_level(logging.WARNING):
        load_model(folder, parallel=ParallelConfig(), precision="fp32")
        assert "was converted without saying" in caplog.text
        caplog.clear()
        load_model(folder, parallel=ParallelConfig(), precision="fp32", fp8="emulate")
        assert "was converted without saying" not in caplog.text
