# SPDX-License-Identifier: Apache-2.0
"""The shape of the code: who may import whom, how long a file or function may be, and that every flag is read."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import evo2_megatron

ROOT = Path(evo2_megatron.__file__).parent
PROJECT = Path(__file__).parents[1]
FACTS = {"config", "architectures", "layouts"}
MAY_IMPORT = {
    "config": set(),
    "architectures": {"config"},
    "layouts": {"config"},
    "ops": set(),
    "runtime": FACTS,
    "data": FACTS | {"runtime", "ops"},
    "model": FACTS | {"runtime", "ops"},
    "checkpoint": FACTS | {"runtime", "data", "model"},
    "recipes": FACTS | {"runtime", "data", "model"},
    "tasks": FACTS | {"runtime", "ops", "data", "model", "checkpoint", "recipes"},
    "cli": FACTS | {"tasks"},
}
PACKAGES_OF_TASKS = {
    "scoring": set(),
    "generation": set(),
    "training": {"scoring"},
    "heads": {"scoring", "training"},
    "planning": {"scoring", "generation", "training"},
    "conversion": {"scoring"},
    "preparation": set(),
    "server": {"scoring", "generation"},
}
"""Which of the others each takes from; files beside them are for all."""
# who may say "megatron": the rest of the code must not need to know what it runs on
MEGATRON_LAYERS = {"runtime", "model", "checkpoint", "recipes", "tasks"}
MEGATRON_FILES = {"data/datasets.py", "data/providers.py"}  # subclasses of its dataset and provider
COMPILED = {"transformer_engine", "subquadratic_ops_torch", "flash_attn", "causal_conv1d"}
MAY_LOAD_COMPILED = {"ops/backends.py"}  # and runtime/

MAX_LINE, MAX_FILE, MAX_FUNCTION = 119, 400, 60
LONG_FUNCTIONS = {"checkpoint/vortex.py:vortex_config": "one table of 50 fields, and nothing else"}
"""``file:function`` to why it is longer than MAX_FUNCTION lines."""
LONG_FILES: dict[str, str] = {}
"""File to why it is longer than MAX_FILE lines."""

SOURCES = sorted(ROOT.rglob("*.py"))
ALL_CODE = SOURCES + sorted(p for d in ("tests", "examples", "benchmarks") for p in (PROJECT / d).rglob("*.py"))
SCRIPTS = [PROJECT / ".ci_build.sh", PROJECT / ".ci_test_env.sh", PROJECT / ".ci/run", PROJECT / "Makefile"]
SHARED = {"command", "groups", "generation_groups", "launch_groups", "model_groups", "training_groups"}
"""Files of ``cli`` for all commands."""
COMMANDS = sorted(p.stem for p in (ROOT / "cli").glob("*.py") if p.stem not in ("__init__", *SHARED))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT if path.is_relative_to(ROOT) else PROJECT))


def imported_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_down(path):
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = {n.split(".")[1] for n in imported_names(path) if n.startswith("evo2_megatron.")}
    if layer != "__init__":
        assert ours <= MAY_IMPORT[layer] | {layer}


def test_packages_of_tasks_point_one_way():
    for package, others in PACKAGES_OF_TASKS.items():
        names = set().union(*map(imported_names, (ROOT / "tasks" / package).glob("*.py")))
        used = {name.split(".")[2] for name in names if name.startswith("evo2_megatron.tasks.")}
        assert used & PACKAGES_OF_TASKS.keys() <= others | {package}, package
    assert {path.parent.name for path in (ROOT / "tasks").glob("*/__init__.py")} == set(PACKAGES_OF_TASKS)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_megatron_and_compiled_packages_stay_in_their_layers(path):
    name, layer = name_of(path), path.relative_to(ROOT).parts[0]
    foreign = {n.split(".")[0] for n in imported_names(path)}
    if layer not in MEGATRON_LAYERS and name not in MEGATRON_FILES:
        assert "megatron" not in foreign
    if layer != "runtime" and name not in MAY_LOAD_COMPILED:
        assert not foreign & COMPILED


def test_commands_do_not_import_each_other():
    for command in COMMANDS:
        names = imported_names(ROOT / "cli" / f"{command}.py")
        assert {n.split(".")[2] for n in names if n.startswith("evo2_megatron.cli.")} <= SHARED, command


def test_every_package_that_we_import_is_declared():
    """An import that only a transitive dependency satisfies breaks when that one goes."""
    distributions = {
        "hydra": "hydra_core",
        "megatron": "megatron_core",
        "sklearn": "scikit_learn",
        "yaml": "pyyaml",
    }
    declared = {re.match(r"[\w-]+", r)[0].lower().replace("-", "_") for r in metadata.requires("evo2-megatron")}
    used = {n.split(".")[0] for path in SOURCES for n in imported_names(path)} - COMPILED - {"evo2_megatron"}
    assert {distributions.get(name, name) for name in used - sys.stdlib_module_names} <= declared


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from actions_of(subparser)
        elif not isinstance(action, argparse._HelpAction):
            yield action


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_read(command):
    parser = importlib.import_module(f"evo2_megatron.cli.{command}").build_parser()
    declared = {action.dest for action in actions_of(parser)}
    source = "".join((ROOT / "cli" / f"{name}.py").read_text() for name in (command, *SHARED))
    nodes = ast.walk(ast.parse(source))
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "args"}
    assert declared <= read


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_load_torch(command):
    code = f"import sys, evo2_megatron.cli.{command} as c; c.build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_console_scripts_are_the_commands():
    scripts = metadata.distribution("evo2-megatron").entry_points.select(group="console_scripts")
    assert {s.value for s in scripts} == {f"evo2_megatron.cli.{command}:main" for command in COMMANDS}
    for script in scripts:
        assert callable(script.load())


@pytest.mark.parametrize("path", ALL_CODE, ids=name_of)
def test_files_keep_the_limits(path):
    name, lines = name_of(path), path.read_text().splitlines()
    assert "# SPDX-License-Identifier: Apache-2.0" in lines[:2]  # second after #!
    too_long = [n for n, line in enumerate(lines, 1) if len(line) > MAX_LINE]
    not_ascii = [n for n, line in enumerate(lines, 1) if not line.isascii()]
    assert too_long + not_ascii == [], f"{name}: over {MAX_LINE} characters: {too_long}, not ASCII: {not_ascii}"
    assert len(lines) <= MAX_FILE or name in LONG_FILES, f"{name}: {len(lines)} lines, {MAX_FILE} allowed"


@pytest.mark.parametrize("path", ALL_CODE, ids=name_of)
def test_functions_keep_the_limit(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            name, length = f"{name_of(path)}:{node.name}", node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION or name in LONG_FUNCTIONS, f"{name}: {length} lines, {MAX_FUNCTION} allowed"


def test_exceptions_to_the_limits_are_needed():
    lengths = {name_of(p): len(p.read_text().splitlines()) for p in ALL_CODE}
    assert [name for name in LONG_FILES if lengths.get(name, 0) <= MAX_FILE] == []
    functions = {
        f"{name_of(p)}:{node.name}": node.end_lineno - node.lineno + 1
        for p in ALL_CODE
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert [name for name in LONG_FUNCTIONS if functions.get(name, 0) <= MAX_FUNCTION] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_handler_catches_everything(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and ast.unparse(node.type) not in ("Exception", "BaseException"), node.lineno


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_carry_the_licence_line(path):
    assert "# SPDX-License-Identifier: Apache-2.0" in path.read_text().splitlines()[:2]
