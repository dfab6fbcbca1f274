# SPDX-License-Identifier: Apache-2.0
"""The quickstart without its minutes: its commands parse, and its report computes what it says."""

import importlib
import math
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $(printf '%q ' "$@")" >> commands
if [[ $1 == *windows.py ]]; then printf '>w\\nACGTACGT\\n' > "$3"; fi
"""


def test_commands_parse(tmp_path):
    (tmp_path / "examples").mkdir()
    shutil.copy(EXAMPLES / "quickstart.sh", tmp_path / "examples")
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name in ("python", "preprocess_evo2", "train_evo2", "predict_evo2", "infer_evo2"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    path = f"{stubs}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([tmp_path / "examples" / "quickstart.sh"], check=True, env=os.environ | {"PATH": path})

    seen = []
    for line in (tmp_path / "commands").read_text().splitlines():
        program, *arguments = shlex.split(line)
        seen.append(program)
        if program == "python":
            assert (EXAMPLES.parent / arguments[0]).is_file()
        else:
            importlib.import_module(f"evo2_megatron.cli.{program.removesuffix('_evo2')}").build_parser().parse_args(
                arguments
            )
    commands = ["preprocess_evo2", "train_evo2", "predict_evo2", "train_evo2", "predict_evo2", "infer_evo2"]
    assert [program for program in seen if program != "python"] == commands


def test_outside_the_environment_it_says_what_to_do(tmp_path):
    (tmp_path / "examples").mkdir()
    script = shutil.copy(EXAMPLES / "quickstart.sh", tmp_path / "examples")
    done = subprocess.run(["bash", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 2 and "make quickstart" in done.stderr
    assert not (tmp_path / "quickstart").exists()


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("quickstart_report")


def slow_probability(report, documents, context, base):
    """One probability of the chain by scanning the text, shortest context first."""
    probability = 1 / 4
    for k in range(len(context) + 1):
        tail = context[len(context) - k :]
        followers = [d[i + k] for d in documents for i in range(len(d) - k) if d[i : i + k] == tail]
        weight = report.PRIOR_WEIGHT
        probability = (followers.count(base) + weight * probability) / (len(followers) + weight)
    return probability


def test_markov_loss(report):
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(list("ACGT"), 200)) for _ in range(3)]
    windows = ["ACGTTGCAAC", "GG"]
    want = 0.0
    for window in windows:
        for i, base in enumerate(window):
            want -= math.log(slow_probability(report, documents, window[max(0, i - 3) : i], base))
    got = report.markov_loss(report.markov_chain(documents, 3), windows)
    assert got == pytest.approx(want / 12)


def test_markov_probabilities_sum_to_one(report):
    for table in report.markov_chain(["ACGTTGCA"], 5):
        np.testing.assert_allclose(table.sum(axis=1), 1)


def test_model_loss_weighs_windows_by_their_length(report, tmp_path):
    (tmp_path / "scores.tsv").write_text("id\tlength\tmean_log_likelihood\na\t30\t-1\nb\t10\t-2\n")
    assert report.model_loss(tmp_path) == pytest.approx(1.25)
