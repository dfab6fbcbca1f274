# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile, without Docker: its steps are read, and those of the CPU image are run in an empty folder."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).parents[1]
HOME = "/opt/evo2-megatron"
# what a container begins with, and what tells pip where packages are
KEPT_VARIABLES = re.compile(r"PATH|HOME|LANG|(PIP|UV|SSL|REQUESTS|CURL)_\w+|\w*_proxy", re.IGNORECASE)


class Step(NamedTuple):
    word: str
    rest: str


def targets() -> dict[str, list[Step]]:
    """Name of the target: its steps."""
    text = re.sub(r"^#.*\n", "", (PROJECT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[Step]] = {}
    for line in filter(None, text.splitlines()):
        step = Step(*line.split(None, 1))
        if step.word == "FROM":
            steps = found[step.rest.split(" AS ")[1]] = []
        steps.append(step)
    return found


def in_context(folder: str, names: list[str]) -> set[str]:
    """For ``shutil.copytree``: what .dockerignore keeps from an image."""
    patterns = (PROJECT / ".dockerignore").read_text().split()
    where = Path(folder).relative_to(PROJECT)
    kept_out = [pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")]
    kept_out += [pattern for pattern in patterns if where == Path()]
    return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in kept_out)}


def test_the_default_is_for_gpus():
    assert list(targets()) == ["cpu", "gpu"]


@pytest.mark.parametrize(
    "name, kind, base", [("cpu", "cpu", "python:3.1"), ("gpu", "image", "nvcr.io/nvidia/pytorch:")]
)
def test_an_image_is_what_the_build_script_makes(name, kind, base):
    steps = targets()[name]
    assert {step.word for step in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "CMD"}
    assert steps[0].rest.startswith(base)
    assert Step("WORKDIR", HOME) in steps and Step("COPY", ". .") in steps
    assert Step("RUN", f"EVO2_BUILD={kind} ./.ci_build.sh") in steps
    assert steps.index(Step("COPY", ". .")) < steps.index(Step("RUN", f"EVO2_BUILD={kind} ./.ci_build.sh"))


def test_an_image_holds_neither_the_environment_nor_the_history(tmp_path):
    assert {".git", ".venv", ".pytest_cache"} <= in_context(str(PROJECT), [".git", ".venv", ".pytest_cache", "src"])
    assert in_context(str(PROJECT / "src"), ["__pycache__", "evo2_megatron", "x.egg-info"]) == {
        "__pycache__",
        "x.egg-info",
    }
    needed = {
        ".ci_build.sh",
        "pyproject.toml",
        "constraints.txt",
        "requirements-no-deps.txt",
        "src",
        "README.md",
        "LICENSE",
    }
    assert not in_context(str(PROJECT), sorted(needed))


@pytest.mark.slow
def test_the_steps_of_the_cpu_image_make_a_working_project(tmp_path):
    home = tmp_path / "image"
    environment = {name: value for name, value in os.environ.items() if KEPT_VARIABLES.fullmatch(name)}
    environment["PATH"] = os.pathsep.join(p for p in environment["PATH"].split(os.pathsep) if ".venv" not in p)
    for word, rest in targets()["cpu"]:
        rest = rest.replace(HOME, str(home))
        if word == "COPY":
            shutil.copytree(PROJECT, home, ignore=in_context, symlinks=True)
        elif word == "ENV":
            name, value = rest.split("=", 1)
            environment[name] = re.sub(r"\$(\w+)", lambda found: environment[found[1]], value)
        elif word == "RUN" and rest.startswith("apt-get"):
            for program in re.search(r"recommends (.*?) &&", rest)[1].split():
                assert shutil.which(program), f"this machine has no {program}, which the image installs"
        elif word == "RUN":
            done = subprocess.run(["sh", "-c", rest], cwd=home, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    for command in ("evo2_doctor", "train_evo2 --help", "torchrun --help"):
        done = subprocess.run(command.split(), cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        if command == "evo2_doctor":
            assert str(home) in done.stdout and "no problems" in done.stdout
