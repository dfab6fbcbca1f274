# SPDX-License-Identifier: Apache-2.0
"""The notebooks: as committed, their commands as the real runs give them, and the tiny runs from top to bottom."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
NAMES = ["fine-tuning-tutorial", "lora-fine-tuning-tutorial", "zeroshot_brca1"]
PICTURES = {
    "fine-tuning-tutorial": ["fine-tuning/tiny/loss.png"],
    "lora-fine-tuning-tutorial": ["lora/tiny/curves.png", "lora/tiny/confusion.png"],
    "zeroshot_brca1": ["brca1/tiny/deltas.png", "brca1/tiny/roc.png"],
}
PROGRAMS = {
    "train_evo2": "evo2_megatron.cli.train",
    "predict_evo2": "evo2_megatron.cli.predict",
    "infer_evo2": "evo2_megatron.cli.infer",
    "preprocess_evo2": "evo2_megatron.cli.preprocess",
    "evo2_convert_savanna_to_mbridge": "evo2_megatron.cli.convert_savanna",
    "evo2_export_mbridge_to_vortex": "evo2_megatron.cli.export_vortex",
    "evo2_remove_optimizer": "evo2_megatron.cli.remove_optimizer",
    "evo2_plot_run": "evo2_megatron.cli.plot_run",
    "evo2_classifier.py": "evo2_classifier",
}
LARGEST_OUTPUT = 20_000
"""Bytes of a notebook's outputs together."""


def cells(name, kind="code"):
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def sources(name):
    return ["".join(cell["source"]) for cell in cells(name)]


def test_these_are_all_notebooks():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_as_committed(name):
    text = (EXAMPLES / f"{name}.ipynb").read_text()
    notebook = json.loads(text)
    assert sum(len(json.dumps(cell["outputs"])) for cell in cells(name)) <= LARGEST_OUTPUT
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    # of somebody's machine
    assert re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt|opt|usr)\b", text) == []
    too_long = [line for cell in notebook["cells"] for line in "".join(cell["source"]).splitlines() if len(line) > 130]
    assert too_long == []


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_python_or_bash(name):
    for source in sources(name):
        if source.startswith("%%bash\n"):
            subprocess.run(["bash", "-n"], input=source.partition("\n")[2], text=True, check=True)
        else:
            compile(source, name, "exec")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    text = "\n".join("".join(cell["source"]) for cell in cells(name, "markdown"))
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (EXAMPLES / link).exists()] == []


@pytest.mark.parametrize(
    "variables, size",
    [
        ({}, "1b"),
        ({"FAST_CI_MODE": "0"}, "1b"),
        ({"FAST_CI_MODE": "1"}, "tiny"),
        ({"EVO2_NOTEBOOK_SIZE": "tiny"}, "tiny"),
        ({"EVO2_NOTEBOOK_SIZE": "1b", "FAST_CI_MODE": "1"}, "1b"),
    ],
)
def test_which_size(variables, size, monkeypatch):
    for variable in ("EVO2_NOTEBOOK_SIZE", "FAST_CI_MODE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    for name in NAMES:
        scope = {}
        exec(sources(name)[0], scope)
        assert scope["SIZE"] == size


STUB = """#!/usr/bin/env bash
printf '%q ' "$(basename "$0")" "$@" >> "$COMMANDS"
echo >> "$COMMANDS"
"""


@pytest.mark.parametrize("size", ["1b", "tiny"])
@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name, size, tmp_path, monkeypatch):
    """The real runs need a network and a GPU: here at least each flag of theirs is given to the real parser."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for program in ("torchrun", *PROGRAMS):
        (tmp_path / program).write_text(STUB)
        (tmp_path / program).chmod(0o755)
    variables = {
        "COMMANDS": str(tmp_path / "commands"),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "RUN": f"runs/x/{size}",
        "MODEL_SIZE": "evo2_tiny" if size == "tiny" else "evo2_1b_base",
        "TOKENIZER": "tokenizer",
        "NUM_GPUS": "2",
        "NUM_PROCESSES": "2",
    } | settings(name, size)
    (tmp_path / variables["RUN"]).mkdir(parents=True)
    for source in sources(name):
        if source.startswith("%%bash\n"):
            # what the commands would have written is missing, so that cells end early
            subprocess.run(
                ["bash", "-c", source.partition("\n")[2].replace("set -euo pipefail", "set -u")],
                cwd=tmp_path, env=os.environ | variables, check=False, capture_output=True,
            )  # fmt: skip
    seen = [parse(shlex.split(line)) for line in (tmp_path / "commands").read_text().splitlines()]
    first = "evo2_convert_savanna_to_mbridge" if size == "1b" else "train_evo2"
    assert first in seen and len(seen) >= 3


def settings(name, size):
    """What Python cells put into the environment for the bash cells to read."""
    scope = {
        "os": type("os", (), {"environ": {"NUM_PROCESSES": "2"}}),
        "TINY": size == "tiny",
        "RUN": Path("runs/x", size),
        "CLASSES": "abc",
        "val": range(3000),
    }
    for source in sources(name):
        if 'os.environ["' in source and "def " not in source and "os.environ |=" not in source:
            exec(source, scope)
    return scope["os"].environ


def parse(words):
    """Parse a command with the parser that it would meet, and give its name."""
    program, *arguments = words
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(arguments)
        program, arguments = launch.training_script, launch.training_script_args
    importlib.import_module(PROGRAMS[program]).build_parser().parse_args(arguments)
    return program


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_tiny_run(name, tmp_path, monkeypatch):
    """From top to bottom, by the kernel that readers use; the assertions are the notebook's own."""
    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path / "examples"
    shutil.copytree(EXAMPLES, folder, ignore=shutil.ignore_patterns("runs", "__pycache__"))
    monkeypatch.setenv("EVO2_NOTEBOOK_SIZE", "tiny")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # that of tests; a kernel shows pictures
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    for picture in PICTURES[name]:
        assert (folder / "runs" / picture).read_bytes().startswith(b"\x89PNG")
    drawn = [out for cell in notebook.cells for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(drawn) == len(PICTURES[name])
