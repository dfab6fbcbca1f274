# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import io
import logging
from datetime import timedelta
from types import SimpleNamespace

import pytest

LOG_LINE = " [2026-01-01 00:00:00] iteration        4/      10 | lm loss: 1.386294E+00 |"


@pytest.fixture
def started(megatron, monkeypatch):
    """A run of 10 steps of 64 tokens, 3 of them done, on a clock that the test sets; and its clock."""
    import torch

    from evo2_megatron.tasks.training import training_progress as progress

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(progress, "total_over_parameters", lambda model, of: 5)
    train_state = SimpleNamespace(step=3)
    config = SimpleNamespace(
        train=SimpleNamespace(train_iters=10, global_batch_size=4),
        model=SimpleNamespace(seq_length=16, _get_num_floating_point_operations=lambda batch_size: 16e9 * batch_size),
        logger=SimpleNamespace(log_interval=1),
        checkpoint=SimpleNamespace(save_interval=5),
        peft=None,
    )
    scalars = []
    writer = SimpleNamespace(add_scalar=lambda *event: scalars.append(event))
    context = SimpleNamespace(
        state=SimpleNamespace(
            cfg=config, train_state=train_state, tensorboard_logger=writer, wandb_logger=None, scalars=scalars
        ),
        model=[],
        loss_dict={"lm loss": torch.tensor(1.25)},
    )
    run = progress.TrainingProgress(bar=False)
    run.on_train_start(context)

    def step(seconds: float, pause: float = 0.0) -> None:
        run.on_train_step_start(context)
        clock.now += seconds
        run.on_train_step_end(context)
        train_state.step += 1
        clock.now += pause

    return SimpleNamespace(run=run, step=step, context=context)


def test_tokens_per_second_leave_pauses_out(started):
    started.context.state.cfg.logger.log_interval = 5
    started.step(2.0, pause=10.0)
    started.step(1.0, pause=7.0)
    # 2 steps of 64 tokens in 3 s
    assert " tokens per second: 42.7 |" in started.run.rates()
    started.context.state.cfg.logger.log_interval = 1
    started.step(0.5)
    # since the last line
    assert " tokens per second: 128.0 |" in started.run.rates()


def test_utilisation(started):
    """64 tokens a step, 64e9 operations: 2 s a step are 3.2 % of a device that does 10^12 per second."""
    from evo2_megatron.tasks.training.training_progress import TrainingProgress

    started.step(1.0)
    assert "utilisation" not in started.run.rates()
    tags = ["throughput/tokens-per-second", "throughput/tokens-per-second/device"]
    assert [tag for tag, _, _ in started.context.state.scalars] == tags
    started.run = TrainingProgress(bar=False, peak_tflops=1.0)
    started.run.on_train_start(started.context)
    started.run.on_train_step_start(started.context)
    started.run._step_start -= 2.0
    started.run.on_train_step_end(started.context)
    assert " model FLOP utilisation: 3.2 % |" in started.run.rates()
    tag, value, step = started.context.state.scalars[-1]
    assert (tag, step) == ("throughput/mfu", 5) and value == pytest.approx(0.032)


def test_tokens_per_second_and_process(started, monkeypatch):
    from evo2_megatron.tasks.training import training_progress as progress

    monkeypatch.setattr(progress, "world_size", lambda: 4)
    started.step(2.0)
    assert (
        " tokens per second: 32.0 | time left: 0:00:12 | tokens per second and process: 8.0 |" in started.run.rates()
    )
    assert started.context.state.scalars[-1] == ("throughput/tokens-per-second/device", 8.0, 4)


def test_time_left_counts_pauses_but_not_the_first_step(started):
    started.step(100.0)
    started.step(1.0, pause=2.0)
    started.step(1.0, pause=2.0)
    assert started.run.step == 6
    # 2 steps took 6 s, 4 are left
    assert started.run.time_left() == timedelta(seconds=12)


def test_time_left_after_one_step(started):
    started.step(3.0)
    assert started.run.time_left() == timedelta(seconds=18)


def test_last_loss(started):
    assert started.run.loss is None
    started.step(1.0)
    assert started.run.loss == 1.25


@pytest.mark.parametrize("step, interval", [(10, 0), (9, 5)])
def test_a_saved_step_is_not_saved_again(started, step, interval):
    started.context.state.train_state.step = step
    started.run.on_train_end(started.context)
    assert started.context.state.cfg.checkpoint.save_interval == interval


def test_quiet_console(started, capsys):
    from evo2_megatron.tasks.training.training_progress import quiet_console

    chatter = logging.getLogger("megatron.core.rerun_state_machine")
    with quiet_console(started.run):
        started.step(2.0)
        print("[after dataloaders are built] datetime: 2026-01-01")
        print(LOG_LINE)
        print("  successfully saved ", end="")
        print("checkpoint from iteration       4")
        print(" validation loss at iteration 4 | lm loss value: 1.3E+00 | ")
        print("WARNING: could not find the metadata file")
        assert chatter.disabled
    assert not chatter.disabled
    assert capsys.readouterr().out.splitlines() == [
        LOG_LINE + " tokens per second: 32.0 | time left: 0:00:12 |",
        "  successfully saved checkpoint from iteration       4",
        " validation loss at iteration 4 | lm loss value: 1.3E+00 | ",
        "WARNING: could not find the metadata file",
    ]


def test_an_end_within_a_forward_pass_is_not_told_by_the_timer(started, caplog):
    """It would show frames, before the command says in a line what happened; other warnings stay."""
    from megatron.core.utils import StragglerDetector

    from evo2_megatron.tasks.training.training_progress import quiet_console

    shown = []
    for console in (quiet_console(started.run), contextlib.nullcontext()):
        caplog.clear()
        with pytest.raises(KeyboardInterrupt), console, StragglerDetector():
            logging.getLogger("megatron.core.utils").warning("of something else")
            raise KeyboardInterrupt
        shown.append(["Traceback" in message for message in caplog.messages])
    assert shown == [[False], [False, True]]


def test_bar_replaces_the_log_lines(started, capsys, monkeypatch):
    from evo2_megatron.tasks.training import training_progress as progress

    terminal = io.StringIO()
    real_bar = progress.tqdm
    bar = lambda **settings: real_bar(file=terminal, mininterval=0, **settings)  # noqa: E731
    bar.write = real_bar.write
    monkeypatch.setattr(progress, "tqdm", bar)
    run = progress.TrainingProgress(bar=True)
    with progress.quiet_console(run):
        run.on_train_start(started.context)
        run.on_train_step_start(started.context)
        monkeypatch.setattr(progress.time, "perf_counter", lambda: 2.0)
        run.on_train_step_end(started.context)
        print(LOG_LINE)
        print(" validation loss at iteration 4 |")
    assert capsys.readouterr().out == " validation loss at iteration 4 |\n"
    assert "4/10" in terminal.getvalue() and "loss 1.2500, 32 tokens/s" in terminal.getvalue()
    assert not run.has_bar
