# SPDX-License-Identifier: Apache-2.0
"""``--devices auto`` of commands that run a model, on a machine with GPUs: how the model is divided."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from evo2_megatron.runtime import megatron
from evo2_megatron.tasks import division, launch

LORA = {"--base-ckpt-dir": "base", "--quantize-weights": "int4"}
COMMANDS = {
    "predict": {"--fasta": "x.fa"} | LORA,
    "variants": {"--fasta": "x.fa", "--vcf": "x.vcf", "--output-dir": "out"} | LORA,
    "infer": LORA,
    "guide": {"--scorer": "s.py:f", "--prompt": "A"} | LORA,
    "serve": LORA,
    "calibrate_fp8": {"--fasta": "x.fa", "--output-dir": "out"},
}


@pytest.fixture
def machine(monkeypatch):
    """With four GPUs of 80 bytes, where two processes must share a model; what was asked, and started."""
    asked, started = [], []
    monkeypatch.setattr(megatron, "on_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(launch, "_memory", lambda gpu: 80)
    monkeypatch.setattr(launch, "_run", lambda count, flags, *, ended_by: started.append((count, flags)))
    monkeypatch.setattr(
        division, "tensor_parallel_size", lambda ckpt_dir, **given: asked.append((ckpt_dir, given)) or 2
    )
    return asked, started


def run(monkeypatch, name, *more):
    flags = [text for flag, value in COMMANDS[name].items() for text in (flag, value) if text is not None]
    flags += ["--ckpt-dir", "model", "--devices", "auto", "--mixed-precision-recipe", "bf16-mixed", *more]
    monkeypatch.setattr("sys.argv", [name, *flags])
    importlib.import_module(f"evo2_megatron.cli.{name}").main()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_model_that_is_run_is_divided(machine, monkeypatch, name):
    asked, started = machine
    run(monkeypatch, name)
    ((ckpt_dir, given),) = asked
    has_lora = "--quantize-weights" in COMMANDS[name]
    assert ckpt_dir == Path("model") and given.pop("precision") == "bf16_mixed"
    assert given.pop("base_ckpt_dir") == (Path("base") if has_lora else None)
    assert given.pop("quantize_weights") == ("int4" if has_lora else None)
    assert given == {"num_gpus": 4, "gpu_bytes": 80}
    assert started == [(2 if name == "guide" else 4, ["--tensor-parallel-size", "2"])]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_size_that_is_given_is_kept(machine, monkeypatch, name):
    asked, started = machine
    run(monkeypatch, name, "--tensor-parallel-size", "4")
    assert asked == [] and started == [(4, [])]
