# SPDX-License-Identifier: Apache-2.0
"""Savanna to Megatron Bridge: every form of a source, and refusal of everything doubtful."""

import logging
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from checkpoint.savanna_model import savanna_state, save_ranks
from evo2_megatron.checkpoint import distcp, translate
from evo2_megatron.checkpoint.names import is_kept_in_float32, unfused
from evo2_megatron.checkpoint.tensors import in_memory
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.data.tokenizer import tokenizer_dir
from evo2_megatron.tasks.conversion.convert import savanna_to_mbridge, vortex_to_mbridge
from helpers import Hostile
from parity.vortex_model import random_weights
from tasks.conversion.conversions import TINY, WEIGHTS, assert_weights, left_behind, new_result, save, stored

ONE = ParallelConfig()

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture
def result(tmp_path):
    return new_result(tmp_path)


@pytest.fixture
def state():
    return savanna_state(WEIGHTS, TINY)


def in_parts(state, folder):
    data = Path(save(state, folder / "whole")).read_bytes()
    step = -(-len(data) // 11)
    for i in range(11):
        (folder / f"model.pt.part{i}").write_bytes(data[i * step : (i + 1) * step])
    return str(folder / "model.pt")


def in_ranks(num_ranks):
    def write(state, folder):
        (folder / "global_step10").mkdir()
        (folder / "latest").write_text("global_step10")
        save_ranks(state, num_ranks, folder / "global_step10")
        return str(folder)

    return write


def like_the_20b(state, folder):
    last = TINY.num_layers + 3
    state = {name.replace(f"sequential.{last}.", f"sequential.{last - 1}."): value for name, value in state.items()}
    return save(state, folder / "model.pt")


FORMS = {
    "state dict": lambda state, folder: save(state, folder / "model.pt"),
    "nested": lambda state, folder: save({"module": state, "iteration": 7, "args": {"lr": 0.1}}, folder / "model.pt"),
    "prefix": lambda state, folder: save({f"module.{name}": x for name, x in state.items()}, folder / "model.pt"),
    "nested with prefix": lambda state, folder: save(
        {"module": {f"module.{name}": x for name, x in state.items()}}, folder / "model.pt"
    ),
    "folder": lambda state, folder: str(Path(save(state, folder / "model.pt")).parent),
    "parts": in_parts,
    "first part": lambda state, folder: in_parts(state, folder) + ".part0",
    "2 ranks": in_ranks(2),
    "4 ranks": in_ranks(4),
    "like the 20B": like_the_20b,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_savanna(state, result, tmp_path, form):
    (tmp_path / "source").mkdir()
    folder = savanna_to_mbridge(FORMS[form](state, tmp_path / "source"), result)
    assert folder == tmp_path / "mbridge/iter_0000001"
    assert_weights(folder)


def test_back_to_savanna_is_bit_exact(state, result, tmp_path):
    folder = savanna_to_mbridge(save(state, tmp_path / "model.pt"), result)
    back = translate.to_theirs({name: in_memory(x) for name, x in stored(folder).items()}, TINY, "savanna")
    unused = re.compile(r".*(_extra_state|filter\.t|inv_freq|(post_attention|outer_mlp)_layernorm\.weight)")
    used = {name: value for name, value in state.items() if not unused.fullmatch(name)}
    assert back.keys() == used.keys()
    for name, value in used.items():
        value = value[:, :128] if name.endswith((".filter.h", ".filter.decay")) else value
        assert torch.equal(back[name].read().to(value.dtype), value), name


def test_the_checkpoint_is_complete(state, result, tmp_path):
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.checkpoint.run_config import read_run_config
    from evo2_megatron.runtime.distributed import process_groups

    source = save(state, tmp_path / "model.pt")
    folder = savanna_to_mbridge(source, replace(result, seq_length=4096, recipe="fp16_mixed"))

    config = read_run_config(folder)
    assert (config.seq_length, config.recipe(), config.pattern) == (4096, "fp16_mixed", TINY.pattern)
    origin = {"format": "savanna", "source": source, "revision": None, "model_size": "evo2_tiny"}
    assert config.sections["converted_from"] == origin
    assert not any(config.sections[name] for name in ("dataset", "train", "scheduler"))  # no made-up training run
    assert (folder.parent / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    assert torch.load(folder.parent / "latest_train_state.pt", weights_only=True)["step"] == 1
    with process_groups(ONE):
        loaded = load_model(folder.parent, parallel=ONE, precision="fp32")
        for name, value in loaded.model.state_dict().items():
            assert "_extra_state" in name or torch.equal(value, WEIGHTS[name].float()), name
    assert loaded.tokenizer_dir == folder / "tokenizer"


def test_bridge_itself_reads_the_run_config(state, result, tmp_path):
    from megatron.bridge.training.config import ConfigContainer

    folder = savanna_to_mbridge(save(state, tmp_path / "model.pt"), result)
    config = ConfigContainer.from_yaml(str(folder / "run_config.yaml"))
    assert config.model.hidden_size == 128 and config.mixed_precision == "bf16_mixed"


def test_fp8_is_written_down(state, result, tmp_path):
    folder = savanna_to_mbridge(
        save(state, tmp_path / "model.pt"), replace(result, vortex_style_fp8=True), verify=True
    )
    assert yaml.safe_load((folder / "run_config.yaml").read_text())["model"]["vortex_style_fp8"] is True


def test_float32_weights(state, result, tmp_path, caplog):
    state = savanna_state(random_weights(TINY), TINY)
    source = save(state, tmp_path / "model.pt")
    with caplog.at_level(logging.WARNING):
        assert_weights(
            savanna_to_mbridge(source, result),
            {name: x if is_kept_in_float32(name) else x.bfloat16() for name, x in random_weights(TINY).items()},
        )
    assert "rounded to bfloat16" in caplog.text
    kept = savanna_to_mbridge(source, replace(result, directory=tmp_path / "fp32", recipe="fp32"))
    assert all(torch.equal(value, random_weights(TINY)[name]) for name, value in stored(kept).items())


def test_unfused_names(state, result, tmp_path):
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.runtime.distributed import process_groups

    folder = savanna_to_mbridge(save(state, tmp_path / "model.pt"), result, unfused_names=True, verify=True)
    assert stored(folder).keys() == {unfused(name) for name in WEIGHTS} != WEIGHTS.keys()
    with process_groups(ONE):
        model = load_model(folder, parallel=ONE, precision="fp32").model
        assert all(torch.equal(model.state_dict()[name], value.float()) for name, value in WEIGHTS.items())


def without(*names):
    return lambda state: [state.pop(name) for name in names]


BROKEN = {
    "missing": (
        without("sequential.2.mlp.w1.weight", "sequential.4.mixer.mixer.filter.R"), "2 missing (sequential.2.mlp.w1",
    ),
    "unknown": (
        lambda s: s.update({"sequential.3.extra.weight": torch.ones(3)}), "1 not understood (sequential.3.extra",
    ),
    "a layer too many": (
        lambda s: s.update({n.replace("l.5.", "l.9."): x for n, x in s.items() if ".5." in n}), "not understood",
    ),
    "shape": (
        lambda s: s.update({"sequential.2.mlp.w3.weight": torch.ones(128, 9)}),
        "sequential.2.mlp.w3.weight (128, 9) instead of (128, 352)",
    ),
    "short filter": (
        lambda s: s.update({"sequential.3.mixer.mixer.filter.h": torch.ones(32, 64)}), "(32, 64) instead of (32, 128)",
    ),
    "a number as embedding": (
        lambda s: s.update({"sequential.0.word_embeddings.weight": torch.tensor(1.0)}), "weight () instead of",
    ),
    "a name twice": (
        lambda s: s.update({"module.sequential.7.norm.weight": torch.ones(128)}), "sequential.7.norm.weight twice",
    ),
    "no embedding": (without("sequential.0.word_embeddings.weight"), "1 missing"),
    "no norm": (without("sequential.7.norm.weight"), "1 missing (sequential.7.norm.weight)"),
    "other rotary base": (
        lambda s: s.update({"sequential.5.mixer.rotary_emb.inv_freq": 1e6 ** -(torch.arange(16) / 16)}),
        "does not belong to a rotary base of 10000 (it seems to be about 1e+06)",
    ),
    "a number as rotary frequencies": (
        lambda s: s.update({"sequential.5.mixer.rotary_emb.inv_freq": torch.tensor(1.0)}), "does not belong to a",
    ),
    "not a tensor": (lambda s: s.update({"sequential.2.note": "text"}), "'sequential.2.note' is not a tensor"),
    "whole numbers": (
        lambda s: s.update({"sequential.2.mixer.dense.weight": torch.ones(128, 128, dtype=torch.int8)}),
        "sequential.2.mixer.dense.weight holds int8, which is no format of weights here",
    ),
    "one half in whole numbers": (
        lambda s: s.update({"sequential.2.mlp.w2.weight": torch.ones(352, 128, dtype=torch.int8)}), "w2.weight holds",
    ),
    "8 bits without their scale": (
        lambda s: s.update({"sequential.2.mixer.dense.weight": torch.ones(128, 128).to(torch.float8_e4m3fn)}),
        "holds float8_e4m3fn",
    ),
    "sparse": (
        lambda s: s.update({"sequential.2.mixer.dense.weight": torch.eye(128).to_sparse()}), "save it again with",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_state(state, result, tmp_path, case):
    breaks, message = BROKEN[case]
    breaks(state)
    with pytest.raises(UserError, match=re.escape(message)):
        savanna_to_mbridge(save(state, tmp_path / "model.pt"), result)
    assert not left_behind(result)


def test_halves_in_two_formats(state, result, tmp_path):
    state["sequential.2.mlp.w1.weight"] = state["sequential.2.mlp.w1.weight"].double()
    assert_weights(savanna_to_mbridge(save(state, tmp_path / "model.pt"), result))


@pytest.mark.parametrize("check", ["verify", "self_test"])
def test_weights_that_are_not_numbers(state, result, tmp_path, check):
    state["sequential.2.mixer.dense.weight"][3, 3] = torch.nan
    with pytest.raises(UserError, match="computes NaN or infinity, so .* weights hold such values"):
        result = replace(result, self_test=check == "self_test")
        savanna_to_mbridge(save(state, tmp_path / "model.pt"), result, verify=check == "verify")
    assert not left_behind(result)


def test_wrong_model_size_names_the_right_one(state, result, tmp_path):
    source = save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match="they are those of --model-size evo2_tiny"):
        savanna_to_mbridge(source, replace(result, model_size="evo2_mini"))
    with pytest.raises(UserError, match="Unknown model size"):
        savanna_to_mbridge(source, replace(result, model_size="evo2_2b"))


def test_wrong_tokenizer(state, result, tmp_path):
    with pytest.raises(UserError, match="has 256 tokens but the weights have 512 .*/nucleotide_fast_tokenizer_512"):
        savanna_to_mbridge(save(state, tmp_path / "model.pt"), replace(result, tokenizer=tokenizer_dir(256)))
    with pytest.raises(UserError, match="tokenizer"):
        savanna_to_mbridge(str(tmp_path / "model.pt"), replace(result, tokenizer=tmp_path))
    assert not left_behind(result)


def test_what_is_there_is_never_touched(state, result, tmp_path):
    source = save(state, tmp_path / "model.pt")
    folder = savanna_to_mbridge(source, result)
    before = {path: path.read_bytes() for path in result.directory.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists already"):
        savanna_to_mbridge(source, result)
    assert {path: path.read_bytes() for path in result.directory.rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match="is a file"):
        savanna_to_mbridge(source, replace(result, directory=folder / "common.pt"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_leaves_nothing(state, result, tmp_path, error):
    source = save(state, tmp_path / "model.pt")
    with mock.patch.object(distcp.torch, "save", side_effect=error), pytest.raises((KeyboardInterrupt, UserError)):
        savanna_to_mbridge(source, replace(result, directory=tmp_path / "mbridge/a/b"))
    assert not left_behind(result)


def test_a_source_that_may_not_be_read(state, result, tmp_path):
    source = save(state, tmp_path / "model.pt")
    error = PermissionError(13, "Permission denied", source)
    refused = mock.patch("evo2_megatron.checkpoint.torch_file.io.FileIO", side_effect=error)
    with refused, pytest.raises(UserError, match=f"^{re.escape(source)}: Permission denied; no result was written$"):
        savanna_to_mbridge(source, result)


def test_hostile_files(state, result, tmp_path):
    for value in (Hostile(tmp_path / "trap"), {"module": state, "args": Hostile(tmp_path / "trap")}):
        with pytest.raises(UserError, match="nothing of it was run"):
            savanna_to_mbridge(save(value, tmp_path / "model.pt"), result)
        with pytest.raises(UserError, match="nothing of it was run"):
            vortex_to_mbridge(tmp_path / "model.pt", result)
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "trap")))
    with pytest.raises(UserError, match="not a file of torch.save"):
        savanna_to_mbridge(str(tmp_path / "model.pt"), result)
    assert not (tmp_path / "trap").exists() and not left_behind(result)


@pytest.mark.parametrize("value", [[1, 2], {}, {"module": None}, torch.ones(3)])
def test_no_state_dict(result, tmp_path, value):
    with pytest.raises(UserError, match="no state dict|is not a tensor"):
        savanna_to_mbridge(save(value, tmp_path / "model.pt"), result)


def test_ranks_that_do_not_belong_together(state, result, tmp_path, caplog):
    def ranks(name, value):
        save_ranks(state, 2, tmp_path)
        path = tmp_path / "mp_rank_01_model_states.pt"
        saved = torch.load(path, weights_only=False)
        if value is None:
            del saved["module"][name]
        else:
            saved["module"][name] = value(saved["module"][name])
        torch.save(saved, path)
        return savanna_to_mbridge(str(tmp_path), result)

    with pytest.raises(UserError, match="do not hold the same tensors, e.g. sequential.2.mlp.w1.weight"):
        ranks("sequential.2.mlp.w1.weight", None)
    with pytest.raises(UserError, match="do not fit together"):
        ranks("sequential.2.mlp.w1.weight", lambda x: x[:, :5])
    with pytest.raises(UserError, match="differs between ranks by"):
        ranks("sequential.2.input_layernorm.weight", lambda x: x * 1.5)
    with caplog.at_level(logging.WARNING):
        ranks("sequential.2.input_layernorm.weight", lambda x: x * 1.004)
    assert "taking that of rank 0" in caplog.text


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("sequential.0.step", torch.tensor(3), "1 not understood"),
        ("sequential.0.step", torch.empty(0), "1 not understood"),
        ("sequential.2.mixer.dense.weight", torch.ones(5), "do not fit together"),
        ("sequential.2.mixer.dense_projection.weight", torch.tensor(5.0), "do not fit together"),
    ],
)
def test_ranks_with_what_cannot_be_joined(state, result, tmp_path, name, value, message):
    save_ranks(state, 2, tmp_path)
    for path in tmp_path.glob("mp_rank_*"):
        saved = torch.load(path, weights_only=False)
        saved["module"][name] = value
        torch.save(saved, path)
    with pytest.raises(UserError, match=message):
        savanna_to_mbridge(str(tmp_path), result)


def test_verification_notices_a_wrong_conversion(state, result, tmp_path):
    source = save(state, tmp_path / "model.pt")
    halves = translate.FORMS["halves"]
    swapped = halves._replace(to_ours=lambda w1, w2: halves.to_ours(w2, w1))
    with mock.patch.dict(translate.FORMS, {"halves": swapped}):
        savanna_to_mbridge(source, replace(result, directory=tmp_path / "wrong"))
        with pytest.raises(UserError, match="verification failed: largest difference of the logits"):
            savanna_to_mbridge(source, result, verify=True)
    assert not left_behind(result)


@pytest.mark.slow
@pytest.mark.parametrize("unfused_names", [True, False])
def test_training_starts_from_a_converted_checkpoint(state, result, tmp_path, unfused_names):
    folder = savanna_to_mbridge(save(state, tmp_path / "model.pt"), result, unfused_names=unfused_names)
    flags = {
        "model-size": "evo2_tiny", "finetune-ckpt-dir": folder.parent, "result-dir": tmp_path / "tuned",
        "hf-tokenizer-model-path": tokenizer_dir(512), "seq-length": 128, "max-steps": 1, "micro-batch-size": 1,
        "global-batch-size": 1, "eval-interval": 1, "eval-iters": 1, "lr": 0, "min-lr": 0, "wd": 0,
        "mixed-precision-recipe": "fp32",
    }  # fmt: skip
    command = [sys.executable, "-c", "from evo2_megatron.cli.train import main; main()", "--mock-data"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    trained = stored(tmp_path / "tuned/evo2/checkpoints/iter_0000001")
    for name, value in WEIGHTS.items():
        # with a learning rate of 0 they are still the converted ones
        assert torch.equal(trained[name].float(), value.float()), name
