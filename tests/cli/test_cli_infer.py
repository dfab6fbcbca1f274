# SPDX-License-Identifier: Apache-2.0
"""infer_evo2 from the command line: what the flags mean, what is printed, and how errors are shown."""

import shlex
from pathlib import Path

import pytest

from evo2_megatron.cli import infer
from evo2_megatron.config import ParallelConfig

EVERY_FLAG = """
--prompt-file prompts.jsonl --output-file out/records.jsonl --return-log-probs --max-new-tokens 7 --temperature 0.5
--top-k 4 --seed 0 --max-seq-length 9000 --max-batch-size 3 --prompt-segmentation-threshold 128
--tensor-parallel-size 4 --pipeline-model-parallel-size 3 --context-parallel-size 2
--mixed-precision-recipe bf16-mixed --vortex-style-fp8 --fp8-emulation --self-test --use-subquadratic-ops
--base-ckpt-dir base
"""
"""The flags of the former command, and ours."""


@pytest.fixture
def call(monkeypatch):
    """Run the command with the task replaced by a recorder; returns what the task was given."""

    def run(*argv):
        seen = {}
        monkeypatch.setattr(
            "evo2_megatron.tasks.infer.infer",
            lambda prompts, ckpt_dir, settings, **rest: seen.update(
                rest, prompts=prompts, ckpt_dir=ckpt_dir, settings=settings
            ),
        )
        infer.main(["--ckpt-dir", "ckpt", *argv])
        return seen

    return run


def test_defaults(call):
    from evo2_megatron.tasks.generate import GenerationSettings
    from evo2_megatron.tasks.prompts import Prompt

    seen = call()
    assert callable(seen.pop("on_record"))
    assert seen == {
        "prompts": [Prompt("0", infer.DEFAULT_PROMPT)],
        "ckpt_dir": Path("ckpt"),
        "settings": GenerationSettings(),
        "max_seq_length": None,
        "parallel": ParallelConfig(),
        "precision": None,
        "base_ckpt_dir": None,
        "fp8": "as_asked",
        "with_self_test": False,
        "provider_overrides": {},
        "output_file": None,
    }


def test_every_flag_arrives(call, tmp_path, monkeypatch):
    from evo2_megatron.tasks.generate import GenerationSettings
    from evo2_megatron.tasks.prompts import Prompt
    from evo2_megatron.tasks.sampling import Sampling

    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"id": "x", "prompt": "ACGT"}\n')
    seen = call("--prompt", "not used", *shlex.split(EVERY_FLAG))
    del seen["on_record"]
    assert seen == {
        "prompts": [Prompt("x", "ACGT")],
        "ckpt_dir": Path("ckpt"),
        "settings": GenerationSettings(
            max_new_tokens=7,
            sampling=Sampling(temperature=0.5, top_k=4, seed=0),
            return_log_probs=True,
            max_batch_size=3,
            prefill_chunk=128,
        ),
        "max_seq_length": 9000,
        "parallel": ParallelConfig(tensor=4, pipeline=3, context=2),
        "precision": "bf16_mixed",
        "base_ckpt_dir": Path("base"),
        "fp8": "emulate",
        "with_self_test": True,
        "provider_overrides": {"vortex_style_fp8": True, "use_subquadratic_ops": True},
        "output_file": Path("out/records.jsonl"),
    }
    assert call("--top-p", "0.9")["settings"].sampling == Sampling(top_p=0.9)


def test_environment_variables_stand_in_for_flags(call, monkeypatch):
    monkeypatch.setenv("EVO2_MAX_SEQ_LEN", "5000")
    monkeypatch.setenv("EVO2_PST", "0")
    seen = call()
    assert (seen["max_seq_length"], seen["settings"].prefill_chunk) == (5000, 0)
    seen = call("--max-seq-length", "70", "--prompt-segmentation-threshold", "60")
    assert (seen["max_seq_length"], seen["settings"].prefill_chunk) == (70, 60)


def test_records_are_printed(call, capsys):
    call()["on_record"]({"id": "phage 7", "prompt": "AC", "completion": "GT"})
    assert capsys.readouterr().out == "=== [phage 7] Generated Text ===\nGT\n\n"


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--top-k 4 --top-p 0.9", "give only one of them"),
        ("--top-p 1.5", "top_p is 1.5"),
        ("--temperature -1", "temperature is -1.0"),
        ("--seed -1", "seed is -1"),
        ("--prompt-segmentation-threshold -1", "prefill_chunk is -1"),
        ("--max-new-tokens 0", "0 is not 1 or more"),
        ("--max-batch-size 0", "0 is not 1 or more"),
        ("--mixed-precision-recipe fp12", "invalid choice"),
        ("--prompt-file none.jsonl", "Prompt file none.jsonl cannot be read"),
        ("--temp 1", "unrecognized arguments"),
        ("--fp8-emulation --allow-precision-mismatch", "not allowed with argument"),
    ],
)
def test_bad_flags(call, capsys, argv, message):
    with pytest.raises(SystemExit) as ending:
        call(*argv.split())
    assert ending.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("infer_evo2: error: ")]
    assert message in line


@pytest.mark.parametrize("variable", ["EVO2_MAX_SEQ_LEN", "EVO2_PST"])
def test_bad_environment_variables(call, monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "8k")
    with pytest.raises(SystemExit):
        call()
    assert f"environment variable {variable} is '8k'" in capsys.readouterr().err
