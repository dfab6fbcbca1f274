# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from evo2_megatron.config import UserError
from tasks.training.test_train import environment

HEADER = (
    "step pipeline_stage processes median_forward_ms slowest_forward_ms slowest_rank slowest_host median_batch_ms "
    "slowest_batch_ms slowest_batch_rank slowest_batch_host"
)


@pytest.fixture
def stragglers(megatron):
    from evo2_megatron.tasks.training import stragglers

    return stragglers


@pytest.fixture
def times(stragglers):
    """Two pipeline stages of which the second has twice the work, and in it one slow process."""
    return [
        stragglers.ProcessTimes(rank=0, host="a", stage=0, forward_ms=10.0, batch_ms=1.0),
        stragglers.ProcessTimes(rank=1, host="a", stage=0, forward_ms=11.0, batch_ms=5.0),
        stragglers.ProcessTimes(rank=2, host="b", stage=1, forward_ms=20.0, batch_ms=1.0),
        stragglers.ProcessTimes(rank=3, host="b", stage=1, forward_ms=32.0, batch_ms=1.0),
    ]


def test_rows(stragglers, times):
    assert stragglers.rows(7, times) == [
        "7\t0\t2\t10.000\t11.000\t1\ta\t1.000\t5.000\t1\ta",
        "7\t1\t2\t20.000\t32.000\t3\tb\t1.000\t1.000\t2\tb",
    ]


def test_warnings(stragglers, times):
    """Of stages of different work, none is slow."""
    assert stragglers.warnings_about(7, times) == [
        "Straggler at step 7: rank 3 on b takes 32 ms for its forward passes, 1.6 times the median"
    ]


def test_watch_tells_batches_from_forward_passes(stragglers):
    watch = stragglers.StepWatch()
    for _ in range(2):
        with watch(bdata=True):
            time.sleep(0.01)
        with watch:
            time.sleep(0.03)
    forward_ms, batch_ms = watch.take()
    assert 60 <= forward_ms < 500 and 20 <= batch_ms < 500 and forward_ms > batch_ms
    assert watch.take() == (0.0, 0.0)


def test_evaluations_do_not_count(stragglers, tmp_path, monkeypatch):
    alone = SimpleNamespace(
        get_rank=lambda: 0,
        get_world_size=lambda: 1,
        all_gather_object=lambda everyone, mine: everyone.__setitem__(0, mine),
    )
    monkeypatch.setattr(stragglers.torch, "distributed", alone)
    monkeypatch.setattr(stragglers, "parallel_state", SimpleNamespace(get_pipeline_model_parallel_rank=lambda: 0))
    state = SimpleNamespace(
        cfg=SimpleNamespace(logger=SimpleNamespace(log_interval=2)), train_state=SimpleNamespace(step=0)
    )
    context = SimpleNamespace(state=state)
    report = stragglers.StragglerReport(tmp_path / "table.tsv")
    report.on_train_start(context)
    with state._straggler_timer:
        time.sleep(0.2)
    for state.train_state.step in range(4):
        report.on_train_step_start(context)
        with state._straggler_timer:
            time.sleep(0.01)
        report.on_train_step_end(context)
    header, *lines = (tmp_path / "table.tsv").read_text().splitlines()
    assert header.split("\t") == HEADER.split()
    assert [line.split("\t")[0] for line in lines] == ["2", "4"]
    assert all(10 <= float(line.split("\t")[3]) < 100 for line in lines)
    # a run that goes on adds to the table
    stragglers.StragglerReport(tmp_path / "table.tsv").on_train_start(context)
    assert len((tmp_path / "table.tsv").read_text().splitlines()) == 3


def test_table_that_cannot_be_written(stragglers, tmp_path):
    with pytest.raises(UserError, match="cannot write .*: No such file or directory; the run goes on"):
        stragglers.StragglerReport(tmp_path / "nowhere" / "table.tsv")._append(["x"])


@pytest.mark.slow
def test_one_of_two_processes_is_slow(tmp_path):
    worker = Path(__file__).with_name("straggler_worker.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(worker), str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    header, *lines = [line.split("\t") for line in (tmp_path / "evo2" / "stragglers.tsv").read_text().splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [(row["step"], row["processes"]) for row in rows] == [("2", "2"), ("4", "2")]
    for row in rows:
        assert row["slowest_rank"] == row["slowest_batch_rank"] == "1"
        assert float(row["slowest_forward_ms"]) > float(row["median_forward_ms"]) + 1000
    assert done.stderr.count("Straggler at step 4: rank 1 on ") == 1
    assert " tokens per second and process: " in done.stdout
