# SPDX-License-Identifier: Apache-2.0
"""infer_evo2 from the command line: what the flags mean, what is printed, and how errors are shown."""

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.cli import infer
from evo2_megatron.config import ParallelConfig

EVERY_FLAG = """
--prompt-file prompts.jsonl --output-file out/records.jsonl --return-log-probs --max-new-tokens 7 --temperature 0.5
--top-k 4 --top-p 0.9 --seed 0 --num-samples 2 --output-format fasta --include-prompt --stream --alphabet ACGT
--stop-string TAA --stop-string TAG --include-stop-string --no-stop-at-eod
--max-seq-length 9000 --max-batch-size 3 --prompt-segmentation-threshold 128 --cuda-graphs
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
            "evo2_megatron.tasks.generation.infer.infer",
            lambda prompts, ckpt_dir, settings, **rest: seen.update(
                rest, prompts=prompts, ckpt_dir=ckpt_dir, settings=settings
            ),
        )
        infer.main(["--ckpt-dir", "ckpt", *argv])
        return seen

    return run


def test_defaults(call):
    from evo2_megatron.tasks.generation.generate import GenerationSettings
    from evo2_megatron.tasks.generation.prompts import Prompt

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
        "output_format": None,
        "num_samples": 1,
        "include_prompt": False,
    }


def test_every_flag_arrives(call, tmp_path, monkeypatch):
    from evo2_megatron.tasks.generation.generate import GenerationSettings
    from evo2_megatron.tasks.generation.prompts import Prompt
    from evo2_megatron.tasks.generation.sampling import Sampling

    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"id": "x", "prompt": "ACGT", "seed": 9}\n')
    seen = call("--prompt", "not used", *shlex.split(EVERY_FLAG))
    assert callable(seen.pop("on_piece"))
    assert seen == {
        "prompts": [Prompt("x", "ACGT", 9)],
        "ckpt_dir": Path("ckpt"),
        "settings": GenerationSettings(
            max_new_tokens=7,
            sampling=Sampling(temperature=0.5, top_k=4, top_p=0.9, seed=0),
            return_log_probs=True,
            max_batch_size=3,
            prefill_chunk=128,
            cuda_graphs=True,
            alphabet="ACGT",
            stop_strings=("TAA", "TAG"),
            include_stop_string=True,
            stop_at_eod=False,
        ),
        "max_seq_length": 9000,
        "parallel": ParallelConfig(tensor=4, pipeline=3, context=2),
        "precision": "bf16_mixed",
        "base_ckpt_dir": Path("base"),
        "fp8": "emulate",
        "with_self_test": True,
        "provider_overrides": {"vortex_style_fp8": True, "use_subquadratic_ops": True},
        "output_file": Path("out/records.jsonl"),
        "output_format": "fasta",
        "num_samples": 2,
        "include_prompt": True,
    }
    assert call("--top-p", "0.9")["settings"].sampling == Sampling(top_p=0.9)


def test_the_documentation_names_every_flag_and_no_other():
    text = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    text = re.sub(r"^## Guided\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)  # another command
    groups = {group.title: group for group in infer.build_parser()._action_groups}
    every = {flag for group in groups.values() for action in group._group_actions for flag in action.option_strings}
    ours = {
        action.option_strings[0]
        for title in ("prompts", "output", "sampling", "stopping", "length and memory")
        for action in groups[title]._group_actions
    }
    named = set(re.findall(r"--[a-z][a-z-]+", text))
    assert named - every == set() and ours - named - {"--stop-at-eod"} == set()


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


def test_prompt_files_of_every_kind(call, tmp_path):
    from evo2_megatron.tasks.generation.prompts import Prompt

    for name, content in (("x.fa", ">a b\nAC\nGT\n"), ("x.txt", "ACGT\n"), ("x.jsonl", '{"prompt": "ACGT"}\n')):
        (tmp_path / name).write_text(content)
        want = Prompt("a" if name == "x.fa" else "0", "ACGT")
        assert call("--prompt-file", str(tmp_path / name))["prompts"] == [want]


def record(**more):
    usage = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    return {
        "id": "phage 7", "prompt": "AC", "completion": "GT", "finish_reason": "length", "usage": usage, "seed": 1
    } | more  # fmt: skip


@pytest.mark.parametrize(
    "flags, printed",
    [
        (
            ["fasta"],
            ">phage_7 seed=1 finish_reason=length prompt_tokens=2 completion_tokens=2 total_tokens=4\nGT\n" * 2,
        ),
        (["text"], "id\tseed\tfinish_reason\tsequence\n" + "phage_7\t1\tlength\tGT\n" * 2),
        (
            ["text", "--include-prompt"],
            "id\tseed\tfinish_reason\tsequence\n" + "phage_7\t1\tlength\tACGT\n" * 2,
        ),
        (["jsonl"], f"{json.dumps(record())}\n" * 2),
    ],
)
def test_records_are_printed_in_a_format(call, capsys, flags, printed):
    show = call("--output-format", *flags)["on_record"]
    show(record())
    show(record())
    assert capsys.readouterr().out == printed


def test_a_format_for_the_file_leaves_what_is_printed(call, capsys):
    call("--output-format", "text", "--output-file", "x")["on_record"](record(sample=3))
    assert capsys.readouterr().out == "=== [phage 7.3] Generated Text ===\nGT\n\n"


def test_stream_of_one_prints_at_once_what_is_printed_without(call, capsys):
    from evo2_megatron.tasks.generation.infer import Piece

    show = call("--stream")["on_piece"]
    printed = []
    for text, reason in (("G", None), ("T", None), ("", "stop")):
        show(Piece("0", None, text, None, reason, 0))
        printed.append(capsys.readouterr().out)
    assert printed == ["=== [0] Generated Text ===\nG", "T", "\n\n"]
    call()["on_record"](record(id="0"))
    assert capsys.readouterr().out == "".join(printed)


@pytest.mark.parametrize("samples", [(0, 1), (None, None)], ids=["samples", "prompts of one id"])
def test_stream_of_many_prints_lines_with_ids(call, capsys, samples):
    from evo2_megatron.tasks.generation.infer import Piece

    show = call("--stream", "--num-samples", "2")["on_piece"]
    for place in range(130):
        for number, base in enumerate("AC"):
            if place < 70 or number == 0:
                end = place == (129, 69)[number]
                show(Piece("0", samples[number], base, None, "length" if end else None, number))
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    one, other = ("0" if sample is None else f"0.{sample}" for sample in samples)
    assert lines == [
        [one, "A" * 60],
        [other, "C" * 60],
        [other, "C" * 10],
        [one, "A" * 60],
        [one, "A" * 10],
    ]


def run_command(checkpoint, *flags):
    program = [sys.executable, "-c", "from evo2_megatron.cli.infer import main; main()"]
    return [*program, "--ckpt-dir", str(checkpoint), "--prompt", "ACGT", "--stream", *flags]


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_interrupted_run_leaves_nothing_under_the_final_name(checkpoint, tmp_path, number, status):
    out = tmp_path / "out.fa"
    flags = ["--max-new-tokens", "100000", "--max-seq-length", "200000", "--no-stop-at-eod", "--output-file", str(out)]
    # not what this process inherited: shells let what they start in the background ignore Ctrl-C
    process = subprocess.Popen(
        run_command(checkpoint, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.read(40).startswith("=== [0] Generated Text ===\n"), "bases come before the end"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and errors.splitlines()[-1] == "infer_evo2: interrupted"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_run(checkpoint, tmp_path):
    flags = ["--max-new-tokens", "100000", "--max-seq-length", "200000", "--no-stop-at-eod"]
    process = subprocess.Popen(
        run_command(checkpoint, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.read(40)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE and "Traceback" not in errors


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--stream --output-format fasta", "give --output-file for the records"),
        ("--output-format fastq", "invalid choice: 'fastq'"),
        ("--include-prompt --stream", "what is printed has no place for --include-prompt; add --output-file"),
        ("--return-log-probs", "what is printed has no place for --return-log-probs; add --output-file"),
        ("--num-samples 0", "0 is not 1 or more"),
        ("--alphabet=", "give at least one letter"),
        ("--stop-string=", "a stop string is empty"),
        ("--stop-string TAN --alphabet ACGT", "'TAN' has 'N', which is not in the alphabet 'ACGT'"),
        ("--stop-at-eod=no", "ignored explicit argument"),
        ("--top-p 1.5", "top_p is 1.5"),
        ("--temperature -1", "temperature is -1.0"),
        ("--seed -1", "seed is -1"),
        ("--prompt-segmentation-threshold -1", "--prompt-segmentation-threshold: -1 is not 0 or more"),
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
