# SPDX-License-Identifier: Apache-2.0
"""What every command does alike: how it ends, and who says why."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from evo2_megatron.cli import command
from evo2_megatron.config import UserError


def _fail(argv):
    raise UserError(f"{argv[0]} is wrong; mend it")


def test_user_error_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as ending:
        command.run("command", _fail, ["this"])
    assert ending.value.code == 2
    assert capsys.readouterr().err == "command: error: this is wrong; mend it\n"


def test_other_ranks_let_rank_0_speak_first(capsys, monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(command.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as ending:
        command.run("command", _fail, ["this"])
    assert ending.value.code == 2 and waited == [5.0]
    # were all ranks wrong, the launcher would have ended this one by now
    assert capsys.readouterr().err == "command: error on rank 3: this is wrong; mend it\n"


def test_where_processes_share_cores_rank_0_may_be_late(monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "99")
    monkeypatch.setattr(command.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(command.time, "sleep", waited.append)
    with pytest.raises(SystemExit):
        command.run("command", _fail, ["this"])
    assert waited == [148.5]


def test_another_rank_that_is_ended_meanwhile_adds_nothing(monkeypatch):
    """What the launcher does once rank 0 has ended."""
    monkeypatch.setenv("RANK", "1")
    code = """
import os, signal
from evo2_megatron.cli import command
from evo2_megatron.config import UserError

def fail(argv):
    command.clean_up_when_terminated()
    raise UserError("wrong; mend it")

command.time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)
command.run("command", fail)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-15, "")


@pytest.mark.parametrize(
    "given, message",
    [
        (["--output-dri", "x"], "--output-dri x (did you mean --output-dir?); command --help lists the flags"),
        (["--both_strands=1"], "--both_strands=1 (did you mean --both-strands?); "),
        (["--zzz"], "--zzz; "),
        (["more"], "more; "),
    ],
)
def test_a_flag_that_looks_like_the_unknown_one(capsys, given, message):
    parser = command.Parser("command", None)
    parser.add_argument("--output-dir")
    parser.add_argument("--both-strands", action="store_true")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(given)
    assert f"command: error: unrecognized arguments: {message}" in capsys.readouterr().err


def test_wrong_command_line_is_reported_on_rank_0_only(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ending:
        command.Parser("command", None).parse_args(["--unknown"])
    assert ending.value.code == 2
    assert capsys.readouterr().err == ""


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        command.run("command", lambda argv: 1 / 0)


@pytest.mark.parametrize("num_lines", [1, 100_000])  # in one go when the program ends, or long before
def test_who_reads_what_is_printed_may_stop(num_lines):
    code = f"""
import sys
from evo2_megatron.cli import command
sys.stdin.read()
command.run("evo2_doctor", lambda argv: [print("a line") for _ in range({num_lines})])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-1)
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_a_file_that_may_not_be_read(capfd):
    def main(argv):
        raise PermissionError(13, "Permission denied", "run_config.yaml")

    with pytest.raises(SystemExit) as ending, mock.patch.object(command.os, "dup2"):
        command.run("predict_evo2", main)
    message = "predict_evo2: error: run_config.yaml: Permission denied; ask its owner, or choose another\n"
    assert (ending.value.code, capfd.readouterr().err) == (2, message)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_no_room_for_what_is_printed(num_lines):
    code = f"""
from evo2_megatron.cli import command
command.run("infer_evo2", lambda argv: [print("a line") for _ in range({num_lines})])
"""
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=-1, text=True, check=False)
    message = "infer_evo2: error: No space left on device; make room, or write somewhere else\n"
    assert (ended.returncode, ended.stderr) == (2, message)


@pytest.mark.parametrize("failing, status", [("", 0), ("x" * 300, 2)])
def test_nowhere_to_print(failing, status):
    code = f"""
from pathlib import Path
from evo2_megatron.cli import command
command.run("evo2_plan", lambda argv: [print("a line"), Path("{failing}").stat()])
"""
    closed = ["sh", "-c", f"exec {sys.executable} -c '{code}' >&-"]
    ended = subprocess.run(closed, stderr=-1, text=True, check=False)
    message = f"evo2_plan: error: {failing}: File name too long; choose a shorter one\n" if failing else ""
    assert (ended.returncode, ended.stderr) == (status, message)


@pytest.mark.parametrize("text", ["", "  "])
@pytest.mark.parametrize("in_group", [False, True])
def test_an_empty_path_is_not_the_current_folder(text, in_group, capsys):
    """What an unset variable of a shell gives."""
    parser = command.Parser("command", None)
    (parser.add_argument_group("result") if in_group else parser).add_argument("--output-dir", type=Path)
    with pytest.raises(SystemExit) as ending:
        parser.parse_args(["--output-dir", text])
    assert ending.value.code == 2
    assert "command: error: argument --output-dir: the path is empty" in capsys.readouterr().err
    assert parser.parse_args(["--output-dir", "."]) == argparse.Namespace(output_dir=Path())


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("comes", [True, False])
def test_an_interrupt_that_an_import_turns_into_its_own_error(number, comes):
    """As torch does that of numpy's; without the interrupt it is an error like any other."""
    program = f"""
import os, signal
from evo2_megatron.cli import command

def main(argv):
    command.clean_up_when_terminated()
    try:
        if {comes}:
            os.kill(os.getpid(), signal.{number})
    except KeyboardInterrupt:
        pass
    raise ImportError("cannot load module more than once per process")

command.run("evo2_some", main)
"""
    default = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, **default)
    if comes:
        assert (done.returncode, done.stderr) == (130, "evo2_some: interrupted\n")
    else:
        assert done.returncode == 1 and "more than once" in done.stderr


def test_the_home_folder_in_a_path(monkeypatch):
    """A shell leaves ~ as it is in --flag=~/folder and within quotes."""
    monkeypatch.setenv("HOME", "/home/me")
    parser = command.Parser("command", None)
    parser.add_argument("--output-dir", type=Path)
    for text, expected in (("~/out", "/home/me/out"), ("~", "/home/me"), ("a~/b", "a~/b"), ("~no-one/b", "~no-one/b")):
        assert parser.parse_args([f"--output-dir={text}"]).output_dir == Path(expected)
