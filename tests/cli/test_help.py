# SPDX-License-Identifier: Apache-2.0
"""What --help shows: every flag in a titled group, with what it means and what happens without it."""

from __future__ import annotations

import argparse
import importlib
import runpy
from importlib import metadata

import pytest

SCRIPTS = metadata.distribution("evo2-megatron").entry_points.select(group="console_scripts")
COMMANDS = sorted(script.module.rpartition(".")[2] for script in SCRIPTS)
NOT_FLAGS = (argparse._HelpAction, argparse._SubParsersAction)
FLAGS_AT_A_GLANCE = 10  # a command with no more needs no groups


def flags(command):
    """Title of the group and the flag, of all that are shown; flags in a choice of several belong to its group."""
    parser = importlib.import_module(f"evo2_megatron.cli.{command}").build_parser()
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.help is not argparse.SUPPRESS and not isinstance(action, NOT_FLAGS):
                yield group.title, action


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_in_a_titled_group(command):
    shown = list(flags(command))
    ungrouped = [a.option_strings for title, a in shown if title in ("options", "positional arguments")]
    assert ungrouped == [] or len(shown) <= FLAGS_AT_A_GLANCE


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_says_what_it_means_and_its_default(command):
    for _, action in flags(command):
        assert action.help, action.option_strings
        # required flags have no default, and switches are off without a word
        optional = not action.required and action.nargs != 0
        if optional and not isinstance(action, argparse.BooleanOptionalAction):
            assert "default: " in action.help, action.option_strings


@pytest.mark.parametrize("command", COMMANDS)
def test_modules_run_as_the_commands_do(command, capsys, monkeypatch):
    """``python -m`` and ``torchrun -m`` need no console script."""
    monkeypatch.setattr("sys.argv", ["module", "--help"])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(importlib.import_module(f"evo2_megatron.cli.{command}").__file__, run_name="__main__")
    assert ending.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_one_line(command, capsys):
    main = importlib.import_module(f"evo2_megatron.cli.{command}").main
    with pytest.raises(SystemExit) as ending:
        main(["--no-such-flag"])
    told = capsys.readouterr()
    assert ending.value.code == 2 and told.out == ""
    assert told.err.count("\n") == 1 and told.err.endswith(" --help lists the flags\n")


def test_data_has_no_default():
    from evo2_megatron.cli.train import build_parser

    assert "(default: --mock-data)" not in build_parser().format_help().replace("\n", " ")
