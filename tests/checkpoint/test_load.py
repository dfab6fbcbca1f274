# SPDX-License-Identifier: Apache-2.0
"""Writing weights and loading them again; refusal of everything that does not fit."""

import enum
import pickle
import shutil
from unittest import mock

import pytest
import torch
import yaml

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.data.tokenizer import tokenizer_dir
from helpers import Hostile

ONE = ParallelConfig()


@pytest.fixture(scope="module")
def tiny(megatron, tmp_path_factory):
    """The folder of one iteration; not to be changed."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "iter_0000001")


@pytest.fixture
def groups(megatron):
    from evo2_megatron.runtime.distributed import process_groups

    with process_groups(ONE):
        yield


def stored_tensors(checkpoint):
    from torch.distributed import checkpoint as dcp

    from evo2_megatron.checkpoint.load import stored_shapes

    tensors = {name: torch.empty(shape) for name, shape in stored_shapes(checkpoint).items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return tensors


def rewrite_tensors(checkpoint, change):
    from torch.distributed import checkpoint as dcp

    tensors = stored_tensors(checkpoint)
    change(tensors)
    for path in (*checkpoint.glob("*.distcp"), checkpoint / ".metadata"):
        path.unlink()
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(checkpoint), no_dist=True)


def edit_run_config(checkpoint, change):
    path = checkpoint / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


def logits(loaded, length=40):
    tokens = torch.randint(65, 85, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return loaded.model(tokens)


def test_every_weight_comes_back(tiny, groups):
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.checkpoint.write import whole_weights

    loaded = load_model(tiny.parent, parallel=ONE)

    weights, stored = whole_weights(loaded.model), stored_tensors(tiny)
    assert weights.keys() == stored.keys() and "decoder.layers.1.mixer.mixer.filter.decay" in weights
    for name, value in stored.items():
        assert torch.equal(weights[name], value), name
    assert (loaded.checkpoint, loaded.precision, loaded.tokenizer_dir) == (tiny, "fp32", tiny / "tokenizer")
    assert not loaded.model.training and loaded.provider.vocab_size == 512
    assert not loaded.provider.bias_dropout_fusion, "what Megatron compiles when it first runs"
    assert logits(loaded).shape == (2, 40, 512)


def test_layout_on_disk(tiny):
    from evo2_megatron.checkpoint.layout import resolve_checkpoint_path

    assert (tiny.parent / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    assert sorted(path.name for path in tiny.parent.iterdir())[:1] == ["iter_0000001"]
    expected = {".metadata", "SHA256SUMS", "common.pt", "metadata.json", "run_config.yaml", "tokenizer"}
    assert expected | {"train_state.pt"} == {path.name for path in tiny.iterdir() if path.suffix != ".distcp"}
    assert resolve_checkpoint_path(tiny.parent) == tiny
    assert torch.load(tiny / "common.pt", weights_only=True)["content_metadata"]["singleton_local_shards"] is False
    assert torch.load(tiny.parent / "latest_train_state.pt", weights_only=True)["step"] == 1


def test_writing_is_all_or_nothing(tiny, tmp_path, groups, monkeypatch):
    from evo2_megatron.checkpoint import write
    from evo2_megatron.checkpoint.load import load_model

    loaded = load_model(tiny, parallel=ONE)
    arguments = (write.whole_weights(loaded.model), loaded.provider, tmp_path / "new")
    settings = {"tokenizer": tokenizer_dir(512), "recipe": "fp32"}
    with pytest.raises(UserError, match="tokenizer.json"):
        write.write_checkpoint(*arguments, tokenizer=tmp_path, recipe="fp32")
    with monkeypatch.context() as broken:
        broken.setattr(write, "_write_common", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write.write_checkpoint(*arguments, **settings)
    assert not (tmp_path / "new").exists()
    written = write.write_checkpoint(*arguments, **settings, iteration=12)
    assert written.name == "iter_0000012"
    with pytest.raises(UserError, match="exists already"):
        write.write_checkpoint(*arguments, **settings, iteration=12)
    assert torch.equal(logits(load_model(tmp_path / "new", parallel=ONE)), logits(loaded))


def test_16_bit_weights_are_honoured_without_a_gpu(tmp_path, groups_free):
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.runtime.distributed import process_groups

    checkpoint = write_tiny_checkpoint(tmp_path, recipe="bf16_mixed")
    with process_groups(ONE):
        half, single = (load_model(checkpoint, parallel=ONE, precision=name) for name in (None, "fp32"))
        assert (half.precision, single.precision) == ("bf16_mixed", "fp32")
        assert half.model.module.output_layer.config.params_dtype is torch.bfloat16
        half, single = logits(half), logits(single)
    assert half.dtype == single.dtype == torch.float32
    assert 0 < (half - single).abs().max() < 0.1 * single.abs().max()


@pytest.fixture
def groups_free(megatron):
    """Bridge is importable, and no process group is running."""
    assert not torch.distributed.is_initialized()


def test_no_precision_named(copy, groups):
    from evo2_megatron.checkpoint.load import load_model

    edit_run_config(copy, lambda config: config.pop("mixed_precision"))
    default = "bf16_mixed" if torch.cuda.is_available() else "fp32"
    assert load_model(copy, parallel=ONE).precision == default


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what a machine without FP8 hardware says")
@pytest.mark.parametrize("by_name", [True, False])
def test_fp8_without_hardware(copy, groups, by_name):
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config
    from megatron.bridge.utils.yaml_utils import dump_dataclass_to_yaml

    from evo2_megatron.checkpoint.load import load_model

    recipe = "bf16_with_fp8_current_scaling_mixed"
    values = ConfigContainer._convert_value_to_dict(get_mixed_precision_config(recipe))
    section = recipe if by_name else yaml.safe_load(dump_dataclass_to_yaml(values))
    edit_run_config(copy, lambda config: config.update(mixed_precision=section))
    with pytest.raises(UserError, match="choose --mixed-precision-recipe bf16_mixed"):
        load_model(copy, parallel=ONE)
    assert load_model(copy, parallel=ONE, precision="bf16_mixed").precision == "bf16_mixed"


def test_an_old_checkpoint(tiny, copy, groups):
    from evo2_megatron.checkpoint.load import load_model

    def make_old(config):
        config["model"] |= {"_target_": "bionemo.evo2.models.evo2_provider.Hyena7bModelProvider", "use_te": True}
        # converted with the tokenizer of 256 tokens: the file says 256, the tensor has 512 rows
        config["model"]["vocab_size"] = 256

    edit_run_config(copy, make_old)
    (copy / "common.pt").unlink()
    torch.save({"checkpoint_version": 3.0}, copy / "common.pt")
    assert torch.equal(logits(load_model(copy, parallel=ONE)), logits(load_model(tiny, parallel=ONE)))


def test_other_state_is_passed_over(tiny, copy, groups):
    from evo2_megatron.checkpoint.load import load_model

    def add(tensors):
        tensors["optimizer.state.exp_avg.embedding.word_embeddings.weight"] = torch.zeros(512, 128)
        tensors["decoder.layers.0.mixer.dense._extra_state"] = torch.zeros(3)

    rewrite_tensors(copy, add)
    assert torch.equal(logits(load_model(copy, parallel=ONE)), logits(load_model(tiny, parallel=ONE)))


def test_keys_that_do_not_match(copy, groups):
    from evo2_megatron.checkpoint.load import load_model

    def change(tensors):
        del tensors["decoder.layers.3.self_attention.linear_proj.bias"]
        tensors["decoder.layers.4.mlp.linear_fc1.weight"] = torch.zeros(3)
        tensors["decoder.final_norm.weight"] = torch.zeros(64)

    rewrite_tensors(copy, change)
    with pytest.raises(UserError) as error:
        load_model(copy, parallel=ONE)
    for part in (
        "1 missing (decoder.layers.3.self_attention.linear_proj.bias)",
        "1 not understood (decoder.layers.4.mlp.linear_fc1.weight)",
        "1 of another shape (decoder.final_norm.weight (64,) instead of (128,))",
    ):
        assert part in str(error.value)


def test_the_first_layers_only(copy, groups):
    from evo2_megatron.checkpoint.load import load_model

    fields = {"num_layers": 2, "hybrid_override_pattern": "SD"}
    assert len(load_model(copy, parallel=ONE, provider_overrides=fields).model.decoder.layers) == 2
    # dropped by the caller is one thing, unknown to the file another
    edit_run_config(copy, lambda config: config["model"].update(fields))
    with pytest.raises(UserError, match="not understood"):
        load_model(copy, parallel=ONE)


def test_memory_that_runs_out(copy, groups):
    from evo2_megatron.checkpoint.load import load_model

    with pytest.raises(
        UserError, match=r"not enough memory for the weights of .*iter_.* in precision fp32; divide them"
    ):
        load_model(copy, parallel=ONE, provider_overrides={"ffn_hidden_size": 10**11})


def test_vocabulary(tmp_path, groups_free):
    from evo2_megatron.checkpoint.load import find_tokenizer, load_model
    from evo2_megatron.runtime.distributed import process_groups

    checkpoint = write_tiny_checkpoint(tmp_path, rows=256)
    shutil.rmtree(checkpoint / "tokenizer")
    assert find_tokenizer(checkpoint, checkpoint) == tokenizer_dir(256)
    with process_groups(ONE):
        assert logits(load_model(checkpoint, parallel=ONE)).shape[-1] == 256
        shutil.copytree(tokenizer_dir(512), checkpoint / "tokenizer")
        with pytest.raises(UserError, match="has 512 tokens but the model in .* only 256 embedding rows"):
            load_model(checkpoint, parallel=ONE)


def test_a_tampered_index_runs_nothing(copy, groups):
    from evo2_megatron.checkpoint.load import load_model

    class Touch:
        def __reduce__(self):
            return (exec, (f"open({str(copy / 'marker')!r}, 'w')",))

    (copy / ".metadata").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(UserError, match="names builtins.exec, which does not belong there"):
        load_model(copy, parallel=ONE)
    assert not (copy / "marker").exists()


class _AsPython3112(pickle.Pickler):
    """Writes enumerations as the first releases of Python 3.11 do."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_an_index_of_an_early_python_3_11(copy, groups):
    from evo2_megatron.checkpoint import distcp
    from evo2_megatron.checkpoint.load import load_model

    index = distcp.read_index(copy)
    with (copy / ".metadata").open("wb") as file:
        _AsPython3112(file).dump(index)
    assert b"getattr" in (copy / ".metadata").read_bytes() and distcp.read_index(copy) == index
    load_model(copy, parallel=ONE)


@pytest.mark.parametrize("kind, name", [(torch, "load"), (torch.dtype, "__class__"), (enum.Enum, "__subclasses__")])
def test_getattr_of_an_index_gives_enumerations_alone(copy, kind, name):
    from evo2_megatron.checkpoint.distcp import _enum_member

    with pytest.raises(pickle.UnpicklingError, match=f"it names '{name}' of what is no enumeration"):
        _enum_member(kind, name)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: (path / ".metadata").unlink(), "has no .metadata, so it holds no weights"),
        (lambda path: (path / "metadata.json").unlink(), "has no metadata.json, so it holds no weights"),
        (lambda path: (path / ".metadata").write_bytes(b"\x80"), "copy the checkpoint again"),
        (lambda path: (path / "common.pt").unlink(), "has no common.pt, so the copy is incomplete"),
        (lambda path: (path / "common.pt").write_bytes(b""), "cannot be read .a file ends too early.; copy"),
        (lambda path: (path / "common.pt").write_bytes(b"PK\x03\x04"), "cannot be read .*; copy it again"),
        (
            lambda path: rewrite_tensors(path, lambda t: t.pop("embedding.word_embeddings.weight")),
            "has no tensor embed",
        ),
    ],
)
def test_damaged_checkpoints(copy, groups, damage, message):
    from evo2_megatron.checkpoint.load import load_model

    damage(copy)
    with pytest.raises(UserError, match=message):
        load_model(copy, parallel=ONE)


def test_ctrl_c_while_weights_are_read(tiny, groups):
    """torch's reader reports it as it does a file that is damaged."""
    from torch.distributed.checkpoint import FileSystemReader

    from evo2_megatron.checkpoint.load import load_model

    stopped = mock.patch.object(FileSystemReader, "read_data", side_effect=KeyboardInterrupt)
    with stopped, pytest.raises(KeyboardInterrupt):
        load_model(tiny, parallel=ONE)


@pytest.mark.slow
def test_what_bridge_saves_is_loaded(tmp_path, groups_free):
    from megatron.bridge.training.model_load_save import save_megatron_model

    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.checkpoint.write import whole_weights
    from evo2_megatron.runtime.distributed import process_groups
    from helpers import tiny_model

    with process_groups(ONE):
        model = tiny_model()
        save_megatron_model([model], tmp_path)
        loaded = load_model(tmp_path, parallel=ONE, precision="fp32")
        for name, value in whole_weights(model).items():
            assert torch.equal(whole_weights(loaded.model)[name], value), name


@pytest.mark.parametrize("where", ["common.pt", "tensor"])
def test_hostile_pickles(copy, tmp_path, groups, where):
    from evo2_megatron.checkpoint import distcp
    from evo2_megatron.checkpoint.load import load_model

    trap = Hostile(tmp_path / "trap")
    if where == "common.pt":
        torch.save({"content_metadata": trap}, copy / where)
    else:
        index = distcp.read_index(copy)
        place = next(iter(index.storage_data.values()))
        torch.save({"w": trap}, copy / "evil.distcp")
        place.relative_path, place.offset, place.length = "evil.distcp", 0, (copy / "evil.distcp").stat().st_size
        (copy / ".metadata").unlink()
        distcp.write_index(copy, index)
    with pytest.raises(UserError, match="more than") as error:
        load_model(copy, parallel=ONE)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trap").exists()
