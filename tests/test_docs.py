# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/ against the project: messages, flags, commands, links, named files, and the width of lines."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_readme import PROJECT, SCRIPTS, check, commands

SOURCE = PROJECT / "src" / "evo2_megatron"
PAGES = sorted((PROJECT / "docs").glob("*.md"))
LINKING = [*PAGES, PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", PROJECT / "examples" / "README.md"]
MAX_LINE = 119

FOREIGN_FLAGS = {
    # torchrun
    "--nproc-per-node", "--no-python", "--standalone", "--master-port",
    # docker, apptainer, sbatch, nsys, curl, pip, huggingface-cli
    "--gpus", "--ipc", "--shm-size", "--target", "--nv", "--nodes", "--capture-range", "--capture-range-end", "--json",
    "--no-deps", "--requirement",
}  # fmt: skip
"""Flags of programs that are not ours; a flag that is in none of our parsers must be one of these."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MADE_BY_EXAMPLES = re.compile(r"cat > (\S+)")


def name_of(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def rendered(text: str) -> Iterator[str]:
    """Every string of a Python file; what is filled in becomes a NUL, which no quotation matches but by ``...``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[+.\d]*[a-z]", "\0", node.value)


def our_strings() -> list[str]:
    scripts = [
        re.sub(r"\$\{?\w+[^ \"};]*\}?", "\0", (PROJECT / n).read_text()) for n in (".ci_build.sh", ".ci_test_env.sh")
    ]
    return [string for path in SOURCE.rglob("*.py") for string in rendered(path.read_text())] + scripts


def quoted_messages() -> list[str]:
    page = (PROJECT / "docs" / "troubleshooting.md").read_text()
    ours = page.partition("## Messages of other programs")[0]
    return [cell for row in re.findall(r"^\| (`.*?`) \|", ours, re.MULTILINE) for cell in re.findall("`([^`]+)`", row)]


def matches(quotation: str, strings: list[str]) -> bool:
    """Whether one string has the literal parts of a quotation in their order, and something for each ``...``."""
    parts = [re.escape(part) for part in quotation.split("...")]
    pattern = re.compile("[^\n]*".join(parts))
    return any(pattern.search(string) for string in strings)


def test_quoted_messages_are_ours():
    strings, quotations = our_strings(), quoted_messages()
    assert len(quotations) > 40
    assert [quotation for quotation in quotations if not matches(quotation, strings)] == []


def test_a_message_that_nobody_says_is_found_out():
    strings = our_strings()
    assert not matches("tensor parallel size ... divides the model's ...", strings)
    assert not matches("Checkpoint 3 does not exist", strings)


def option_strings(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from option_strings(child)


def our_flags() -> set[str]:
    """Of all commands, and of the scripts of benchmarks/ and examples/."""
    flags = set()
    for module in SCRIPTS.values():
        if module.startswith("evo2_megatron."):
            flags |= set(option_strings(importlib.import_module(module).build_parser()))
    for folder in ("benchmarks", "examples"):
        for path in (PROJECT / folder).rglob("*.py"):
            flags |= set(re.findall(r"\"(--[a-z][\w-]*)\"", path.read_text()))
    return flags


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_exist(page):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*", page.read_text()))
    assert named - our_flags() - FOREIGN_FLAGS == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page):
    for language, block in FENCE.findall(page.read_text()):
        if language == "bash":
            for words in commands(plain_shell(block)):
                if words[0] != "cat":  # of what the lines before it made
                    check(words)


def plain_shell(block: str) -> str:
    """A block with its variables filled in, and without programs given to ``python -c``."""
    block = re.sub(r"^python -c \"[^\"]*\"$", "", block, flags=re.MULTILINE)
    values = dict(re.findall(r"^([A-Z]+)=\"([^\"\n]*)\"$", block, re.MULTILINE))
    return re.sub(r"\$([A-Z]+)", lambda m: values.get(m[1], m[0]), block)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_lead_somewhere(page):
    wrong = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page.read_text())):
        target, _, anchor = link.partition("#")
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    text = page.read_text()
    made = set(MADE_BY_EXAMPLES.findall(text))
    words = {word for span in re.findall("`([^`\n]+)`", prose(text)) for word in span.split()}
    files = {word for word in words if re.fullmatch(r"(?!\.\.\.)[\w./-]+\.(py|sh|sbatch|ipynb)", word)} - made
    names = {path.name for folder in (SOURCE, PROJECT / "examples", PROJECT / "tests") for path in folder.rglob("*")}
    names |= {path.name for path in PROJECT.iterdir()}
    missing = {f for f in files if not ((PROJECT / f).exists() or (SOURCE / f).exists() or f in names)}
    folders = {word for word in words if re.match(r"(tests|src|examples|benchmarks|tokenizers)/", word)} - files
    missing |= {folder for folder in folders if not (PROJECT / folder).exists()}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_modules_exist(page):
    """``tasks.generation.infer.stream`` and the like: the module is there, and says the name."""
    layers = "|".join(path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file())
    named = re.findall(rf"`(?:evo2_megatron\.)?((?:{layers})(?:\.\w+)+)`", prose(page.read_text()))
    for name in named:
        if name in ("model.vortex_style_fp8", "checkpoint.pretrained_checkpoint"):  # sections of run_config.yaml
            continue
        path, attribute = SOURCE / f"{name.replace('.', '/')}.py", ""
        if not path.is_file():
            path, attribute = path.parent.with_suffix(".py"), path.stem
        assert path.is_file(), f"{name} is in no module"
        assert re.search(rf"^(def|class) {attribute}\b" if attribute else "", path.read_text(), re.MULTILINE), (
            attribute
        )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short(page):
    """Tables, addresses and what a program printed may be as long as they are."""
    text = FENCE.sub(lambda m: "\n" * m[0].count("\n") if not m[1] else m[0], page.read_text())
    text = re.sub(r"https?://\S+", "", text)
    long = [n for n, line in enumerate(text.splitlines(), 1) if len(line) > MAX_LINE and not line.startswith("|")]
    assert long == []


def test_every_page_is_in_the_index():
    index = (PROJECT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES if page.name != "README.md" and f"]({page.name})" not in index] == []


def test_the_first_prediction_of_a_head_is_of_the_first_sequence_kept():
    """Validation data of the example are every seventh line of a table whose first is the heading."""
    fasta = (PROJECT / "examples/data/lambda_phage.fa").read_text().splitlines()
    bases = [line for line in fasta if re.match("[ACGT]", line)][5]
    page = (PROJECT / "docs" / "heads.md").read_text()
    length, gc = re.search(r"^id\tlength\ttrue_gc\t.*\n1\t(\d+)\t([\d.]+)", page, re.MULTILINE).groups()
    assert int(length) == len(bases)
    assert float(gc) == pytest.approx(sum(map(bases.count, "GC")) / len(bases), abs=1e-6)
