# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that asks for 8-bit input projections: refused, rounded, or run without; each says so."""

import logging
from pathlib import Path

import pytest
import torch
import yaml

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig, UserError

ONE = ParallelConfig()
TOKENS_BL = torch.tensor([list(b"GATTACA" * 9)])


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    """Asks for it, and has scales for two of its three Hyena layers."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("sensitive"), recipe="bf16_mixed")
    path = folder / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["vortex_style_fp8"] = True
    config["fp8_scales"] = {0: [3.0, 500.0], 2: [7.0, 900.0]}
    path.write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def load(checkpoint):
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.runtime.distributed import process_groups

    with process_groups(ONE):
        yield lambda **settings: load_model(checkpoint, parallel=ONE, **settings)


def logits(loaded):
    with torch.no_grad():
        return loaded.model(TOKENS_BL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what a machine without FP8 hardware says")
@pytest.mark.parametrize("precision", [None, "fp32"])
def test_refused_in_one_line_that_names_both_ways_out(load, precision):
    with pytest.raises(UserError) as refused:
        load(precision=precision)
    message = str(refused.value)
    assert "\n" not in message and "is to run with FP8 input projections" in message
    assert "--fp8-emulation" in message and "--allow-precision-mismatch" in message


@pytest.mark.gpu
def test_a_gpu_with_fp8_computes_what_is_asked_for(load):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    tokens_BL = TOKENS_BL.cuda()
    loaded, rounded = load(), load(fp8="emulate")
    assert loaded.fp8_projections == "hardware"
    with torch.no_grad():
        got, want = loaded.model(tokens_BL).float(), rounded.model(tokens_BL).float()
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_allowed_mismatch_is_told(load, caplog):
    with caplog.at_level(logging.WARNING, logger="evo2_megatron"):
        loaded = load(precision="fp32", fp8="allow_mismatch")
    assert loaded.fp8_projections == "mismatch" and not loaded.provider.fp8_emulation
    assert "runs in fp32 without them (--allow-precision-mismatch)" in caplog.text
    plain = load(precision="fp32", provider_overrides={"vortex_style_fp8": False})
    assert plain.fp8_projections == "not_asked" and torch.equal(logits(loaded), logits(plain))


def test_emulated_with_the_scales_of_the_checkpoint(load, caplog):
    from evo2_megatron.model.fp8_linear import Scales

    with caplog.at_level(logging.INFO, logger="evo2_megatron"):
        loaded = load(precision="fp32", fp8="emulate")
    assert loaded.fp8_projections == "emulated" and "FP8 scales of 2 projections" in caplog.text
    layers = loaded.model.decoder.layers
    assert [layers[i].mixer.dense_projection.scales for i in range(3)] == [Scales(3, 500), Scales(), Scales(7, 900)]
    plain = load(precision="fp32", fp8="allow_mismatch")
    difference = (logits(loaded) - logits(plain)).std() / logits(plain).std()
    assert 1e-3 < difference < 0.2


def test_emulation_in_16_bits_is_near_that_in_32(load):
    wide, narrow = (logits(load(precision=name, fp8="emulate")) for name in ("fp32", "bf16_mixed"))
    plain = logits(load(precision="fp32", fp8="allow_mismatch"))
    assert (wide - narrow).std() < (wide - plain).std()


def test_emulation_where_it_is_not_asked_for_warns(load, caplog):
    loaded = load(precision="fp32", fp8="emulate", provider_overrides={"vortex_style_fp8": False})
    assert loaded.fp8_projections == "emulated"
    assert "does not ask for FP8 input projections; rounding them changes its predictions" in caplog.text


def test_asked_for_by_the_caller_alone(load):
    with pytest.raises(UserError, match="--allow-precision-mismatch"):
        load(precision="fp32", provider_overrides={"vortex_style_fp8": True})


def settle(choice="as_asked", asked=True, fp8=None, hidden_size=128, quantize_weights="none"):
    from types import SimpleNamespace

    from evo2_megatron.checkpoint import precision_contract

    provider = SimpleNamespace(
        vortex_style_fp8=asked, fp8_emulation=False, hidden_size=hidden_size, quantize_weights=quantize_weights
    )
    settings = SimpleNamespace(fp8=fp8, fp4=None)
    name = "bf16_with_fp8_current_scaling_mixed" if fp8 else "bf16_mixed"
    run_config = SimpleNamespace(path=Path("ckpt", "run_config.yaml"), fp8_was_not_said=False)
    return precision_contract.settle(provider, name, settings, choice, run_config)


def test_a_recipe_of_8_bits_keeps_the_contract(megatron):
    assert settle(fp8="hybrid") == "recipe"
    assert settle(fp8="hybrid", asked=False) == "not_asked"
    with pytest.raises(UserError, match="leave it out"):
        settle("emulate", fp8="hybrid")
    assert settle(asked=False, quantize_weights="int8") == "not_asked"
    with pytest.raises(UserError, match="leave out --quantize-weights"):
        settle(asked=False, fp8="hybrid", quantize_weights="int8")


def test_fp8_hardware_is_used(megatron, monkeypatch, caplog):
    monkeypatch.setattr("evo2_megatron.runtime.megatron.on_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    assert settle(hidden_size=8192) == "hardware" and settle(asked=False) == "not_asked"
    assert "short sums" not in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (10, 0))
    assert settle(hidden_size=8192) == "hardware" and "needs their short sums" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (8, 0))
    with pytest.raises(UserError, match="no FP8 hardware"):
        settle()


@pytest.mark.parametrize("hidden_size, told", [(1920, False), (8192, True)])
def test_what_rounding_does_not_restore_is_told(megatron, caplog, hidden_size, told):
    settle("emulate", hidden_size=hidden_size)
    assert ("short sums of Hopper" in caplog.text) == told


@pytest.mark.parametrize("section", ["scales", {0: 1.0}, {0: [1.0]}, {0: [1.0, 0.0]}, {0: [1.0, float("nan")]}, [1]])
def test_damaged_scales(checkpoint, section):
    from evo2_megatron.checkpoint.run_config import read_run_config

    run_config = read_run_config(checkpoint)
    run_config.sections["fp8_scales"] = section
    with pytest.raises(UserError, match="section 'fp8_scales'"):
        _ = run_config.fp8_scales
