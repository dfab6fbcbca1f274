# SPDX-License-Identifier: Apache-2.0
"""Every command block of README.md: its flags are accepted, and it runs.

A block is what stands between ```` ```bash ```` and ```` ``` ````. A comment on the line above says how it is tested:

* none: run in the quick tests, in order, all in one folder that is a copy of the project;
* ``<!-- takes: minutes -->``: run in the slow tests, in order with those above;
* ``<!-- needs: gpu -->`` (or weights, network, root, ...): not run.

The flags of all of them are given to the real parsers. A block ```` ```text ```` that follows is what the commands
print: its lines must occur in their output, in this order, but for numbers and sequences.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text()
SCRIPTS = {
    script.name: script.value.removesuffix(":main")
    for script in metadata.distribution("evo2-megatron").entry_points.select(group="console_scripts")
}
_FENCE = re.compile(
    r"^(?:<!-- (needs|takes): [^\n]+ -->\n)?```bash\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)
_VARIES = re.compile(r"\d[\d.,]*(?:[eE][-+]?\d+)?|[ACGT]{10,}")
_HEREDOC = re.compile(r"<<-?\s*['\"]?(\w+)['\"]?([^\n]*)\n.*?^\1$", re.MULTILINE | re.DOTALL)
_STARTS_A_TEST_RUN = re.compile(r"make (test|bench)|pytest|\.ci/run")


class Block(NamedTuple):
    line: int
    """Line of README.md where the commands start."""

    note: str
    """"needs", "takes" or empty."""

    text: str

    prints: str
    """What README.md shows of its output."""


BLOCKS = [Block(README[: m.start(2)].count("\n") + 1, m[1] or "", m[2], m[3] or "") for m in _FENCE.finditer(README)]


def commands(text: str) -> list[list[str]]:
    """Words of every simple command of a shell text, without assignments and redirections."""
    lines = _HEREDOC.sub(r"\2", text).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = []
        for token in [*lexer, ";"]:
            if set(token) <= set("();|&"):
                found.append(words)
                words = []
            else:
                words.append(token)
    return [_plain(words) for words in found if _plain(words)]


def _plain(words: list[str]) -> list[str]:
    """Drop leading ``NAME=value`` and ``> file``."""
    kept, skip = [], False
    for word in words:
        if skip or set(word) <= set("<>"):
            skip = not skip
        elif kept or not re.match(r"\w+=", word):
            kept.append(word)
    return kept


def check(words: list[str]) -> None:
    """Assert that a command exists and accepts its flags."""
    program, *arguments = words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = _parse(get_args_parser(), arguments)
        check([launch.training_script, *launch.training_script_args])
    elif program in SCRIPTS:
        _parse(importlib.import_module(SCRIPTS[program]).build_parser(), arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
        assert {a for a in arguments if "=" not in a} <= set(targets), words
    elif program in ("source", ".", "python", "bash", "cat"):
        assert arguments == [] or arguments[0].startswith("-") or (PROJECT / arguments[0]).exists(), words
    elif "/" in program:
        assert os.access(PROJECT / program, os.X_OK), f"{program} is not an executable file"
    else:
        assert not re.match(r"evo2_|bionemo_|\w+_evo2$", program), f"{program} is no console script"


def _parse(parser, arguments):
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return parser.parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{shlex.join(arguments)}\n{message.getvalue()}")


def run(blocks: list[Block], folder: Path, *, seconds: float) -> None:
    """Run blocks one after another in a copy of the project."""
    ignore = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "*.egg-info", "results", "quickstart")
    shutil.copytree(PROJECT, folder, ignore=ignore, symlinks=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=folder,
            env=os.environ | {"PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"README.md:{block.line}: status {done.returncode}\n{done.stdout[-4000:]}"
        missing = not_printed(block.prints, done.stdout)
        assert missing is None, f"README.md:{block.line}: {missing!r} is not in the output\n{done.stdout[-4000:]}"


def not_printed(shown: str, output: str) -> str | None:
    """The first line that the output does not have after those before it; numbers and sequences may differ."""
    lines = iter(_VARIES.sub("~", output).splitlines())
    for line in shown.splitlines():
        if not any(_VARIES.sub("~", line).strip() in printed for printed in lines):
            return line
    return None


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"line{b.line}")
def test_commands_parse(block):
    for words in commands(block.text):
        check(words)
    assert block.note == "needs" or not _STARTS_A_TEST_RUN.search(block.text), "say <!-- needs: ... --> above it"


def test_what_a_block_prints_is_compared():
    output = "x 1.50e-3 of ACGTACGTACGT\nsecond\n"
    assert not_printed("x 2 of GGGGGGGGGGGGG\nsecond", output) is None
    assert not_printed("second\nx 2 of GGGGGGGGGGGGG", output) == "x 2 of GGGGGGGGGGGGG"
    assert any(block.prints for block in BLOCKS)


def test_every_block_is_found():
    assert len(BLOCKS) == len(re.findall(r"^```bash", README, re.MULTILINE)), "a comment above a block is misspelt"


def test_every_command_has_an_example():
    programs = {word for block in BLOCKS for words in commands(block.text) for word in words}
    assert SCRIPTS.keys() <= programs


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert [link for link in links if not (PROJECT / link).exists()] == []


def test_quick_blocks_run(tmp_path):
    run([b for b in BLOCKS if not b.note], tmp_path / "project", seconds=60)


@pytest.mark.slow
def test_all_blocks_run(tmp_path):
    run([b for b in BLOCKS if b.note != "needs"], tmp_path / "project", seconds=1800)


def test_commands_of_a_shell_text():
    text = 'A=1 train_evo2 --lr 1 \\\n  --wd 2 > log; cat <<"X" | wc -l && ls # no\nmock_evo2 --bad\nX\nmake a b=c\n'
    assert commands(text) == [
        ["train_evo2", "--lr", "1", "--wd", "2"],
        ["cat"],
        ["wc", "-l"],
        ["ls"],
        ["make", "a", "b=c"],
    ]


@pytest.mark.parametrize(
    "command",
    [
        "train_evo2 --mock-data --no-such-flag",
        "mock_evo2",
        "make no-such-target",
        "./no_such.sh",
        "torchrun --nproc-per-node 2 --no-python preprocess_evo2",
        "torchrun --no-such-flag train_evo2 --mock-data",
    ],
)
def test_a_wrong_command_is_noticed(command):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(command.split())
