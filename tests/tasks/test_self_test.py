# SPDX-License-Identifier: Apache-2.0
"""Numbers stored at conversion against the model that is loaded: they agree, and damage shows."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from checkpoint.fp8_states import fp8_state
from evo2_megatron.checkpoint import distcp, layout
from evo2_megatron.checkpoint.vortex import to_vortex
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.conversion.convert import vortex_to_mbridge
from tasks.conversion.conversions import TINY, WEIGHTS, left_behind, new_result

pytestmark = pytest.mark.usefixtures("megatron")
ONE = ParallelConfig()


@pytest.fixture(scope="module")
def source(megatron, tmp_path_factory):
    """As Arc publishes its models: with the FP8 scales of training, of two layers here."""
    path = tmp_path_factory.mktemp("vortex") / "model.pt"
    scales = {0: fp8_state(3.7, 612.5), 2: fp8_state(20.0, 480.0)}
    # logits of a size that trained models have
    weights = WEIGHTS | {name: WEIGHTS[name] * 0.2 for name in ("decoder.final_norm.weight",)}
    state = to_vortex(weights, TINY) | {f"blocks.{i}.projections._extra_state": entry for i, entry in scales.items()}
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """A checkpoint that asks for 8-bit projections."""
    result = new_result(tmp_path_factory.mktemp("converted"))
    return vortex_to_mbridge(source, replace(result, vortex_style_fp8=True, self_test=None), verify=True)


@pytest.fixture
def copy(converted, tmp_path):
    """Without the checksums, which would find any damage first."""
    return shutil.copytree(converted, tmp_path / converted.name, ignore=shutil.ignore_patterns(layout.CHECKSUMS))


def run(checkpoint, **settings):
    return self_test.run(checkpoint, **({"parallel": ONE, "precision": "fp32", "fp8": "allow_mismatch"} | settings))


@pytest.mark.parametrize(
    "settings, kind, largest",
    [
        ({}, "float32", 1e-5),
        ({"fp8": "emulate"}, "fp8_emulation", 1e-3),
        ({"precision": "bf16_mixed"}, "bfloat16", 1e-2),
        ({"provider_overrides": {"quantize_weights": "int8"}}, "int8", 2e-2),
        ({"precision": "bf16_mixed", "fp8": "emulate"}, "fp8_emulation", 1e-2),
    ],
)
def test_the_model_is_that_of_the_conversion(converted, caplog, settings, kind, largest):
    with caplog.at_level(logging.INFO, logger="evo2_megatron"):
        rows = run(converted, **settings)
    assert [row.name for row in rows] == list(self_test.windows())
    assert max(abs(row.difference) for row in rows) < largest <= self_test.TOLERANCES[kind]
    assert caplog.text.count(f"allowed in {kind}") == 4 and "self-test passed" in caplog.text
    assert ("without FP8 projections, " in caplog.text) == ("fp8" not in settings)


def test_what_is_stored(converted):
    content = json.loads((converted / layout.SELF_TEST).read_text())
    assert [window["name"] for window in content["windows"]] == [
        "made up 1", "made up 2", "phage lambda +", "phage lambda -",
    ]  # fmt: skip
    for window in content["windows"]:
        assert len(window["sequence"]) == 512 and set(window["sequence"]) == set("ACGT")
        plain, rounded = window["log_likelihood"]["plain"], window["log_likelihood"]["fp8_emulated"]
        assert -511 * 10 < plain < -511 and 0.1 < abs(plain - rounded) < 200


def test_windows_are_those_of_the_genome():
    genome = "".join(Path("examples/data/lambda_phage.fa").read_text().splitlines()[1:])
    assert self_test.windows()["phage lambda +"] == genome[:512].upper()


@pytest.mark.parametrize("tensor", ["decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.2.mixer.mixer.filter.p"])
@pytest.mark.parametrize("settings", [{}, {"precision": "bf16_mixed", "fp8": "emulate"}])
def test_one_damaged_value_in_the_weight_file_shows(copy, tensor, settings):
    index = distcp.read_index(copy)
    stored = distcp.stored_tensors(copy, index, {tensor: tensor})[tensor]
    before = stored.read()
    sign_and_exponent = before.contiguous().view(torch.uint8).numpy().tobytes()
    (file,) = copy.glob("*.distcp")
    content = bytearray(file.read_bytes())
    start = bytes(content).find(sign_and_exponent)
    assert start >= 0 and bytes(content).count(sign_and_exponent) == 1
    # the exponent of one value, all of whose bits are set but the last: 2^127, or p that overflows
    content[start + before.element_size() - 1] = 0x7F
    file.write_bytes(content)
    assert (stored.read() != before).sum() == 1
    with pytest.raises(UserError, match="self-test failed: .* nat per base") as failed:
        run(copy, **settings)
    assert "\n" not in str(failed.value)


def test_other_weights_show(copy):
    """A norm that is 3 % too large, which no look at the numbers finds."""
    name = "decoder.final_norm.weight"
    index = distcp.read_index(copy)
    stored = distcp.stored_tensors(copy, index, {n: n for n in distcp.tensor_entries(index)})
    weights = {n: tensor.read() for n, tensor in stored.items()}
    weights[name] = (weights[name].float() * 1.03).to(weights[name].dtype)
    from evo2_megatron.checkpoint.tensors import in_memory

    for path in (*copy.glob("*.distcp"), copy / ".metadata"):
        path.unlink()
    distcp.write_tensors({n: in_memory(tensor) for n, tensor in weights.items()}, copy)
    with pytest.raises(UserError, match="more than the 0.001 that float32 explains"):
        run(copy)


def test_scales_belong_to_the_numbers(copy):
    path = copy / layout.RUN_CONFIG
    config = yaml.safe_load(path.read_text())
    del config["fp8_scales"]
    path.write_text(yaml.safe_dump(config))
    run(copy)
    differences = [row.difference for row in _measured(copy)]
    assert max(map(abs, differences)) > 1e-3  # other scales are other numbers


def _measured(checkpoint):
    """Rows without a verdict."""
    before = dict(self_test.TOLERANCES)
    try:
        self_test.TOLERANCES["fp8_emulation"] = 1e9
        return run(checkpoint, fp8="emulate")
    finally:
        self_test.TOLERANCES.update(before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["windows"][0].update(sequence="ACGT" * 128),
        lambda content: content["windows"][0]["log_likelihood"].pop("plain"),
        lambda content: content.update(windows=[]),
        lambda content: content.update(version=2),
    ],
)
def test_damaged_numbers(copy, damage):
    path = copy / layout.SELF_TEST
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"self_test.json is damaged, or of another version"):
        run(copy)


def test_no_numbers(copy):
    (copy / layout.SELF_TEST).unlink()
    with pytest.raises(UserError, match="convert or merge it again with --self-test"):
        run(copy)


@pytest.mark.parametrize(
    "overrides, flag",
    [
        ({"num_layers": 3, "hybrid_override_pattern": "SDH"}, "--num-layers"),
        ({"seq_len_interpolation_factor": 4.0}, "--seq-len-interpolation-factor"),
    ],
)
def test_a_changed_model_cannot_be_compared(converted, overrides, flag):
    with pytest.raises(UserError, match=flag):
        run(converted, provider_overrides=overrides)


def test_large_models_only_when_asked_for(caplog):
    with caplog.at_level(logging.INFO, logger="evo2_megatron"):
        assert self_test.wants_numbers(None, 10**8) and self_test.wants_numbers(True, 10**11)
        assert not self_test.wants_numbers(False, 10**8) and not caplog.text
        assert not self_test.wants_numbers(None, 3 * 10**9)
    assert "scoring a model of 3.0 GB takes minutes; --self-test does it" in caplog.text


def test_switched_off(source, tmp_path):
    folder = vortex_to_mbridge(source, new_result(tmp_path))
    assert not (folder / layout.SELF_TEST).exists()


def test_too_little_memory_leaves_nothing(source, tmp_path, monkeypatch):
    result = replace(new_result(tmp_path), self_test=True)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 10**6}))
    with pytest.raises(UserError, match="--no-self-test"):
        vortex_to_mbridge(source, result)
    assert not left_behind(result)


def test_numbers_go_with_the_weights(converted, tmp_path):
    from evo2_megatron.tasks.conversion.export import remove_optimizer

    copied = remove_optimizer(converted.parent, tmp_path / "weights")
    assert (copied / layout.SELF_TEST).read_bytes() == (converted / layout.SELF_TEST).read_bytes()


@pytest.mark.parametrize("program", ["predict", "infer"])
def test_commands_test_before_they_begin(copy, program, capsys, tmp_path):
    from importlib import import_module

    command = import_module(f"evo2_megatron.cli.{program}")
    common = ["--ckpt-dir", str(copy), "--mixed-precision-recipe", "fp32", "--fp8-emulation", "--self-test"]
    (tmp_path / "x.fa").write_text(">x\nACGT\n")
    more = (
        ["--fasta", str(tmp_path / "x.fa")] if program == "predict" else ["--prompt", "ACGT", "--max-new-tokens", "2"]
    )
    command.main([*common, *more])
    assert "self-test passed" in capsys.readouterr().err
    content = json.loads((copy / layout.SELF_TEST).read_text())
    content["windows"][2]["log_likelihood"]["fp8_emulated"] += 100
    (copy / layout.SELF_TEST).write_text(json.dumps(content))
    for arguments in ([*common, *more], common) if program == "predict" else ([*common, *more],):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        error = capsys.readouterr()
        assert ended.value.code == 2 and not error.out
        assert f"{program}_evo2: error: self-test failed: phage lambda +" in error.err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--tensor-parallel-size 2", "--pipeline-parallel-size 2", ""])
def test_on_two_processes(converted, flags):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    program = [sys.executable, "-c", "from evo2_megatron.cli.predict import main; main()"]
    options = f"--ckpt-dir {converted} --mixed-precision-recipe fp32 --fp8-emulation --self-test {flags}"
    done = subprocess.run(
        [*launch, *program, *options.split()],
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("self-test passed") == 1
