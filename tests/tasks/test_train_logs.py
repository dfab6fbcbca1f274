# SPDX-License-Identifier: Apache-2.0
"""What a run leaves for TensorBoard, Weights & Biases and a profiler, read back with their own tools."""

from __future__ import annotations

import json
import re

import pytest

from tasks.test_train import SMALL, train_all

TAGS = {
    "lm loss", "lm loss vs samples", "lm loss validation", "lm loss validation vs samples",
    "lm loss validation ppl", "lm loss validation ppl vs samples", "learning-rate", "learning-rate vs samples",
    "batch-size", "batch-size vs samples", "loss-scale", "loss-scale vs samples", "grad-norm",
    "grad-norm vs samples", "params-norm", "params-norm vs samples", "world-size", "world-size vs samples",
    "num-zeros", "num-zeros vs samples", "iteration-time", "throughput/tflops", "throughput/tflops/device",
    "throughput/tokens-per-second", "throughput/mfu", "memory/mem-allocated-gigabytes", "time/remaining_estimate",
}  # fmt: skip


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A run that was stopped after three of six steps and went on: its folder, and what both parts printed."""
    folder = tmp_path_factory.mktemp("logs")
    options = SMALL | {
        "result_dir": folder,
        "wandb_project": "test",
        "wandb_offline": True,
        "peak_tflops": 0.5,
        "log_num_zeros_in_grad": True,
        "torch_profiling": True,
        "nsys_start_step": 1,
        "nsys_end_step": 2,
    }
    parts, _ = train_all([options | {"early_stop_on_step": 3}, options])
    return folder / "evo2", parts


@pytest.fixture(scope="module")
def scalars(logs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs[0] / "tb_logs"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


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
    ):
        shown = [float(value) for value in re.findall(pattern, text)]
        assert list(scalars[tag].values()) == pytest.approx(shown, rel=1e-3), tag
    shown = [float(value) for value in re.findall(r"model FLOP utilisation: ([\d.]+) %", text)]
    assert [100 * value for value in scalars["throughput/mfu"].values()] == pytest.approx(shown, abs=0.051)
    speed, utilisation = scalars["throughput/tokens-per-second"], scalars["throughput/mfu"]
    # operations per token: 3 for forward and backward, 2 for multiply and add, and about as many as the weights
    flops = {step: utilisation[step] * 0.5e12 / speed[step] for step in speed}
    assert all(4.5e6 < value < 6.5e6 for value in flops.values())


def test_both_parts_are_one_run_in_weights_and_biases(logs):
    wandb = logs[0] / "wandb"
    runs = sorted(path.name for path in wandb.iterdir() if path.name.startswith("offline-run-"))
    ids = {name.rsplit("-", 1)[1] for name in runs}
    assert ids == {(logs[0] / "wandb_run_id").read_text()} and len(runs) == 2


def test_profile(logs):
    traces = sorted((logs[0] / "tb_logs").glob("*.pt.trace.json"))
    assert len(traces) >= 1
    events = json.loads(traces[0].read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" or event.get("name") == "aten::addmm" for event in events)


def test_plot_of_a_real_run(logs, tmp_path):
    from evo2_megatron.tasks.plot_run import plot_runs, read_curves

    assert read_curves(logs[0])["lm loss"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    plot_runs([logs[0]], tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 20_000
