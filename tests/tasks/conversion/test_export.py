# SPDX-License-Identifier: Apache-2.0
"""Megatron Bridge to Vortex, and checkpoints without their optimizer; the proof by Vortex itself is in parity."""

import fcntl
import json
import logging
import shutil
from unittest import mock

import pytest
import torch
import yaml

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.checkpoint import distcp
from evo2_megatron.checkpoint.names import unfused
from evo2_megatron.checkpoint.tensors import in_memory
from evo2_megatron.checkpoint.vortex import to_vortex
from evo2_megatron.config import UserError
from evo2_megatron.tasks.conversion import export
from evo2_megatron.tasks.conversion.export import mbridge_to_vortex, remove_optimizer
from tasks.conversion.conversions import TINY, WEIGHTS


@pytest.fixture(scope="module")
def tiny(megatron, tmp_path_factory):
    """The folder of one iteration; not to be changed."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), recipe="bf16_mixed", rotary_base=500_000)


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy/iter_0000001")


def stored(folder):
    index = distcp.read_index(folder)
    names = {name: name for name in distcp.tensor_entries(index)}
    return {name: tensor.read() for name, tensor in distcp.stored_tensors(folder, index, names).items()}


def test_export(tiny, tmp_path):
    output = tmp_path / "new/folder/model.pt"
    files = mbridge_to_vortex(tiny.parent, output, model_size="evo2_tiny", verify=True)

    assert files == [output, output.with_name("model.yml"), output.with_name("config.json")]
    assert sorted(files) == sorted(output.parent.iterdir())
    expected = to_vortex(stored(tiny), TINY)
    written = torch.load(output, weights_only=True)
    assert list(written) == list(expected)
    for name, value in expected.items():
        if not name.endswith("inv_freq"):
            assert written[name].dtype is value.dtype and torch.equal(written[name], value), name
    assert written["unembed.weight"].data_ptr() == written["embedding_layer.weight"].data_ptr()
    assert written["blocks.2.filter.log_poles"].dtype is written["blocks.2.filter.residues"].dtype is torch.float32
    # the checkpoint's own numbers, not those of the model size
    frequencies = written["blocks.3.inner_mha_cls.rotary_emb.inv_freq"]
    torch.testing.assert_close(frequencies, 5e5 ** -(torch.arange(0, 32, 2) / 32))
    config = yaml.safe_load(files[1].read_text())
    assert (config["rotary_emb_base"], config["max_seqlen"], config["vocab_size"]) == (500_000, 256, 512)
    assert config["use_fp8_input_projections"] is False
    assert json.loads(files[2].read_text()) == {
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "ffn_hidden_size": 352,
        "seq_length": 256,
        "hybrid_override_pattern": "SDH*",
        "num_groups_hyena": 128,
        "vocab_size": 512,
    }


def test_medium_filters_of_16_bits_are_not_rounded_again():
    """Of training in bfloat16: --verify, which computes in float32, took the rounded product for a wrong one."""
    h, decay = (WEIGHTS[f"decoder.layers.1.mixer.mixer.filter.{name}"] for name in ("h", "decay"))
    assert h.dtype is decay.dtype is torch.bfloat16
    assert torch.equal(to_vortex(WEIGHTS, TINY)["blocks.1.filter.h"][:, 0].double(), h.double() * decay.double())


def test_frequencies_as_arc_has_them(tiny, tmp_path):
    mbridge_to_vortex(tiny, tmp_path / "model.pt", bf16_frequencies=True)
    name = "blocks.3.inner_mha_cls.rotary_emb.inv_freq"
    rounded = torch.load(tmp_path / "model.pt", weights_only=True)[name]
    exact = 5e5 ** -(torch.arange(0, 32, 2) / 32)
    assert rounded.dtype is torch.float32 and torch.equal(rounded, exact.bfloat16().float())


def test_files_in_the_way(tiny, tmp_path):
    for name in ("model.pt", "model.yml", "config.json"):
        (tmp_path / name).write_bytes(b"somebody's \xff")
        with pytest.raises(UserError, match=f"{name} exists already"):
            mbridge_to_vortex(tiny, tmp_path / "model.pt")
        assert [path.name for path in tmp_path.iterdir()] == [name]
        (tmp_path / name).unlink()
    for name in ("a.yml", "config.json"):
        with pytest.raises(UserError, match="is for the weights, and so is called what stands beside them"):
            mbridge_to_vortex(tiny, tmp_path / name)
    assert not list(tmp_path.iterdir())
    mbridge_to_vortex(tiny, tmp_path / "a.pt")
    mbridge_to_vortex(tiny, tmp_path / "b.pt")  # config.json of an earlier export is replaced
    with pytest.raises(UserError, match=r"a\.pt exists already"):
        mbridge_to_vortex(tiny, tmp_path / "a.pt")


def test_the_next_run_removes_what_a_killed_one_left(tiny, tmp_path, caplog):
    left, alive, others = (tmp_path / f".{name}.partial" for name in ("model.pt.17", "model.pt.18", "other.pt.19"))
    for path in (left, alive, others):
        path.write_text("half")
    with alive.open() as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        mbridge_to_vortex(tiny, tmp_path / "model.pt")
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.pt", "model.yml", "config.json", alive.name, others.name
    }  # fmt: skip
    assert f"Removing {left}, which a run that was killed has left" in caplog.text


def test_an_export_keeps_what_it_writes_from_others(tiny, tmp_path):
    from evo2_megatron.runtime.file_lock import is_abandoned

    def look(*args, **options):
        write(*args, **options)
        seen.extend(is_abandoned(path) for path in tmp_path.glob(".model.pt.*.partial"))

    write, seen = export.write_torch_file, []
    with mock.patch.object(export, "write_torch_file", look):
        mbridge_to_vortex(tiny, tmp_path / "model.pt")
    assert seen == [False]


def test_models_that_vortex_cannot_have(megatron, tmp_path):
    nv = write_tiny_checkpoint(tmp_path / "nv", use_short_conv_bias=True, remove_activation_post_first_layer=False)
    biased = write_tiny_checkpoint(tmp_path / "bias", add_bias_output=True, share_embeddings_and_output_weights=False)
    for checkpoint, reason in (
        (nv, "no bias in its short convolution and no tanh GELU"),
        (biased, "output projection"),
    ):
        with pytest.raises(UserError, match=reason):
            mbridge_to_vortex(checkpoint, tmp_path / "out/model.pt")
    assert not (tmp_path / "out").exists()


def test_wrong_model_size(tiny, tmp_path):
    with pytest.raises(
        UserError, match="not a model of size evo2_mini: pattern SDH. instead of .*leave --model-size out"
    ):
        mbridge_to_vortex(tiny, tmp_path / "model.pt", model_size="evo2_mini")


def test_names_without_fused_layers(tiny, copy, tmp_path):
    with pytest.raises(UserError, match="--no-te"):
        mbridge_to_vortex(tiny, tmp_path / "model.pt", unfused_names=True)
    index, names = distcp.read_index(tiny), distcp.tensor_entries(distcp.read_index(tiny))
    for path in (*copy.glob("*.distcp"), copy / ".metadata"):
        path.unlink()
    distcp.copy_tensors(tiny, index, {name: unfused(name) for name in names}, copy)
    for path, checkpoint, flag in (("a.pt", tiny, False), ("b.pt", copy, False), ("c.pt", copy, True)):
        mbridge_to_vortex(checkpoint, tmp_path / path, unfused_names=flag, verify=True)
    first, *others = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in "abc")
    for other in others:
        assert other.keys() == first.keys() and all(torch.equal(other[name], first[name]) for name in first)

    twice = {name: in_memory(value) for name, value in stored(tiny).items()}
    twice["decoder.layers.0.norm.weight"] = in_memory(torch.zeros(128))
    for path in (*copy.glob("*.distcp"), copy / ".metadata"):
        path.unlink()
    distcp.write_tensors(twice, copy)
    with pytest.raises(UserError, match=r"1 not understood \(decoder.layers.0.norm.weight\)"):
        mbridge_to_vortex(copy, tmp_path / "d.pt")


def test_half_a_model(tiny, copy, tmp_path):
    index = distcp.read_index(tiny)
    kept = {name: name for name in distcp.tensor_entries(index) if "conv_bias" not in name}
    for path in (*copy.glob("*.distcp"), copy / ".metadata"):
        path.unlink()
    distcp.copy_tensors(tiny, index, kept, copy)
    with pytest.raises(UserError, match=r"2 missing \(decoder.layers.1.mixer.mixer.conv_bias, decoder.layers.2"):
        mbridge_to_vortex(copy, tmp_path / "out/model.pt")
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing(tiny, tmp_path):
    with mock.patch.object(export.json, "dumps", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        mbridge_to_vortex(tiny, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_verification_notices_a_wrong_file(tiny, tmp_path):
    def scaled(tensors, *args, **options):
        tensors["norm.scale"] = export.distcp.StoredTensor(
            tensors["norm.scale"].shape,
            torch.bfloat16,
            lambda start, stop: 1.02 * tensors["blocks.0.pre_norm.scale"].read_rows(start, stop),
        )
        return write(tensors, *args, **options)

    write = export.write_torch_file
    with mock.patch.object(export, "write_torch_file", scaled), pytest.raises(UserError, match="verification failed"):
        mbridge_to_vortex(tiny, tmp_path / "out/model.pt", verify=True)
    assert not list(tmp_path.rglob("*.*"))


def test_remove_optimizer(tiny, tmp_path, caplog):
    source = shutil.copytree(tiny.parent, tmp_path / "run")
    (tmp_path / "small/.iter_0000012.17.partial").mkdir(parents=True)  # of a run that was killed
    shutil.copytree(tiny, source / "iter_0000012")
    (source / "latest_checkpointed_iteration.txt").write_text("12\n")
    with caplog.at_level(logging.INFO):
        folder = remove_optimizer(source, tmp_path / "small", verify=True)
    assert folder == tmp_path / "small/iter_0000012"
    assert (tmp_path / "small/latest_checkpointed_iteration.txt").read_text() == "12\n"
    assert (tmp_path / "small/latest_train_state.pt").read_bytes() == (folder / "train_state.pt").read_bytes()
    before, after = stored(source / "iter_0000012"), stored(folder)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "verified: all 41 tensors are equal" in caplog.text and "GB before" in caplog.text

    with pytest.raises(UserError, match="exists already"):
        remove_optimizer(source, tmp_path / "small")
    # one iteration may be given, too; the new folder is a complete one all the same
    remove_optimizer(source / "iter_0000001", tmp_path / "first")
    assert (tmp_path / "first/latest_checkpointed_iteration.txt").read_text() == "1\n"
    (source / "mine").symlink_to("iter_0000012")
    assert remove_optimizer(source / "mine", tmp_path / "linked") == tmp_path / "linked/iter_0000012"
    (source / "mine").unlink()
    (source / "iter_0000001").rename(source / "mine")
    with pytest.raises(UserError, match="not named iter_<number>"):
        remove_optimizer(source / "mine", tmp_path / "other")
    with pytest.raises(UserError, match="does not exist; check --src-ckpt-dir"):
        remove_optimizer(tmp_path / "nowhere", tmp_path / "other")
    (source / "iter_0000012/run_config.yaml").write_text("model: 1\n")
    with pytest.raises(UserError, match="iter_0000012/run_config.yaml"):
        remove_optimizer(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()
