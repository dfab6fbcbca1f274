# SPDX-License-Identifier: Apache-2.0
"""What a training run shows: a progress bar on a terminal, Megatron's log lines elsewhere, and little else."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Literal, TextIO

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from tqdm import tqdm

from evo2_megatron.runtime import quiet_loggers
from evo2_megatron.runtime.distributed import total_over_parameters, world_size
from evo2_megatron.runtime.training_repairs import operations_of_step

logger = logging.getLogger(__name__)

_LOG_LINE = re.compile(r" \[.*\] iteration ")
_SHOWN = re.compile(
    r"\s*(validation loss at|successfully saved|exiting program|warning|error|could not|load_return|.*mismatch)",
    re.IGNORECASE,
)
_CHATTER = (
    quiet_loggers.RERUNS,
    "megatron.core.tensor_parallel.random",  # that a CPU has one random state, which "CUDA" shares
    "megatron.bridge.training.utils.config_utils",  # that run_config.yaml names functions of a finished run
)
"""Loggers whose warnings say nothing about this run."""
_STRAGGLERS = "megatron.core.utils"
"""Where what times forward passes warns of whatever ends one, Ctrl-C included, before that is told itself."""


class TrainingProgress(Callback):
    """Measures a run while Megatron Bridge drives it, and shows a progress bar if asked to.

    The losses are on the last pipeline stage, so the bar and Megatron's log lines belong to the last rank.
    """

    def __init__(
        self, *, bar: bool, unit: Literal["tokens", "samples"] = "tokens", peak_tflops: float | None = None
    ) -> None:
        """Nothing is shown yet.

        Args:
            bar: Show a progress bar on stderr, in place of Megatron's log lines.
            unit: What is counted. Tokens: every sample goes through the whole model, forward and back.
            peak_tflops: 10^12 operations per second that one device can do; None: utilisation is not shown.
        """
        self.unit = unit
        self.step = 0
        """Optimizer steps done, those of earlier runs included."""

        self.loss: float | None = None
        """Loss of the last step, nat per token."""

        self.num_units = 0
        """Tokens or samples trained on in this run, all processes together."""

        self.step_seconds = 0.0
        """Time spent in training steps: not in evaluation or in writing checkpoints."""

        self._wants_bar, self._bar = bar, None
        self._peak_flops = None if peak_tflops is None or unit != "tokens" else 1e12 * peak_tflops
        self._rates: dict[str, float] = {}
        self._since_log = (0, 0.0)  # units, seconds

    def on_train_start(self, context: CallbackContext) -> None:
        """Called by Bridge when everything is built and loaded."""
        train = context.state.cfg.train
        self.step = context.state.train_state.step
        self._last_step = train.train_iters
        model = context.state.cfg.model
        self._units_per_step = train.global_batch_size * (model.seq_length if self.unit == "tokens" else 1)
        self._flops_per_token = operations_of_step(context.state.cfg) / (model.seq_length * world_size())
        self._first_step_end: tuple[int, float] | None = None
        logger.info("%s parameters", f"{total_over_parameters(context.model, torch.Tensor.numel):,}")
        if self._wants_bar:
            # tqdm by itself shows nothing on a terminal that does not tell its size
            size = shutil.get_terminal_size(fallback=(120, 24))
            self._bar = tqdm(
                total=train.train_iters, initial=self.step, unit="step", ncols=size.columns, nrows=size.lines
            )

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Called by Bridge before each step."""
        self._step_start = time.perf_counter()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Called by Bridge after each step, before it writes its log line."""
        now = time.perf_counter()
        seconds = now - self._step_start
        self.step = context.state.train_state.step + 1
        self.num_units += self._units_per_step
        self.step_seconds += seconds
        self._since_log = (self._since_log[0] + self._units_per_step, self._since_log[1] + seconds)
        if self.step % context.state.cfg.logger.log_interval == 0:
            self._write_rates(context)
        if "lm loss" in (context.loss_dict or {}):
            self.loss = context.loss_dict["lm loss"].item()
        if self._first_step_end is None:
            self._first_step_end = (self.step, now)
        if self._bar is not None:
            loss = "" if self.loss is None else f"loss {self.loss:.4f}, "
            self._bar.set_postfix_str(f"{loss}{self._units_per_step / seconds:,.0f} {self.unit}/s", refresh=False)
            self._bar.update()

    def _write_rates(self, context: CallbackContext) -> None:
        """Speed since the last time, for the log line and, on the rank that has them, TensorBoard and W&B."""
        units, seconds = self._since_log
        self._since_log = (0, 0.0)
        self._rates = {
            f"throughput/{self.unit}-per-second": units / seconds,
            f"throughput/{self.unit}-per-second/device": units / seconds / world_size(),
        }
        if self._peak_flops is not None:
            self._rates["throughput/mfu"] = units / seconds * self._flops_per_token / self._peak_flops
        writer = context.state.tensorboard_logger
        for tag, value in self._rates.items() if writer else ():
            writer.add_scalar(tag, value, self.step)
        if writer and context.state.wandb_logger:
            context.state.wandb_logger.log(self._rates, self.step)

    def on_train_end(self, context: CallbackContext) -> None:
        """Called by Bridge after the last step."""
        # Bridge 0.3.1 saves after the last step, also when it has just saved that step: overwriting a complete
        # checkpoint is a chance to lose it. An interval of 0 tells it not to
        checkpoint = context.state.cfg.checkpoint
        if context.state.train_state.step % checkpoint.save_interval == 0:
            checkpoint.save_interval = 0

    def close(self) -> None:
        """Take the bar off the terminal's last line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @property
    def has_bar(self) -> bool:
        """Whether the bar is on the terminal now."""
        return self._bar is not None

    def rates(self) -> str:
        """What a log line is given: units per second and utilisation since the last one, and the time left."""
        name = f"{self.unit}-per-second"
        speed, each, utilisation = (self._rates.get(f"throughput/{name}") for name in (name, f"{name}/device", "mfu"))
        each = f" {self.unit} per second and process: {each:.1f} |" if world_size() > 1 else ""
        share = "" if utilisation is None else f" model FLOP utilisation: {100 * utilisation:.1f} % |"
        return f" {self.unit} per second: {speed:.1f} | time left: {self.time_left()} |{each}{share}"

    def time_left(self) -> timedelta:
        """Whole seconds until the last step; evaluations and checkpoints so far are part of the pace.

        The first step, which builds buffers and compiles kernels, is not, unless there is nothing else to go by.
        """
        first_step, first_end = self._first_step_end
        steps, elapsed = self.step - first_step, time.perf_counter() - first_end
        if steps == 0:
            steps, elapsed = 1, self.step_seconds
        return timedelta(seconds=round((self._last_step - self.step) * elapsed / steps))


@contextlib.contextmanager
def quiet_console(progress: TrainingProgress) -> Iterator[None]:
    """Let through only what a user wants of the hundreds of lines that Megatron prints while a block runs.

    Its log lines get the speed and the time left; under a progress bar they are left out.
    """

    def shown(line: str) -> str | None:
        if _LOG_LINE.match(line):
            return None if progress.has_bar else line.rstrip() + progress.rates()
        return line if _SHOWN.match(line) else None

    def write(line: str, stream: TextIO) -> None:
        tqdm.write(line, file=stream)  # above the bar, if there is one
        stream.flush()

    with (
        quiet_loggers.silenced(*_CHATTER),
        quiet_loggers.without_tracebacks(_STRAGGLERS),
        contextlib.redirect_stdout(_Lines(sys.stdout, shown, write)),
    ):
        try:
            yield
        finally:
            progress.close()


class _Lines(io.TextIOBase):
    """A text stream that passes whole lines through a filter to another stream."""

    def __init__(
        self, stream: TextIO, shown: Callable[[str], str | None], write: Callable[[str, TextIO], None]
    ) -> None:
        self._stream, self._shown, self._write, self._line = stream, shown, write, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if (kept := self._shown(line)) is not None:
                self._write(kept, self._stream)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()
