# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of LoRA adapters: found with their base, loaded without a merge, and merged."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml

from checkpoint.tiny_adapters import ALL_LINEAR, write_tiny_adapters
from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.checkpoint.adapter import base_checkpoint, merged_tensors, read_adapters
from evo2_megatron.checkpoint.distcp import copy_tensors, read_index, stored_tensors
from evo2_megatron.checkpoint.load import load_model, tensor_shapes
from evo2_megatron.checkpoint.names import unfused
from evo2_megatron.checkpoint.run_config import read_run_config
from evo2_megatron.config import ParallelConfig, UserError

ONE = ParallelConfig()
TOKENS_BL = torch.tensor(list(b"ACGTTGCATTAACCGGTATA"))[None]
KEPT = ["final_norm", "*.layers.1.*.filter", "word_embeddings", "output_layer"]


@pytest.fixture(scope="module")
def base(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    return write_tiny_adapters(tmp_path_factory.mktemp("adapters"), base, skip_freeze_modules=KEPT)


@pytest.fixture
def copy(adapters, tmp_path):
    """A checkpoint of adapters that a test may damage."""
    return shutil.copytree(adapters, tmp_path / adapters.name)


def edit(checkpoint, change):
    path = checkpoint / "run_config.yaml"
    sections = yaml.safe_load(path.read_text())
    change(sections)
    path.write_text(yaml.safe_dump(sections))


def logits(checkpoint, **options):
    from evo2_megatron.runtime.distributed import process_groups

    with process_groups(ONE), torch.inference_mode():
        return load_model(checkpoint, parallel=ONE, precision="fp32", **options).model(TOKENS_BL)


def by_hand(base, adapters, scale=2.0):
    """Logits of the base model with every trained tensor put in its place."""
    from evo2_megatron.runtime.distributed import process_groups

    with process_groups(ONE), torch.inference_mode():
        model = load_model(base, parallel=ONE, precision="fp32").model
        weights, own = model.state_dict(), plain_tensors(adapters)
        for name, tensor in own.items():
            if ".adapter." not in name:
                weights[name] = tensor
            elif "linear_in" in name:
                path = name.removesuffix(".adapter.linear_in.weight")
                weights[f"{path}.weight"] += scale * own[f"{path}.adapter.linear_out.weight"] @ tensor
        model.load_state_dict(weights)
        return model(TOKENS_BL)


def plain_tensors(checkpoint):
    names = {name: name for name in tensor_shapes(checkpoint)}
    return {name: tensor.read() for name, tensor in stored_tensors(checkpoint, read_index(checkpoint), names).items()}


def test_adapters_are_loaded_onto_their_base(base, adapters):
    got = logits(adapters)
    torch.testing.assert_close(got, by_hand(base, adapters), rtol=0, atol=1e-5)
    assert (got - logits(base)).abs().max() > 0.1
    # neither the scale nor what was kept trainable may be lost on the way
    assert (got - by_hand(base, adapters, scale=1.0)).abs().max() > 0.1


def test_former_recipes_checkpoints(adapters, copy):
    def rename(sections):
        sections["peft"]["_target_"] = "bionemo.evo2.models.evo2_lora.Evo2LoRA"

    edit(copy, rename)
    assert torch.equal(logits(copy), logits(adapters))


def test_the_first_layers_only(adapters):
    overrides = {"num_layers": 2, "hybrid_override_pattern": "SD"}
    assert logits(adapters, provider_overrides=overrides).shape == logits(adapters).shape


def test_a_base_that_moved(base, adapters, copy, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved" / base.name).parent

    def forget(sections):
        sections["checkpoint"]["pretrained_checkpoint"] = str(tmp_path / "gone")

    edit(copy, forget)
    with pytest.raises(UserError, match="is not in .*/gone any more; give its folder with --base-ckpt-dir"):
        logits(copy)
    assert torch.equal(logits(copy, base_ckpt_dir=moved), logits(adapters))


@pytest.mark.parametrize("which, message", [("adapters", "evo2_merge_lora"), ("nowhere", "check --base-ckpt-dir")])
def test_a_base_that_is_none(adapters, tmp_path, which, message):
    with pytest.raises(UserError, match=message):
        logits(adapters, base_ckpt_dir={"adapters": adapters, "nowhere": tmp_path / "nowhere"}[which])


def test_a_whole_model_has_no_base(base):
    run_config = read_run_config(base)
    assert base_checkpoint(base, run_config) == base
    with pytest.raises(UserError, match="--base-ckpt-dir goes with LoRA adapters"):
        base_checkpoint(base, run_config, base)


def test_another_model_as_base(adapters, tmp_path):
    other = write_tiny_checkpoint(tmp_path, ffn_hidden_size=96)
    with pytest.raises(UserError, match="of another shape .*linear_fc1"):
        logits(adapters, base_ckpt_dir=other)
    with pytest.raises(UserError, match="of another shape .*linear_fc1.* adapters and base belong together"):
        merged_tensors(adapters, read_run_config(adapters), other)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("_target_", "os.system", "does not describe LoRA adapters"),
        ("dim", "16", "peft.dim is '16'; the file is damaged"),
        ("dim", 0, "peft.dim is 0; the file is damaged"),
        ("target_modules", "dense", "peft.target_modules is 'dense'; the file is damaged"),
        ("dim", 8, r"of another shape .*adapter.linear_in.weight \(4, 128\) instead of \(8, 128\)"),
        ("target_modules", ["dense"], "not understood .*adapter"),
        ("skip_freeze_modules", [*KEPT, "hyena_proj_conv"], r"3 missing \(decoder.layers.0.mixer.hyena_proj_conv"),
        ("skip_freeze_modules", [], "3 not understood .*final_norm"),
    ],
)
def test_a_section_that_does_not_fit(copy, name, value, message):
    edit(copy, lambda sections: sections["peft"].update({name: value}))
    with pytest.raises(UserError, match=message):
        logits(copy)
    with pytest.raises(UserError, match=message):
        merged_tensors(copy, read_run_config(copy), base_checkpoint(copy, read_run_config(copy)))


def test_what_is_stored(adapters):
    names = set(tensor_shapes(adapters))
    assert {name for name in names if ".adapter." not in name} == {
        "embedding.word_embeddings.weight",
        "decoder.final_norm.weight",
        "decoder.layers.1.mixer.mixer.filter.h",
    }
    assert len(names) == 2 * 16 + 3


def test_merged_tensors(base, adapters):
    before, own = plain_tensors(base), plain_tensors(adapters)
    merged = merged_tensors(adapters, read_run_config(adapters), base)
    assert merged.keys() == before.keys()
    changed = set()
    for name, tensor in merged.items():
        ends = [f"{name.removesuffix('weight')}adapter.linear_{end}.weight" for end in ("out", "in")]
        want = before[name]
        if ends[0] in own:
            want = want + 2.0 * own[ends[0]] @ own[ends[1]]
        want = own.get(name, want)
        torch.testing.assert_close(tensor.read(), want, rtol=1e-6, atol=1e-7)
        if not torch.equal(want, before[name]):
            changed.add(name)
    assert len(changed) == 16 + 3


def test_a_base_without_fused_names(base, adapters, tmp_path):
    """As models without Transformer Engine's fused layers were written."""
    old = tmp_path / base.name
    old.mkdir()
    copy_tensors(base, read_index(base), {name: unfused(name) for name in tensor_shapes(base)}, old)
    for file in ("run_config.yaml", "common.pt"):
        shutil.copyfile(base / file, old / file)
    assert tensor_shapes(old).keys() != tensor_shapes(base).keys()
    assert torch.equal(logits(adapters, base_ckpt_dir=old), logits(adapters))
    assert merged_tensors(adapters, read_run_config(adapters), old).keys() == tensor_shapes(base).keys()


def test_a_merged_matrix_is_rounded_once(megatron, tmp_path):
    base = write_tiny_checkpoint(tmp_path / "base", recipe="bf16_mixed")
    checkpoint = write_tiny_adapters(tmp_path / "adapters", base, target_modules=ALL_LINEAR)
    run_config = read_run_config(checkpoint)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    rounded = merged_tensors(checkpoint, run_config, base)
    exact = merged_tensors(checkpoint, run_config, base, float32=True)
    assert (rounded[name].dtype, exact[name].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(rounded[name].read(), exact[name].read().bfloat16())
    # what is not merged keeps its format
    assert exact["decoder.final_norm.weight"].dtype == torch.bfloat16


def test_fields_of_the_section(adapters):
    read = read_adapters(read_run_config(adapters))
    assert (read.dim, read.alpha, read.target_modules, read.skip_freeze_modules) == (4, 8, ALL_LINEAR, KEPT)
