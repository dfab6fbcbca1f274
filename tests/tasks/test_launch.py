# SPDX-License-Identifier: Apache-2.0
"""``--devices``: processes of a command that starts them itself."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException

from evo2_megatron.config import UserError
from evo2_megatron.runtime import megatron
from evo2_megatron.tasks import launch
from processes import is_running, until

# a command: it says who it is, and then does as it is told
_COMMAND = """
import os, signal, sys, time
from pathlib import Path
from evo2_megatron.cli import command, launch_groups
from evo2_megatron.config import UserError

def main(argv):
    parser = command.Parser("command", None)
    launch_groups.add_devices(parser)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--do", default="nothing")
    args = parser.parse_args(argv)
    if launch_groups.on_devices(args.devices, argv):
        print("all have ended")
        return
    rank, count = (os.environ.get(name, "none") for name in ("RANK", "LOCAL_WORLD_SIZE"))
    (args.folder / f"{rank}.{count}").write_text(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}")
    if args.do == "refuse":
        raise UserError("that is wrong; mend it")
    if args.do == "die" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if args.do != "nothing":
        time.sleep(60)

command.run("command", main)
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "command.py").write_text(_COMMAND)
    (tmp_path / "out").mkdir()
    command_line = [sys.executable, str(tmp_path / "command.py"), "--folder", str(tmp_path / "out")]

    def start(*flags):
        return subprocess.Popen([*command_line, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def ended(process, timeout=60):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def who(tmp_path):
    return {path.name: path.read_text().split() for path in (tmp_path / "out").iterdir()}


def pids(tmp_path):
    return [int(pid) for pid, _ in who(tmp_path).values()]


def test_processes_know_their_number(command, tmp_path):
    assert ended(command("--devices", "2")) == (0, "all have ended\n", "")
    assert sorted(who(tmp_path)) == ["0.2", "1.2"]


@pytest.mark.skipif(megatron.on_cuda(), reason="would be several processes")
def test_one_is_this_process_itself(command, tmp_path):
    for devices in ("1", "auto"):
        assert ended(command("--devices", devices)) == (0, "", "")
        assert list(who(tmp_path)) == ["none.none"]


def test_what_is_wrong_is_told_once(command):
    assert ended(command("--devices", "2", "--do", "refuse")) == (2, "", "command: error: that is wrong; mend it\n")


def test_a_process_that_is_killed_ends_the_others(command, tmp_path):
    status, _, err = ended(command("--devices", "2", "--do", "die"))
    assert status == 128 + signal.SIGKILL and "Traceback" not in err
    assert err.endswith("process 1 of 2 was ended by SIGKILL; most often, memory ran out\n")
    until(lambda: not any(map(is_running, pids(tmp_path))), 10)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGKILL))],
)
def test_whoever_ends_it_ends_all(command, tmp_path, number):
    process = command("--devices", "2", "--do", "wait")
    until(lambda: [len(told) for told in who(tmp_path).values()] == [2, 2], 60)
    process.send_signal(number)
    status, _, err = ended(process)
    assert status in (128 + number, -number) and "Traceback" not in err
    until(lambda: not any(map(is_running, pids(tmp_path))), 10)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 128 + signal.SIGINT)])
def test_a_signal_that_it_waits_for(monkeypatch, number, status):
    """Such as SIGTERM with ``train_evo2 --enable-preemption``, which saves a checkpoint first."""
    configs = []

    def interrupted(*command_line):
        raise SignalException("", number)

    monkeypatch.setattr(launch, "elastic_launch", lambda config, program: configs.append(config) or interrupted)
    monkeypatch.setattr(launch.logging, "disable", lambda: None)
    with pytest.raises(SystemExit) as ending:
        launch.on_devices(2, None, ended_by=[signal.SIGTERM])
    assert ending.value.code == status
    assert configs[0].shutdown_timeout > 3600
    with pytest.raises(SystemExit) as ending:
        launch.on_devices(2, None)
    assert ending.value.code == 128 + number
    assert configs[1].shutdown_timeout == 30


def test_torchrun_decides(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for devices in (None, 2):
        assert not launch.on_devices(devices, None)
    with pytest.raises(UserError, match="--devices is 3, but torchrun started 2; leave it out"):
        launch.on_devices(3, None)


@pytest.mark.parametrize("run", ["evo2-42", "evo2-finetune", "evo2-megatron-42", "none"])
def test_jobs_of_torchrun_may_have_any_name(monkeypatch, run):
    """A process that took the name for that of its parent would end itself."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
    monkeypatch.setattr(launch, "end_with_parent", lambda pid: pytest.fail(f"ends with {pid}"))
    assert not launch.on_devices(None, None)


def test_no_more_than_there_are_gpus(monkeypatch):
    monkeypatch.setattr(megatron, "on_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for devices in (2, 4, None):
        with pytest.raises(UserError, match="--devices starts a command line again"):
            launch.on_devices(devices, [])
    with pytest.raises(UserError, match="--devices is 5, but GPUs of this machine are 4; --devices auto takes all"):
        launch.on_devices(5, None)


@pytest.mark.parametrize(
    "size, copies, expected",
    [
        (1, True, (4, [])),
        (2, True, (4, ["--tensor-parallel-size", "2"])),
        (3, True, (3, ["--tensor-parallel-size", "3"])),
        (2, False, (2, ["--tensor-parallel-size", "2"])),
        (1, False, None),
    ],
)
def test_auto_divides_what_is_too_large(monkeypatch, size, copies, expected):
    monkeypatch.setattr(megatron, "on_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(launch, "_memory", lambda gpu: 80 - gpu)
    asked, started = [], []
    monkeypatch.setattr(launch, "_run", lambda count, flags, *, ended_by: started.append((count, flags)))

    def divide(**given):
        asked.append(given)
        return size

    assert launch.on_devices(None, None, divide=divide, copies=copies) is bool(expected)
    assert asked == [{"num_gpus": 4, "gpu_bytes": 77}]
    assert started == [expected] * bool(expected)
    launch.on_devices(2, None, divide=divide, copies=copies)  # who says how many says how they are used
    assert len(asked) == 1


@pytest.mark.slow
def test_cores_are_divided_without_a_gpu(command, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if not megatron.on_cuda():
        ended(command("--devices", "2"))
        # of torch's own accord, which counts cores and not hardware threads
        alone = subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.get_num_threads())"], stdout=subprocess.PIPE, check=True
        )
        assert {int(threads) for _, threads in who(tmp_path).values()} == {max(1, int(alone.stdout) // 2)}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    ended(command("--devices", "2"))
    assert {threads for _, threads in who(tmp_path).values()} == {"3"}
