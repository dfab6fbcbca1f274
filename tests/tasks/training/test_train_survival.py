# SPDX-License-Identifier: Apache-2.0
"""Runs that are ended by SIGTERM, SIGKILL or a full disk, and go on."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import pytest

from tasks.training.test_train import LOG_LINE, SMALL, Run, checkpoint, command, environment, read, train_all

pytestmark = pytest.mark.slow


def test_preemption(tmp_path):
    """SIGTERM in the middle: the step is finished and saved, the exit clean, and the run resumes as if nothing had."""
    long = SMALL | {
        "max_steps": 400,
        "eval_interval": 400,
        "result_dir": tmp_path / "stopped",
        "enable_preemption": True,
    }
    output = tmp_path / "output.txt"
    run = start(long, 1, output)
    wait_for(lambda: LOG_LINE.search(output.read_text()) or run.poll() is not None)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) == 0, output.read_text()
    stopped = read(output.read_text())
    (step,) = [int(p.name.removeprefix("iter_")) for p in checkpoint(tmp_path / "stopped", 0).parent.glob("iter_*")]
    assert 1 <= step == max(stopped.losses) < 400
    resumed = long | {"early_stop_on_step": step + 2}
    whole = resumed | {"result_dir": tmp_path / "whole"}
    (second, uninterrupted), _ = train_all([resumed, whole])
    assert list(second.losses) == [step + 1, step + 2]
    assert stopped.losses | second.losses == uninterrupted.losses


def test_killed_while_saving(tmp_path):
    """The tracker names a checkpoint that was never finished: the run goes on from the last whole one."""
    options = SMALL | {"result_dir": tmp_path, "max_steps": 9}
    (whole,), _ = train_all([options])
    folder = checkpoint(tmp_path, 9).parent
    (checkpoint(tmp_path, 9) / "run_config.yaml").unlink()
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == "9"
    (again,), _ = train_all([options])
    assert again.losses == {step: whole.losses[step] for step in (7, 8, 9)}


def kill_at_random(options: dict, processes: int, chance: random.Random, output: Path) -> tuple[dict, bool]:
    """Start a run and kill all of it without warning; the losses it printed, and whether it was killed.

    Most of a start is the loading of libraries, so the moment is drawn from when the settings are shown.
    """
    run = start(options, processes, output)
    num_steps = chance.choice((0, *range(9)))
    wait_for(lambda: "INFO" in output.read_text() or run.poll() is not None)
    wait_for(lambda: len(LOG_LINE.findall(output.read_text())) >= num_steps or run.poll() is not None)
    time.sleep(chance.uniform(0, 0.5 if num_steps else 3))
    killed = run.poll() is None
    if killed:
        # torchrun's processes are not in its group, and would train on
        for process in [root := psutil.Process(run.pid), *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself just now
                process.kill()
    assert run.wait(timeout=60) == (-signal.SIGKILL if killed else 0), output.read_text()
    return read(output.read_text()).losses, killed


def as_in(run: Run, steps: Iterable[int]) -> object:
    """What a run printed at these steps; its last digit may differ, for sums depend on where memory begins."""
    return pytest.approx({step: run.losses[step] for step in steps}, rel=0, abs=2e-6)


def start(options: dict, processes: int, output: Path) -> subprocess.Popen:
    with output.open("w") as file:
        return subprocess.Popen(
            command({"runs": [options]}, processes),
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def wait_for(happened: Callable[[], object]) -> None:
    until = time.monotonic() + 300
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    "layout, num_kills",
    [({}, 20), ({"ckpt_async_save": True, "most_recent_k": 1}, 10), ({"processes": 2}, 5)],
    ids=str,
)
def test_killed_at_random_moments(layout, num_kills, tmp_path):
    """Every step that any of the runs shows has the loss it has in an unbroken run, and no kill costs more than an
    interval."""
    options = SMALL | layout | {"max_steps": 120, "eval_interval": 2}
    processes = options.pop("processes", 1)
    (whole,), _ = train_all([options | {"result_dir": tmp_path / "whole"}], processes=processes)
    options |= {"result_dir": tmp_path / "killed"}
    chance, kills, last, seen = random.Random(7), 0, 0, set()
    while kills < num_kills:
        losses, killed = kill_at_random(options, processes, chance, tmp_path / "output.txt")
        assert losses == as_in(whole, losses)
        # with saving in the background, the save before may still be under way, too
        lost = 2 * options["eval_interval"] if options.get("ckpt_async_save") else options["eval_interval"]
        assert not losses or min(losses) > last - lost
        last = max(losses, default=last)
        seen |= losses.keys()
        if not killed:
            break
        kills += 1
    (rest,), _ = train_all([options], processes=processes)
    seen |= rest.losses.keys()
    assert rest.losses == as_in(whole, rest.losses)
    assert kills == num_kills and max(seen) == 120
    folder = checkpoint(tmp_path / "killed", 120)
    assert (folder / "run_config.yaml").is_file()
    assert not [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_resumed_with_other_settings(tmp_path):
    """More and longer evaluations, and a smaller batch: the data reaches to the end."""
    options = SMALL | {"result_dir": tmp_path, "eval_interval": 2, "early_stop_on_step": 4}
    changes = ({"eval_interval": 1, "eval_iters": 4}, {"global_batch_size": 2, "eval_interval": 3})
    for number, change in enumerate(changes):
        options |= {"result_dir": tmp_path / str(number)}
        (first, second), _ = train_all([options, options | change | {"early_stop_on_step": 6}])
        assert list(first.losses) == [1, 2, 3, 4] and list(second.losses) == [5, 6]


def test_interrupted_while_saving_in_the_background(tmp_path):
    """Ctrl-C, which a terminal sends to all processes: the end is prompt, says one line, and costs no checkpoint."""
    output, folder = tmp_path / "output.txt", checkpoint(tmp_path, 0).parent
    flags = "--mock-data --model-size evo2_tiny --seq-length 64 --global-batch-size 2 --max-steps 400"
    flags += " --eval-interval 2 --eval-iters 0 --log-interval 1 --ckpt-async-save --result-dir"
    command = [sys.executable, "-m", "evo2_megatron.cli.train", *flags.split(), str(tmp_path)]
    with output.open("w") as file:
        run = subprocess.Popen(
            command,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # whoever runs the tests in the background may have it ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_for(lambda: list(folder.glob("iter_*/run_config.yaml")) or run.poll() is not None)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(timeout=20) == 128 + signal.SIGINT, output.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    text = output.read_text()
    assert text.splitlines()[-1] == "train_evo2: interrupted" and "Traceback" not in text
    last = max(int(path.parent.name.removeprefix("iter_")) for path in folder.glob("iter_*/run_config.yaml"))
    subprocess.run([*command, "--early-stop-on-step", str(last + 2)], env=environment(), check=True, timeout=120)
    assert (checkpoint(tmp_path, last + 2) / "run_config.yaml").is_file()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 34 MB: two checkpoints and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=34m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("layout", [{}, {"ckpt_async_save": True}, {"processes": 2}], ids=str)
def test_full_disk(small_disk, tmp_path, layout):
    options = SMALL | layout | {"max_steps": 9}
    processes = options.pop("processes", 1)
    (whole,), _ = train_all([options | {"result_dir": tmp_path / "whole"}], processes=processes)
    options |= {"result_dir": small_disk}
    (full,), _ = train_all([options], processes=processes)
    error = full.text[full.text.index("ERROR") :]
    assert re.search(
        r"could not be written to .*, whose disk has .* MB free .*; iter_0000006 is complete; make", error
    )
    assert len(error.strip().splitlines()) == 1
    (refused,), _ = train_all([options], processes=processes)
    assert refused.text.startswith("ERROR a checkpoint takes about 0.0136 GB")
    shutil.rmtree(checkpoint(small_disk, 3))
    (again,), _ = train_all([options], processes=processes)
    assert again.losses == {step: whole.losses[step] for step in (7, 8, 9)}
    assert checkpoint(small_disk, 9).is_dir()


def test_disk_without_room_for_one_checkpoint(small_disk):
    (small_disk / "ballast").write_bytes(bytes(25_000_000))
    (refused,), _ = train_all([SMALL | {"result_dir": small_disk}])
    assert refused.text.startswith("ERROR a checkpoint takes about 0.0136 GB, and the disk of ") and not refused.losses


def test_read_only_disk(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (refused,), _ = train_all([SMALL | {"result_dir": small_disk / "new"}])
    assert re.match(
        r"ERROR cannot make the folder .*: Read-only file system; choose another --result-dir", refused.text
    )
