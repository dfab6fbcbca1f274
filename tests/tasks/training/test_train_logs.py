# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for TensorBoard, Weights & Biases and a profiler, read back with their own tools."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from tasks.training.test_train import SMALL, train_all

pytestmark = pytest.mark.slow

TAGS = {
    "lm loss", "lm loss vs samples", "lm loss validation", "lm loss validation vs samples",
    "lm loss validation ppl", "lm loss validation ppl vs samples", "lm loss test", "lm loss test ppl",
    "learning-rate", "learning-rate vs samples",
    "batch-size", "batch-size vs samples", "loss-scale", "loss-scale vs samples", "grad-norm",
    "grad-norm vs samples", "params-norm", "params-norm vs samples", "world-size", "world-size vs samples",
    "num-zeros", "num-zeros vs samples", "iteration-time", "throughput/tflops", "throughput/tflops/device",
    "throughput/tokens-per-second", "throughput/tokens-per-second/device", "throughput/mfu",
    "memory/mem-allocated-gigabytes", "time/remaining_estimate",
}  # fmt: skip


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A run that was stopped after three of six steps and went on: its folder, and what both parts printed."""
    folder = tmp_path_factory.mktemp("logs")
    options = SMALL | {
        "result_dir": folder,
        "wandb_project": "test",
        "wandb_entity": "owner",
        "wandb_run_name": "first try",
        "wandb_offline": True,
        "peak_tflops": 0.5,
        "log_num_zeros_in_grad": True,
        "log_straggler": True,
        "torch_profiling": True,
        "nsys_start_step": 1,
    }
    parts, _ = train_all([options | {"early_stop_on_step": 3}, options])
    return folder / "evo2", parts


@pytest.fixture(scope="module")
def scalars(logs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs[0] / "tb_logs"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_the_test_set_is_not_the_validation_set(logs, scalars):
    """What is printed and what is written are the same losses, by the names of their sets."""
    printed = re.findall(r"at iteration 6 on (validation|test) set \| lm loss value: (\S+)", logs[1][1].text)
    assert {name: float(value) for name, value in printed} == {
        name: pytest.approx(scalars[f"lm loss {name}"][6], rel=1e-6) for name in ("validation", "test")
    }
    assert printed[0][1] != printed[1][1]


def test_tags(scalars):
    assert scalars.keys() >= TAGS


def test_values_are_those_of_the_log_lines(logs, scalars):
    losses = {step: loss for part in logs[1] for step, loss in part.losses.items()}
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert scalars["lm loss"] == pytest.approx(losses, rel=1e-6)
    text = "".join(part.text for part in logs[1])
    for tag, pattern in (
        ("throughput/tokens-per-second", r"tokens per second: ([\d.]+) \|"),
        ("grad-norm", r"grad norm: ([\d.]+) \|"),
        ("params-norm", r"params norm: ([\d.]+) \|"),
        ("learning-rate", r"learning rate: (\S+) \|"),
        ("batch-size", r"global batch size: +(\d+) \|"),
        ("loss-scale", r"loss scale: ([\d.]+) \|"),
        ("num-zeros", r"num zeros: ([\d.]+) \|"),
    ):
        shown = [float(value) for value in re.findall(pattern, text)]
        assert len(shown) == 6, tag
        assert list(scalars[tag].values()) == pytest.approx(shown, rel=1e-3), tag
    shown = [float(value) for value in re.findall(r"model FLOP utilisation: ([\d.]+) %", text)]
    assert [100 * value for value in scalars["throughput/mfu"].values()] == pytest.approx(shown, abs=0.051)
    speed, utilisation = scalars["throughput/tokens-per-second"], scalars["throughput/mfu"]
    # operations per token: 3 for forward and backward, 2 for multiply and add, and about as many as the weights
    flops = {step: utilisation[step] * 0.5e12 / speed[step] for step in speed}
    assert all(4.5e6 < value < 6.5e6 for value in flops.values())


def wandb_records(file: Path) -> Iterator[Record]:
    """What wandb keeps to send later. Its file has 7 bytes of its own, then LevelDB's log format.

    That is pieces of checksum, length and kind (whole, first, middle, last) that do not cross blocks of 32 KB.
    """
    data, place, record = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place < len(data):
        if place % 32768 > 32768 - 7:
            place += 32768 - place % 32768
        length, kind = struct.unpack("<4xHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


@pytest.fixture(scope="module")
def sent(logs):
    """For each part of the run, what it has for Weights & Biases."""
    files = (logs[0] / "wandb").glob("offline-run-*/run-*.wandb")
    return [list(wandb_records(file)) for file in sorted(files)]


def test_both_parts_are_one_run_in_weights_and_biases(logs, sent):
    runs = [record.run for part in sent for record in part if record.WhichOneof("record_type") == "run"]
    assert len(sent) == 2 and {run.run_id for run in runs} == {(logs[0] / "wandb_run_id").read_text()}
    assert {(run.entity, run.project, run.display_name) for run in runs} == {("owner", "test", "first try")}


def test_weights_and_biases_gets_what_tensorboard_gets(sent, scalars):
    history: dict[str, dict[int, float]] = {}
    for record in (record for part in sent for record in part if record.WhichOneof("record_type") == "history"):
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        step = int(items.get("_step", record.history.step.num))
        for tag, value in items.items():
            history.setdefault(tag, {})[step] = value
    for tag in (
        "lm loss",
        "lm loss validation",
        "lm loss test",
        "learning-rate",
        "grad-norm",
        "throughput/mfu",
        "iteration-time",
    ):
        assert history[tag] == pytest.approx(scalars[tag], rel=1e-6), tag


def test_profile(logs):
    """Steps 2 and 3, of a run that had been told to stop after the latter; and nothing when it went on."""
    (trace,) = (logs[0] / "tb_logs").glob("rank0.*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" or event.get("name") == "aten::addmm" for event in events)
    steps = [event for event in events if str(event.get("name")).startswith("Optimizer.step#")]
    assert len(steps) == 2


def test_straggler_table(logs):
    header, *lines = [line.split("\t") for line in (logs[0] / "stragglers.tsv").read_text().splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert (row["pipeline_stage"], row["processes"], row["slowest_rank"]) == ("0", "1", "0")
        assert float(row["median_forward_ms"]) == float(row["slowest_forward_ms"]) > 1
        assert float(row["slowest_batch_ms"]) > 0


def test_plot_of_a_real_run(logs, tmp_path):
    from evo2_megatron.tasks.training.plot_run import plot_runs, read_curves

    assert read_curves(logs[0])["lm loss"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    plot_runs([logs[0]], tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 20_000
