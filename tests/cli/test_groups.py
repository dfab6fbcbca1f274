# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from evo2_megatron.cli import groups
from evo2_megatron.config import ParallelConfig, UserError


@pytest.mark.parametrize(
    "tensor", ["--tensor-parallel-size", "--tensor-model-parallel-size", "--tensor-model-parallel"]
)
@pytest.mark.parametrize(
    "pipeline", ["--pipeline-parallel-size", "--pipeline-model-parallel-size", "--pipeline-model-parallel"]
)
@pytest.mark.parametrize("context", ["--context-parallel-size", "--context-parallel"])
def test_every_spelling_of_the_layout(tensor, pipeline, context):
    parser = groups.Parser("command", None)
    groups.add_parallel(parser)
    args = parser.parse_args([tensor, "2", pipeline, "3", context, "4"])
    assert groups.parallel(args) == ParallelConfig(tensor=2, pipeline=3, context=4, sequence_parallel=None)


@pytest.mark.parametrize(
    "argv, expected", [([], None), (["--sequence-parallel"], True), (["--no-sequence-parallel"], False)]
)
def test_sequence_parallel(argv, expected):
    parser = groups.Parser("command", None)
    groups.add_parallel(parser)
    assert groups.parallel(parser.parse_args(argv)).sequence_parallel is expected


@pytest.mark.parametrize(
    "argv", [["--tensor-parallel"], ["--tensor-parallel-size", "0"], ["--tensor-parallel-size", "x"]]
)
def test_no_prefixes_and_no_nonsense(argv, capsys):
    parser = groups.Parser("command", None)
    groups.add_parallel(parser)
    with pytest.raises(SystemExit) as ending:
        parser.parse_args(argv)
    assert ending.value.code == 2
    assert "command: error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bf16_mixed", "bf16-mixed"])
def test_precision_with_hyphens_or_underscores(name):
    parser = groups.Parser("command", None)
    groups.add_precision(parser)
    assert groups.precision(parser.parse_args(["--mixed-precision-recipe", name])) == "bf16_mixed"
    assert groups.precision(parser.parse_args([])) is None


def _fail(argv):
    raise UserError(f"{argv[0]} is wrong; mend it")


def test_user_error_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as ending:
        groups.run("command", _fail, ["this"])
    assert ending.value.code == 2
    assert capsys.readouterr().err == "command: error: this is wrong; mend it\n"


def test_other_ranks_let_rank_0_speak_first(capsys, monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(groups.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as ending:
        groups.run("command", _fail, ["this"])
    assert ending.value.code == 2 and waited == [5.0]
    # were all ranks wrong, the launcher would have ended this one by now
    assert capsys.readouterr().err == "command: error on rank 3: this is wrong; mend it\n"


def test_another_rank_that_is_ended_meanwhile_adds_nothing(monkeypatch):
    """What the launcher does once rank 0 has ended."""
    monkeypatch.setenv("RANK", "1")
    code = """
import os, signal
from evo2_megatron.cli import groups
from evo2_megatron.config import UserError

def fail(argv):
    groups.clean_up_when_terminated()
    raise UserError("wrong; mend it")

groups.time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)
groups.run("command", fail)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-15, "")


def test_wrong_command_line_is_reported_on_rank_0_only(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ending:
        groups.Parser("command", None).parse_args(["--unknown"])
    assert ending.value.code == 2
    assert capsys.readouterr().err == ""


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        groups.run("command", lambda argv: 1 / 0)


@pytest.mark.parametrize("num_lines", [1, 100_000])  # in one go when the program ends, or long before
def test_who_reads_what_is_printed_may_stop(num_lines):
    code = f"""
import sys
from evo2_megatron.cli import groups
sys.stdin.read()
groups.run("evo2_doctor", lambda argv: [print("a line") for _ in range({num_lines})])
"""
    command = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1)
    command.stdout.close()
    command.stdin.close()
    assert command.stderr.read() == b"" and command.wait() == 141


def test_a_file_that_may_not_be_read(capfd):
    def main(argv):
        raise PermissionError(13, "Permission denied", "run_config.yaml")

    with pytest.raises(SystemExit) as ending, mock.patch.object(groups.os, "dup2"):
        groups.run("predict_evo2", main)
    message = "predict_evo2: error: run_config.yaml: Permission denied; ask its owner, or choose another\n"
    assert (ending.value.code, capfd.readouterr().err) == (2, message)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_no_room_for_what_is_printed(num_lines):
    code = f"""
from evo2_megatron.cli import groups
groups.run("infer_evo2", lambda argv: [print("a line") for _ in range({num_lines})])
"""
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=-1, text=True, check=False)
    message = "infer_evo2: error: No space left on device; make room, or write somewhere else\n"
    assert (ended.returncode, ended.stderr) == (2, message)
