# SPDX-License-Identifier: Apache-2.0
"""Vortex to Megatron Bridge, and back to the same file."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from evo2_megatron.checkpoint.names import rows
from evo2_megatron.checkpoint.vortex import to_vortex, vortex_config
from evo2_megatron.config import UserError
from evo2_megatron.tasks.conversion.convert import vortex_to_mbridge
from parity.vortex_model import random_weights
from tasks.conversion.conversions import TINY, WEIGHTS, left_behind, new_result, save, stored

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture
def result(tmp_path):
    return new_result(tmp_path)


def vortex_file(folder, model=TINY, weights=WEIGHTS, **changes):
    """A file as Arc publishes it, and its configuration."""
    state = to_vortex(weights, model)
    for name, value in state.items():
        if name.endswith("inv_freq"):
            state[name] = value.bfloat16()
    state["blocks.0.projections._extra_state"] = None
    torch.save(state | changes, folder / "model.pt")
    (folder / "model.yml").write_text(yaml.safe_dump(vortex_config(model, vocab_size=512)))
    return folder / "model.pt"


def test_vortex_and_back(result, tmp_path):
    folder = vortex_to_mbridge(vortex_file(tmp_path), result, config=tmp_path / "model.yml", verify=True)
    found, expected = stored(folder), to_vortex(WEIGHTS, TINY)
    back = to_vortex(found, TINY)
    assert back.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("log_poles"):
            torch.testing.assert_close(back[name], value, rtol=1e-6, atol=0)
        else:
            assert torch.equal(back[name].float(), value.float()), name
    for row in (row for row in rows(TINY) if row.vortex_form == "log_poles"):
        p, gamma = (found[name] for name in row.megatron)
        assert torch.equal(p, p.bfloat16().float())  # a model in bfloat16 keeps its poles
        poles = -(p + gamma.bfloat16().float()).exp()
        torch.testing.assert_close(poles, expected[row.vortex[0]][..., 0], rtol=5e-5, atol=0)


def test_vortex_models_of_other_kinds(result, tmp_path):
    untied = replace(TINY, tied_embeddings=False, position_scale=8.0)
    weights = {name: value.bfloat16() for name, value in random_weights(untied).items()}
    source = vortex_file(tmp_path, untied, weights)
    folder = vortex_to_mbridge(source, result, config=tmp_path / "model.yml", verify=True)
    model = yaml.safe_load((folder / "run_config.yaml").read_text())["model"]
    assert model["share_embeddings_and_output_weights"] is False and model["seq_len_interpolation_factor"] == 8.0
    assert torch.equal(stored(folder)["output_layer.weight"], weights["output_layer.weight"])


def test_weights_that_are_rounded_on_the_way(result, tmp_path, caplog):
    weights = {name: value.float() + 1e-3 * torch.randn(value.shape) for name, value in WEIGHTS.items()}
    source = vortex_file(tmp_path, weights=weights)
    with caplog.at_level(logging.INFO):
        folder = vortex_to_mbridge(source, result, verify=True)
    assert "are rounded to bfloat16" in caplog.text
    same, moved = re.search(r"logits ([\d.e-]+), .* logits by up to ([\d.e-]+)", caplog.text).groups()
    assert float(same) < 1e-4 < 1e-3 < float(moved)
    name = "decoder.layers.0.mixer.dense.weight"
    assert torch.equal(stored(folder)[name], weights[name].bfloat16())


def test_vortex_file_without_a_head_of_its_own(result, tmp_path):
    state = torch.load(vortex_file(tmp_path), weights_only=True)
    del state["unembed.weight"]
    assert "output_layer.weight" not in stored(vortex_to_mbridge(Path(save(state, tmp_path / "model.pt")), result))


def test_vortex_that_does_not_fit(result, tmp_path):
    def refuse(message, changes=None, config=None, **other):
        source, path = vortex_file(tmp_path, **(changes or {})), None
        if config is not None:
            path = tmp_path / "model.yml"
            path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | config) if config else "[")
        with pytest.raises(UserError, match=message):
            vortex_to_mbridge(source, replace(result, **other), config=path)

    refuse("they are those of --model-size evo2_tiny", model_size="evo2_mini")
    refuse("_nv", model_size="striped_hyena_tiny_nv")
    refuse("not below 0", {"blocks.2.filter.log_poles": torch.ones(128, 16, 1)})
    refuse("1 not understood", {"blocks.9.filter.D": torch.ones(128)})
    refuse("of another shape", {"blocks.1.filter.D": torch.ones(64)})
    refuse("rotary base", {"blocks.3.inner_mha_cls.rotary_emb.inv_freq": torch.ones(16)})
    refuse("'blocks.0.mlp.l1.weight' is not a tensor", {"blocks.0.mlp.l1.weight": [1.0]})
    refuse("'epoch' is not a tensor", {"epoch": 3})
    refuse("embedding_layer.weight' is not", {"embedding_layer.weight": None})
    refuse("log_poles holds int64", {"blocks.2.filter.log_poles": torch.full((128, 16, 1), -1)})
    refuse("rotary_emb_base is 'x'", config={"rotary_emb_base": "x"})
    refuse("rotary_emb_base is 0", config={"rotary_emb_base": 0})
    refuse("rotary_emb_scaling_factor is inf", config={"rotary_emb_scaling_factor": float("inf")})
    refuse("max_seqlen is 8192.0; .* a whole one", config={"max_seqlen": 8192.0})
    refuse("num_layers 5 instead of 4", config={"num_layers": 5})
    refuse("no plain YAML", config={})
    with pytest.raises(UserError, match=r"cannot read .*none\.yml: No such file"):
        vortex_to_mbridge(vortex_file(tmp_path), result, config=tmp_path / "none.yml")
    with pytest.raises(UserError, match="is no file"):
        vortex_to_mbridge(tmp_path / "none.pt", result)
    nested = save({"state_dict": torch.load(vortex_file(tmp_path), weights_only=True)}, tmp_path / "nested.pt")
    with pytest.raises(UserError, match="'state_dict' is not a tensor; .* a state dict and nothing around it"):
        vortex_to_mbridge(Path(nested), result)
    with pytest.raises(UserError, match=r"1 not understood \(7\)"):
        vortex_to_mbridge(Path(save({7: torch.ones(2)}, tmp_path / "numbered.pt")), result)
    assert not left_behind(result)
