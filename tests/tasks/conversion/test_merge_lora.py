# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from checkpoint.tiny_adapters import write_tiny_adapters
from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.checkpoint.run_config import read_run_config
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.conversion.export import mbridge_to_vortex
from evo2_megatron.tasks.conversion.merge_lora import merge_lora
from evo2_megatron.tasks.conversion.verify_logits import compare, random_dna

ONE = ParallelConfig()
KEPT = ["final_norm", "word_embeddings", "output_layer"]


@pytest.fixture(scope="module")
def adapters(megatron, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    base = write_tiny_checkpoint(folder / "base")
    return write_tiny_adapters(folder / "adapters", base, iteration=20, skip_freeze_modules=KEPT)


def logits(checkpoint):
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.runtime.distributed import process_groups

    with process_groups(ONE), torch.inference_mode():
        model = load_model(checkpoint, parallel=ONE).model
        return [model(tokens_BL) for tokens_BL in random_dna()]


def test_merging_changes_no_logits(adapters, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    merged = merge_lora(adapters.parent, tmp_path / "merged", verify=True)
    assert merged == tmp_path / "merged" / "iter_0000020"
    assert "verified on 12 sequences" in caplog.text
    assert compare(logits(merged), logits(adapters)).max_abs < 1e-5
    sections = yaml.safe_load((merged / "run_config.yaml").read_text())
    assert sections["peft"] is None
    rows = self_test.run(merged, parallel=ONE)
    assert max(abs(row.difference) for row in rows) < 1e-5
    assert sections["merged_from"]["adapters"] == str(adapters)
    files = mbridge_to_vortex(merged, tmp_path / "vortex" / "model.pt", model_size="evo2_tiny", verify=True)
    assert all(file.is_file() for file in files)


def test_in_a_process_that_has_loaded_nothing_before(adapters, tmp_path):
    flags = ["--ckpt-dir", str(adapters), "--output-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "evo2_megatron.cli.merge_lora", *flags], check=True)
    assert compare(logits(tmp_path / "iter_0000020"), logits(adapters)).max_abs < 1e-5


def test_adapters_alone_are_not_exported(adapters, tmp_path):
    with pytest.raises(UserError, match="LoRA adapters without their base .* evo2_merge_lora"):
        mbridge_to_vortex(adapters, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_merged(adapters, tmp_path):
    base = adapters.parents[1] / "base"
    with pytest.raises(UserError, match="is a whole model and not one of LoRA adapters"):
        merge_lora(base, tmp_path / "merged")
    merge_lora(adapters, tmp_path / "merged")
    with pytest.raises(UserError, match="exists already"):
        merge_lora(adapters, tmp_path / "merged")


def test_fp8_scales_of_the_base_stay(adapters, tmp_path):
    base = shutil.copytree(adapters.parents[1] / "base/iter_0000001", tmp_path / "base/iter_0000001")
    with (base / "run_config.yaml").open("a") as file:
        file.write("fp8_scales:\n  0: [2.0, 64.0]\n")
    merged = merge_lora(adapters, tmp_path / "merged", base_ckpt_dir=base, with_self_test=False)
    assert read_run_config(merged).fp8_scales == {0: (2.0, 64.0)}  # adapters on this base run with them


def test_command(adapters, tmp_path, capsys):
    from evo2_megatron.cli import merge_lora as command

    moved = adapters.parents[1] / "base"
    flags = ["--ckpt-dir", str(adapters), "--base-ckpt-dir", str(moved), "--output-dir", str(tmp_path / "merged")]
    command.main([*flags, "--float32"])
    assert capsys.readouterr().out == f"{tmp_path / 'merged' / 'iter_0000020'}\n"
    with pytest.raises(SystemExit) as ending:
        command.main(flags)
    error = capsys.readouterr().err
    assert ending.value.code == 2
    assert error.startswith("evo2_merge_lora: error: ") and error.endswith("choose another folder or remove it\n")


def test_a_merge_that_went_wrong_is_refused(adapters, tmp_path, monkeypatch):
    """Adapters at half their weight, say."""
    from evo2_megatron.checkpoint import adapter

    real = adapter._sum
    monkeypatch.setattr(adapter, "_sum", lambda *args: real(*args[:3], args[3] / 2, args[4]))
    with pytest.raises(UserError, match="verification failed: largest difference of the logits"):
        merge_lora(adapters, tmp_path / "merged", verify=True)
    assert list(tmp_path.iterdir()) == []


def test_rounding_to_16_bits_is_told(megatron, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    base = write_tiny_checkpoint(tmp_path / "base", recipe="bf16_mixed")
    checkpoint = write_tiny_adapters(tmp_path / "adapters", base)
    merge_lora(checkpoint, tmp_path / "rounded", verify=True)
    merge_lora(checkpoint, tmp_path / "exact", float32=True, verify=True)
    rounded, exact = (float(line.split("rms ")[1]) for line in caplog.messages if line.startswith("verified"))
    assert exact < 1e-5 < 1e-3 < rounded < 2e-2
