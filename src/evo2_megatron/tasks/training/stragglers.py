# SPDX-License-Identifier: Apache-2.0
"""Which process is slow: each one's own time for its batches and forward passes, in a table in the run's folder.

Megatron Core's detector times the same places, but needs CUDA, shows its report on the console only, and opens a port
to the network to be switched by.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core import parallel_state

from evo2_megatron.config import UserError

logger = logging.getLogger(__name__)

SLOW = 1 / 0.7
"""Forward time over the median of the same pipeline stage from which a process is called slow; the reciprocal of the
score from which NVIDIA's resiliency extension calls a GPU so."""

_COLUMNS = (
    "step", "pipeline_stage", "processes", "median_forward_ms", "slowest_forward_ms", "slowest_rank", "slowest_host",
    "median_batch_ms", "slowest_batch_ms", "slowest_batch_rank", "slowest_batch_host",
)  # fmt: skip


class ProcessTimes(NamedTuple):
    """What one process took, on average over the steps since the last report."""

    rank: int
    host: str
    stage: int
    """Pipeline stage; stages have different work."""

    forward_ms: float
    """Forward passes of a step, on the device, waiting for tensor- and context-parallel partners included."""

    batch_ms: float
    """Waiting for the batches of a step."""


class StepWatch:
    """A stand-in for Megatron's detector as the context in which ``forward_step`` works."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._batch_seconds, self._passes, self._of_batch, self._begin = 0.0, [], False, None

    def take(self) -> tuple[float, float]:
        """Milliseconds of forward passes and of batches since the last time; the last pass must have been issued."""
        if self._passes:
            self._passes[-1][1].synchronize()
        forward = sum(begin.elapsed_time(end) for begin, end in self._passes)
        batch = 1e3 * self._batch_seconds
        self.clear()
        return forward, batch

    def __call__(self, bdata: bool = False) -> StepWatch:
        """What follows is the making of a batch (``bdata``, as Megatron calls it) or else a forward pass."""
        self._of_batch = bdata
        return self

    def __enter__(self) -> StepWatch:
        if self._of_batch:
            self._begin = time.perf_counter()
        else:
            # kernels run behind the program: only the device knows when they begin and end
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._of_batch:
            self._batch_seconds += time.perf_counter() - self._begin
        else:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._passes.append((self._begin, end))
        self._of_batch = False


class StragglerReport(Callback):
    """Appends to a table, at every log interval, the slowest process of each pipeline stage beside the median."""

    def __init__(self, table: Path) -> None:
        """Nothing is written yet.

        Args:
            table: File with tab-separated values; rank 0 writes it.
        """
        self._table, self._watch, self._steps = table, StepWatch(), 0
        self._forward_ms, self._batch_ms = 0.0, 0.0

    def on_train_start(self, context: CallbackContext) -> None:
        """Called by Bridge when everything is built and loaded."""
        # what forward_step asks Bridge's state for; there is no public way to choose another
        context.state._straggler_timer = self._watch
        if torch.distributed.get_rank() == 0 and not self._table.exists():
            self._append(["\t".join(_COLUMNS)])

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Called by Bridge before each step."""
        self._watch.clear()  # of evaluations

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Called by Bridge after each step, on all processes."""
        forward_ms, batch_ms = self._watch.take()
        self._forward_ms += forward_ms
        self._batch_ms += batch_ms
        self._steps += 1
        step = context.state.train_state.step + 1
        if step % context.state.cfg.logger.log_interval:
            return
        mine = ProcessTimes(
            rank=torch.distributed.get_rank(),
            host=socket.gethostname(),
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            forward_ms=self._forward_ms / self._steps,
            batch_ms=self._batch_ms / self._steps,
        )
        self._forward_ms, self._batch_ms, self._steps = 0.0, 0.0, 0
        times: list[ProcessTimes] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(times, mine)
        if mine.rank == 0:
            self._append(rows(step, times))
            for warning in warnings_about(step, times):
                logger.warning("%s", warning)

    def _append(self, lines: list[str]) -> None:
        try:
            with self._table.open("a") as table:
                table.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise UserError(
                f"cannot write {self._table}: {error.strerror}; the run goes on from its last checkpoint when it is "
                "started again, with room or without --log-straggler"
            ) from None


def rows(step: int, times: list[ProcessTimes]) -> list[str]:
    """A line of the table for each pipeline stage."""
    lines = []
    for stage in sorted({process.stage for process in times}):
        of_stage = [process for process in times if process.stage == stage]
        forward, batch = (
            max(of_stage, key=lambda process: process.forward_ms),
            max(of_stage, key=lambda process: process.batch_ms),
        )
        values = (
            step, stage, len(of_stage), _median(process.forward_ms for process in of_stage), forward.forward_ms,
            forward.rank, forward.host, _median(process.batch_ms for process in of_stage), batch.batch_ms, batch.rank,
            batch.host,
        )  # fmt: skip
        lines.append("\t".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    return lines


def warnings_about(step: int, times: list[ProcessTimes]) -> list[str]:
    """A line for each process whose forward passes take ``SLOW`` times as long as its stage's median, or longer."""
    lines = []
    for process in times:
        usual = _median(other.forward_ms for other in times if other.stage == process.stage)
        if process.forward_ms > SLOW * usual:
            lines.append(
                f"Straggler at step {step}: rank {process.rank} on {process.host} takes {process.forward_ms:.0f} ms "
                f"for its forward passes, {process.forward_ms / usual:.1f} times the median"
            )
    return lines


def _median(values: Iterable[float]) -> float:
    # of two the faster, so that one of two can be slow
    return statistics.median_low(values)
