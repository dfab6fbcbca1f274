# SPDX-License-Identifier: Apache-2.0
"""Scales of 8-bit projections from sequences: what they are, and what they do."""

from __future__ import annotations

import logging
import os
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
from evo2_megatron.tasks.conversion.calibrate_fp8 import calibrate_fp8, scale_for

ONE = ParallelConfig()
LENGTHS = (5, 130, 64, 1)


@pytest.fixture(scope="module")
def inputs(megatron, tmp_path_factory):
    """A checkpoint and a FASTA file."""
    folder = tmp_path_factory.mktemp("inputs")
    generator = torch.Generator().manual_seed(2)
    letters = ["".join("ACGT"[i] for i in torch.randint(4, (n,), generator=generator)) for n in LENGTHS]
    fasta = folder / "records.fa"
    fasta.write_text("".join(f">r{i}\n{sequence}\n" for i, sequence in enumerate(letters)))
    return write_tiny_checkpoint(folder / "checkpoint"), fasta


def loaded_model(checkpoint, **settings):
    from evo2_megatron.checkpoint.load import load_model

    return load_model(checkpoint, parallel=ONE, **settings).model


def slow_maxima(checkpoint, fasta):
    """By sequence and layer, of inputs that are kept: largest behind the norm; and of weights."""
    from evo2_megatron.data.fasta_dataset import FastaDataset
    from evo2_megatron.runtime.distributed import process_groups

    seen, weights = {}, {}
    with process_groups(ONE), torch.inference_mode():
        model = loaded_model(checkpoint)
        for number, layer in enumerate(model.decoder.layers):
            if hasattr(layer, "mixer"):
                projection = layer.mixer.dense_projection
                weights[number], seen[number] = projection.weight.abs().max().item(), []
                projection.register_forward_pre_hook(lambda module, args, n=number: seen[n].append((module, args[0])))
        for item in FastaDataset(fasta):
            model(item["tokens"][None])
    inputs = {}
    for number, calls in seen.items():
        inputs[number] = 0.0
        for module, x_LBH in calls:
            x_LBH = x_LBH.double()
            norm_LBH = x_LBH / (x_LBH.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * module.layer_norm_weight
            inputs[number] = max(inputs[number], norm_LBH.abs().max().item())
    return inputs, weights


def test_the_largest_of_all_becomes_448(inputs, tmp_path):
    checkpoint, fasta = inputs
    written = calibrate_fp8(fasta, checkpoint, tmp_path / "new")
    assert written == tmp_path / "new" / checkpoint.name
    input_maxima, weight_maxima = slow_maxima(checkpoint, fasta)
    scales = read_run_config(written).fp8_scales
    assert list(scales) == [0, 1, 2]  # the fourth layer of evo2_tiny is attention
    for layer, (input_scale, weight_scale) in scales.items():
        assert input_scale == pytest.approx(448 / input_maxima[layer], rel=1e-5)
        assert weight_scale == 448 / weight_maxima[layer]
    sections = yaml.safe_load((written / "run_config.yaml").read_text())
    assert sections["fp8_calibration"] == {"fasta": str(fasta), "margin": 0}
    assert sections["model"] == yaml.safe_load((checkpoint / "run_config.yaml").read_text())["model"]


def test_pieces_and_margin(inputs, tmp_path):
    checkpoint, fasta = inputs
    whole = read_run_config(calibrate_fp8(fasta, checkpoint, tmp_path / "whole")).fp8_scales
    pieces = read_run_config(calibrate_fp8(fasta, checkpoint, tmp_path / "pieces", chunk_length=7)).fp8_scales
    room = read_run_config(calibrate_fp8(fasta, checkpoint, tmp_path / "room", margin=3)).fp8_scales
    for layer, pair in whole.items():
        assert pieces[layer] == pytest.approx(pair, rel=1e-5)
        assert room[layer] == tuple(scale / 8 for scale in pair)


def test_sequences_that_are_no_dna(inputs, tmp_path, caplog):
    fasta = tmp_path / "protein.fa"
    fasta.write_text(">p\nMKLAAKLL\n")
    calibrate_fp8(fasta, inputs[0], tmp_path / "new")
    assert "1 of 1 sequences have letters that no DNA has; the first is 'L' in 'p'" in caplog.text


def test_rounding_with_these_scales_costs_less(inputs, tmp_path, caplog):
    """Weights of 0.006 lie where e4m3 has a bit or two left; scaled, they have all. The self-test holds the scales."""
    from evo2_megatron.runtime.distributed import process_groups

    checkpoint, fasta = write_tiny_checkpoint(tmp_path / "small", projection_factor=1 / 30), inputs[1]
    caplog.set_level(logging.INFO)
    written = calibrate_fp8(fasta, checkpoint, tmp_path / "new")
    assert "layer 0: largest input" in caplog.text and "3 projections have scales from" in caplog.text
    tokens_BL = torch.randint(65, 85, (2, 200), generator=torch.Generator().manual_seed(3))
    with process_groups(ONE), torch.inference_mode():
        plain = loaded_model(checkpoint)(tokens_BL)
        errors = [
            (loaded_model(folder, fp8="emulate")(tokens_BL) - plain).pow(2).mean().sqrt().item()
            for folder in (checkpoint, written)
        ]
    assert errors[1] < 0.5 * errors[0]
    rows = self_test.run(written, parallel=ONE, fp8="emulate")
    assert max(abs(row.difference) for row in rows) < 1e-4


def test_old_numbers_of_the_self_test_do_not_stay(inputs, tmp_path):
    checkpoint, fasta = inputs
    first = calibrate_fp8(fasta, checkpoint, tmp_path / "first")
    assert (first / "self_test.json").is_file()
    again = calibrate_fp8(fasta, first, tmp_path / "again", with_self_test=False)
    assert not (again / "self_test.json").exists()
    assert read_run_config(again).fp8_scales == read_run_config(first).fp8_scales


def test_scale_for():
    assert (scale_for(448.0), scale_for(2.0), scale_for(2.0, 2), scale_for(0.0)) == (1.0, 224.0, 56.0, 1.0)


def test_what_cannot_be_calibrated(inputs, tmp_path):
    checkpoint, fasta = inputs
    target = tmp_path / "new"
    adapters = write_tiny_adapters(tmp_path / "adapters", checkpoint)
    with pytest.raises(UserError, match="holds LoRA adapters without their base model"):
        calibrate_fp8(fasta, adapters, target)
    with pytest.raises(UserError, match="has 130 tokens, more than the 100 positions"):
        calibrate_fp8(fasta, checkpoint, target, max_seq_length=100)
    asks = write_tiny_checkpoint(tmp_path / "asks")
    sections = yaml.safe_load((asks / "run_config.yaml").read_text())
    sections["model"]["vortex_style_fp8"] = True
    (asks / "run_config.yaml").write_text(yaml.safe_dump(sections))
    with pytest.raises(UserError, match="is to run with FP8 input projections, and this machine has no FP8"):
        calibrate_fp8(fasta, asks, target)
    assert not target.exists()
    calibrate_fp8(fasta, checkpoint, target)
    with pytest.raises(UserError, match="--margin is 16; give 0 to 15"):
        calibrate_fp8(checkpoint, fasta, tmp_path / "wide", margin=16)
    with pytest.raises(UserError, match="exists already"):
        calibrate_fp8(fasta, checkpoint, target)


def test_inputs_that_are_not_finite(inputs, tmp_path, monkeypatch):
    checkpoint, fasta = inputs
    from evo2_megatron.model import torch_modules

    monkeypatch.setattr(torch_modules, "rms_norm", lambda x_LBH, *args: x_LBH * float("nan"))
    with pytest.raises(UserError, match="layer 0 has inputs that are not finite"):
        calibrate_fp8(fasta, checkpoint, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, lengths",
    [
        ([], (128, 40, 12)),
        (["--tensor-parallel-size", "2"], (128, 40, 12)),
        (["--pipeline-model-parallel-size", "2"], (128, 40, 12)),
        (["--context-parallel-size", "2"], (520, 600)),
    ],
)
def test_two_processes_find_the_same(inputs, tmp_path, layout, lengths):
    checkpoint, _ = inputs
    fasta = tmp_path / "even.fa"
    letters = "GATTACAACGGGTCCTA" * 40
    fasta.write_text("".join(f">{i}\n{letters[i : i + length]}\n" for i, length in enumerate(lengths)))
    want = read_run_config(calibrate_fp8(fasta, checkpoint, tmp_path / "one", max_seq_length=600)).fp8_scales
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = ["evo2_megatron.cli.calibrate_fp8", "--ckpt-dir", checkpoint, "--fasta", fasta]
    done = subprocess.run(
        [*launcher, *command, "--output-dir", tmp_path / "two", "--max-seq-length", "600", *layout],
        check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == f"{tmp_path / 'two' / checkpoint.name}\n"
    got = read_run_config(tmp_path / "two" / checkpoint.name).fp8_scales
    assert list(got) == list(want)
    for layer, pair in want.items():
        assert got[layer] == pytest.approx(pair, rel=1e-5)


def test_command(inputs, tmp_path, capsys):
    from evo2_megatron.cli import calibrate_fp8 as command

    checkpoint, fasta = inputs
    flags = ["--ckpt-dir", str(checkpoint.parent), "--fasta", str(fasta), "--output-dir", str(tmp_path / "new")]
    command.main([*flags, "--no-self-test"])
    assert capsys.readouterr().out == f"{tmp_path / 'new' / checkpoint.name}\n"
    with pytest.raises(SystemExit) as ending:
        command.main(flags)
    assert ending.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("exists already; choose another folder or remove it")
