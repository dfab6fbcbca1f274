# SPDX-License-Identifier: Apache-2.0
"""NeMo 2 to Megatron Bridge: the same bytes under other names."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from torch.distributed import checkpoint as dcp

from evo2_megatron.checkpoint import distcp
from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import tokenizer_dir
from evo2_megatron.tasks.conversion.convert import nemo2_to_mbridge
from tasks.conversion.conversions import WEIGHTS, left_behind, new_result, stored

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture
def result(tmp_path):
    return new_result(tmp_path)


@pytest.fixture
def nemo2(tmp_path):
    """A folder as NeMo 2 leaves it after training."""
    tensors = {f"module.{name}": value for name, value in WEIGHTS.items()}
    tensors["optimizer.state.exp_avg.module.decoder.final_norm.weight"] = torch.ones(128)
    tensors["module.decoder.layers.0.mixer.dense._extra_state/shard_0_1"] = "bytes"
    dcp.save(tensors, checkpoint_id=tmp_path / "nemo2/weights", no_dist=True)
    (tmp_path / "nemo2/weights/metadata.json").write_text(json.dumps(distcp.FORMAT))
    (tmp_path / "nemo2/context").mkdir()
    return tmp_path / "nemo2"


def test_nemo2(nemo2, result):
    folder = nemo2_to_mbridge(nemo2, replace(result, seq_length=1024, vortex_style_fp8=True), verify=True)
    found = stored(folder)
    assert found.keys() == WEIGHTS.keys()
    assert all(x.dtype is WEIGHTS[name].dtype and torch.equal(x, WEIGHTS[name]) for name, x in found.items())
    config = yaml.safe_load((folder / "run_config.yaml").read_text())
    assert config["model"]["seq_length"] == 1024 and config["model"]["vortex_style_fp8"] is True
    assert config["converted_from"]["format"] == "nemo2"


def test_nemo2_that_does_not_fit(nemo2, result, tmp_path):
    def refuse(message, source=nemo2, **changes):
        with pytest.raises(UserError, match=message):
            nemo2_to_mbridge(source, replace(result, **changes))

    refuse("not understood|missing", model_size="evo2_mini")
    refuse("has 256 tokens", tokenizer=tokenizer_dir(256))
    refuse("has no folder 'weights'", source=tmp_path)
    refuse("exists already", directory=tmp_path)
    for content, message in (('{"sharded_backend": "zarr"}', "format 'zarr'"), ("{", "is not JSON")):
        (nemo2 / "weights/metadata.json").write_text(content)
        refuse(message)
    (nemo2 / "weights/metadata.json").unlink()
    refuse("has no metadata.json")
    assert not left_behind(result)
