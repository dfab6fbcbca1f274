# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from evo2_megatron.cli import command, groups
from evo2_megatron.config import ParallelConfig


@pytest.mark.parametrize(
    "tensor", ["--tensor-parallel-size", "--tensor-model-parallel-size", "--tensor-model-parallel"]
)
@pytest.mark.parametrize(
    "pipeline", ["--pipeline-parallel-size", "--pipeline-model-parallel-size", "--pipeline-model-parallel"]
)
@pytest.mark.parametrize("context", ["--context-parallel-size", "--context-parallel"])
def test_every_spelling_of_the_layout(tensor, pipeline, context):
    parser = command.Parser("command", None)
    groups.add_parallel(parser)
    args = parser.parse_args([tensor, "2", pipeline, "3", context, "4"])
    assert groups.parallel(args) == ParallelConfig(tensor=2, pipeline=3, context=4, sequence_parallel=None)


@pytest.mark.parametrize(
    "argv, expected", [([], None), (["--sequence-parallel"], True), (["--no-sequence-parallel"], False)]
)
def test_sequence_parallel(argv, expected):
    parser = command.Parser("command", None)
    groups.add_parallel(parser)
    assert groups.parallel(parser.parse_args(argv)).sequence_parallel is expected


@pytest.mark.parametrize(
    "argv", [["--tensor-parallel"], ["--tensor-parallel-size", "0"], ["--tensor-parallel-size", "x"]]
)
def test_no_prefixes_and_no_nonsense(argv, capsys):
    parser = command.Parser("command", None)
    groups.add_parallel(parser)
    with pytest.raises(SystemExit) as ending:
        parser.parse_args(argv)
    assert ending.value.code == 2
    assert "command: error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bf16_mixed", "bf16-mixed"])
def test_precision_with_hyphens_or_underscores(name):
    parser = command.Parser("command", None)
    groups.add_precision(parser)
    assert groups.precision(parser.parse_args(["--mixed-precision-recipe", name])) == "bf16_mixed"
    assert groups.precision(parser.parse_args([])) is None
