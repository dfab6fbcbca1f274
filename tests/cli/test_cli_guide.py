# SPDX-License-Identifier: Apache-2.0
"""evo2_guide from the command line: what the flags mean, what is written, and how errors are shown."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.cli import guide
from evo2_megatron.config import ParallelConfig

EVERY_FLAG = """
--prompt-file prompts.jsonl --scorer scorer.py:gc --score-of completion --scorer-timeout 7
--beams 3 --samples 5 --chunk-length 11 --output-file out/records.fa --output-format fasta --include-prompt
--return-log-probs --max-new-tokens 7 --temperature 0.5 --top-k 4 --top-p 0.9 --seed 0 --alphabet ACGT
--stop-string TAA --stop-string TAG --include-stop-string --no-stop-at-eod --max-seq-length 9000 --max-batch-size 4
--tensor-parallel-size 4 --pipeline-model-parallel-size 3
--mixed-precision-recipe bf16-mixed --vortex-style-fp8 --fp8-emulation --self-test --use-subquadratic-ops
--base-ckpt-dir base
"""


@pytest.fixture
def call(monkeypatch):
    """Run the command with the task and the scorer replaced by recorders; returns what they were given."""

    def run(*argv):
        seen = {}

        @contextlib.contextmanager
        def open_scorer(**given):
            seen.update(scorer=given)
            yield "score"

        monkeypatch.setattr("evo2_megatron.tasks.generation.scorers.open_scorer", open_scorer)
        monkeypatch.setattr(
            "evo2_megatron.tasks.generation.guide.guide",
            lambda prompts, ckpt_dir, settings, search, score, **rest: seen.update(
                rest, prompts=prompts, ckpt_dir=ckpt_dir, settings=settings, search=search, score=score
            ),
        )
        guide.main(["--ckpt-dir", "ckpt", *argv])
        assert callable(seen.pop("on_record")) and seen.pop("score") == "score"
        return seen

    return run


def test_defaults(call):
    from evo2_megatron.tasks.generation.generate import GenerationSettings
    from evo2_megatron.tasks.generation.guided import SearchSettings
    from evo2_megatron.tasks.generation.prompts import Prompt
    from evo2_megatron.tasks.generation.scorers import TIMEOUT

    search = SearchSettings()
    assert call("--prompt", "ACGT", "--scorer-command", "./program --fast") == {
        "prompts": [Prompt("0", "ACGT")],
        "ckpt_dir": Path("ckpt"),
        "settings": GenerationSettings(max_new_tokens=1024, max_batch_size=search.width),
        "search": search,
        "scorer": {"function": None, "command": "./program --fast", "timeout": TIMEOUT},
        "max_seq_length": None,
        "parallel": ParallelConfig(),
        "precision": None,
        "base_ckpt_dir": None,
        "fp8": "as_asked",
        "with_self_test": False,
        "provider_overrides": {},
        "output_file": None,
        "output_format": None,
        "include_prompt": False,
    }


def test_every_flag(call, tmp_path, monkeypatch):
    from evo2_megatron.tasks.generation.generate import GenerationSettings
    from evo2_megatron.tasks.generation.guided import SearchSettings
    from evo2_megatron.tasks.generation.prompts import Prompt
    from evo2_megatron.tasks.generation.sampling import Sampling

    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"id": "a", "prompt": "ACGT", "seed": 3}\n')
    assert call(*shlex.split(EVERY_FLAG)) == {
        "prompts": [Prompt("a", "ACGT", 3)],
        "ckpt_dir": Path("ckpt"),
        "settings": GenerationSettings(
            max_new_tokens=7,
            sampling=Sampling(temperature=0.5, top_k=4, top_p=0.9, seed=0),
            return_log_probs=True,
            stop_at_eod=False,
            alphabet="ACGT",
            stop_strings=("TAA", "TAG"),
            include_stop_string=True,
            max_batch_size=4,
        ),
        "search": SearchSettings(beams=3, samples=5, chunk=11, score_of="completion"),
        "scorer": {"function": "scorer.py:gc", "command": None, "timeout": 7},
        "max_seq_length": 9000,
        "parallel": ParallelConfig(tensor=4, pipeline=3),
        "precision": "bf16_mixed",
        "base_ckpt_dir": Path("base"),
        "fp8": "emulate",
        "with_self_test": True,
        "provider_overrides": {"vortex_style_fp8": True, "use_subquadratic_ops": True},
        "output_file": Path("out/records.fa"),
        "output_format": "fasta",
        "include_prompt": True,
    }


def test_the_documentation_names_every_flag_and_no_other():
    text = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    (section,) = re.findall(r"^## Guided\n.*?(?=^## )", text, re.MULTILINE | re.DOTALL)
    groups = {group.title: group for group in guide.build_parser()._action_groups}
    every = {flag for group in groups.values() for action in group._group_actions for flag in action.option_strings}
    ours = {flag for t in ("scorer", "search") for a in groups[t]._group_actions for flag in a.option_strings}
    named = set(re.findall(r"--[a-z][a-z-]+", section))
    assert named - every == set() and ours - named == set()


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scorer.py").write_text(
        "def gc(texts):\n    return [sum(map(t.count, 'GC')) / len(t) for t in texts]\n"
        "def odd(texts):\n    return [float('nan')] * len(texts)\n"
    )
    Path("program.py").write_text(
        "import json, sys\nfrom scorer import gc\n"
        "for line in sys.stdin:\n    print(json.dumps({'scores': gc(json.loads(line)['sequences'])}), flush=True)\n"
    )
    Path("prompts.fa").write_text(">one\nACGTACGT\n>two\nGATTACA\n")
    return tmp_path


FLAGS = """
--alphabet ACGT --no-stop-at-eod --max-new-tokens 24 --chunk-length 6 --beams 2 --samples 8 --score-of completion
"""


def run(checkpoint, *argv):
    guide.main(["--ckpt-dir", str(checkpoint), *shlex.split(FLAGS), *argv])


def test_records(checkpoint, folder, capsys):
    run(checkpoint, "--prompt-file", "prompts.fa", "--scorer", "scorer.py:gc", "--output-file", "out.jsonl")
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [(r["id"], r["sample"]) for r in records] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    printed = capsys.readouterr().out
    for record in records:
        bases = record["completion"]
        assert record["score"] == sum(map(bases.count, "GC")) / 24 > 0.75
        assert -20 < record["log_prob_mean"] < 0 and "logprobs" not in record
        assert f"=== [{record['id']}.{record['sample']}] score {record['score']:.6g}, mean " in printed
        assert f"\n{bases}\n" in printed

    # the program scores as the function does; a prompt's search can be made again alone, by its seed
    command = f"'{sys.executable}' program.py"
    again = ("--prompt", "GATTACA", "--seed", str(records[2]["seed"]), "--max-batch-size", "3", "--return-log-probs")
    run(checkpoint, *again, "--scorer-command", command, "--output-file", "again.jsonl")
    others = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
    assert [r["completion"] for r in others] == [r["completion"] for r in records[2:]]
    for other, record in zip(others, records[2:]):
        log_probs = other["logprobs"]["completion_logprobs"]
        assert len(log_probs) == 24 and other["log_prob_mean"] == pytest.approx(sum(log_probs) / 24)
        assert other["log_prob_mean"] == pytest.approx(record["log_prob_mean"], rel=1e-4)

    run(checkpoint, "--prompt-file", "prompts.fa", "--scorer", "scorer.py:gc", "--output-file", "out.fa")
    header, bases, *_ = Path("out.fa").read_text().splitlines()
    assert bases == records[0]["completion"]
    assert header.startswith(">one.0 seed=1234 finish_reason=length")
    assert f" score={records[0]['score']:.6g} log_prob_mean={records[0]['log_prob_mean']:.6g}" in header
    run(checkpoint, "--prompt-file", "prompts.fa", "--scorer", "scorer.py:gc", "--output-file", "out.tsv")
    heading, first, *_ = Path("out.tsv").read_text().splitlines()
    row = dict(zip(heading.split("\t"), first.split("\t"), strict=True))
    assert row["score"] == f"{records[0]['score']:.6g}" and row["sequence"] == bases


def test_without_a_file_records_are_printed_in_the_format(checkpoint, folder, capsys):
    flags = ("--prompt", "GATTACA", "--scorer", "scorer.py:gc")
    for name in ("jsonl", "fasta", "text"):
        run(checkpoint, *flags, "--output-file", name, "--output-format", name)
    capsys.readouterr()
    for name in ("jsonl", "fasta", "text"):
        run(checkpoint, *flags, "--output-format", name)
        assert capsys.readouterr().out.endswith(Path(name).read_text())


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--prompt A --scorer scorer.py:odd", "scorer scorer.py:odd gave nan for sequence 0"),
        ("--prompt A --scorer scorer.py:none", "has no function 'none'"),
        ("--prompt A --scorer-command ./missing", "cannot be started: No such file or directory"),
        ("--prompt A", "one of the arguments --scorer --scorer-command is required"),
        ("--scorer scorer.py:gc", "one of the arguments --prompt --prompt-file is required"),
        ("--prompt A --scorer scorer.py:gc --beams 0", "0 is not 1 or more"),
        ("--prompt A --scorer scorer.py:gc --max-new-tokens 256", "exceeds the 256 that the checkpoint was trained"),
        ("--prompt A --scorer scorer.py:gc --context-parallel-size 2", "use --context-parallel-size 1"),
    ],
)
def test_errors_end_in_one_line(checkpoint, folder, capsys, argv, message):
    with pytest.raises(SystemExit) as ending:
        run(checkpoint, *shlex.split(argv), "--output-file", "out.jsonl")
    last = capsys.readouterr().err.splitlines()[-1]
    assert ending.value.code == 2 and last.startswith("evo2_guide: error: ") and message in last
    assert not Path("out.jsonl").exists() and not Path("out.jsonl.part").exists()


def test_prompts_that_are_no_dna(checkpoint, folder, capsys):
    run(checkpoint, "--prompt", "AUG", "--scorer", "scorer.py:gc", "--max-new-tokens", "2", "--output-file", "o.fa")
    assert "1 of 1 prompts have letters that no DNA has; the first is 'U'" in capsys.readouterr().err


def test_more_copies_of_the_model_are_refused(checkpoint, folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ending:
        run(checkpoint, "--prompt", "A", "--scorer", "scorer.py:gc")
    assert ending.value.code == 2 and "one copy of the model, which takes 1 of the 2 proc" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["--tensor-parallel-size", "--pipeline-parallel-size"])
def test_a_split_model_searches_as_one_process(checkpoint, folder, layout):
    """Rank 0 alone has the scorer; both processes keep the same sequences, and end in one line if it fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    program = [sys.executable, "-c", "from evo2_megatron.cli.guide import main; main()"]
    flags = ["--ckpt-dir", str(checkpoint), *shlex.split(FLAGS), "--prompt", "ACGTACGT"]

    def split(scorer, output):
        command = [*torchrun, *program, *flags, layout, "2", "--scorer", scorer, "--output-file", output]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    run(checkpoint, "--prompt", "ACGTACGT", "--scorer", "scorer.py:gc", "--output-file", "one.jsonl")
    done = split("scorer.py:gc", "two.jsonl")
    assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in Path(f"{n}.jsonl").read_text().splitlines()] for n in ("one", "two"))
    assert [(r["completion"], r["score"]) for r in two] == [(r["completion"], r["score"]) for r in one]

    failed = split("scorer.py:odd", "failed.jsonl")
    assert failed.returncode != 0 and not Path("failed.jsonl").exists()
    assert "evo2_guide: error: scorer scorer.py:odd gave nan for sequence 0" in failed.stderr
