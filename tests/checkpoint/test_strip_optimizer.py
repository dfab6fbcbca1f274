# SPDX-License-Identifier: Apache-2.0
"""A checkpoint without its optimizer: every weight the same, nothing else left of the training state."""

import shutil

import pytest
import torch
import yaml
from torch.distributed import checkpoint as dcp

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.checkpoint import distcp
from evo2_megatron.checkpoint.strip_optimizer import folder_bytes, kept_tensors, strip_optimizer
from evo2_megatron.config import UserError

STATE = {
    "optimizer.state.exp_avg.embedding.word_embeddings.weight": torch.ones(512, 128),
    "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16).bucket_idx_0.param": torch.ones(1000),
    "opt_param_scheduler.state": torch.ones(2),
    "rng_state": torch.ones(5),
    "decoder.layers.0.mixer.dense._extra_state": torch.ones(4),
    "decoder.layers.0.mixer.dense._extra_state/shard_0_1": "bytes",
    "rng_state/shard_0.0_1.1": "bytes",
}


def read(folder):
    index = distcp.read_index(folder)
    names = {name: name for name in distcp.tensor_entries(index)}
    return {name: tensor.read() for name, tensor in distcp.stored_tensors(folder, index, names).items()}


@pytest.fixture(scope="module")
def trained(megatron, tmp_path_factory):
    """As training leaves it: weights, optimizer and random state in one folder."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("trained"), recipe="bf16_mixed")
    weights = read(folder)
    for path in (*folder.glob("*.distcp"), folder / ".metadata"):
        path.unlink()
    dcp.save(weights | STATE, checkpoint_id=folder, no_dist=True)
    return folder, weights


def test_weights_keep_every_bit(trained, tmp_path):
    folder, weights = trained
    done = []
    sizes = strip_optimizer(folder, tmp_path, on_bytes=done.append)

    stripped = read(tmp_path)
    assert stripped.keys() == weights.keys() == kept_tensors(folder).keys()
    for name, value in weights.items():
        assert stripped[name].dtype is value.dtype
        assert torch.equal(stripped[name].view(torch.uint8), value.view(torch.uint8)), name
    assert list(distcp.read_index(tmp_path).state_dict_metadata) == sorted(weights)  # no byte blob either
    assert (sizes.before, sizes.after) == (folder_bytes(folder), folder_bytes(tmp_path))
    assert sizes.after < sizes.before - 4 * 512 * 128
    assert sum(done) == sum(kept_tensors(folder).values())


def test_what_comes_along(trained, tmp_path):
    folder, _ = trained
    common = torch.load(folder / "common.pt", weights_only=True)
    assert {"optimizer", "opt_param_scheduler"} <= common.keys()
    strip_optimizer(folder, tmp_path)

    for name in ("run_config.yaml", "train_state.pt", "metadata.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "tokenizer").iterdir()) == sorted(
        p.name for p in (folder / "tokenizer").iterdir()
    )
    left = torch.load(tmp_path / "common.pt", weights_only=True)
    del common["optimizer"], common["opt_param_scheduler"], common["content_metadata"]["distrib_optim_sharding_type"]
    assert left == common


def test_the_copy_loads(trained, tmp_path):
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.config import ParallelConfig
    from evo2_megatron.runtime.distributed import process_groups

    folder, weights = trained
    copy = tmp_path / "iter_0000001"
    copy.mkdir()
    strip_optimizer(folder, copy)
    with process_groups(ParallelConfig()):
        model = load_model(copy, parallel=ParallelConfig(), precision="fp32").model
    for name, value in model.state_dict().items():
        if name in weights:
            assert torch.equal(value, weights[name].float()), name


def test_hostile_and_damaged_parts(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "iter_0000001")

    def refuse(message):
        target = tmp_path / "target"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        with pytest.raises(UserError, match=message):
            strip_optimizer(folder, target)

    torch.save({"config": yaml.Loader}, folder / "common.pt")
    refuse("damaged or holds more than plain values")
    torch.save([1, 2], folder / "common.pt")
    refuse("no table of values")
    common = (trained[0] / "common.pt").read_bytes()
    (folder / "common.pt").write_bytes(common.replace(b"iteration", b"iteratio\xd7"))
    refuse("is damaged or holds more than plain values")
    (folder / "common.pt").write_bytes(b"")
    refuse("damaged or holds more than plain values")
    (folder / "common.pt").unlink()
    refuse("has no common.pt, so the copy is incomplete")
    shutil.copyfile(trained[0] / "common.pt", folder / "common.pt")
    for path in folder.glob("*.distcp"):
        path.unlink()
    refuse("lacks the file")
