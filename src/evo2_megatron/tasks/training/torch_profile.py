# SPDX-License-Identifier: Apache-2.0
"""A trace of some steps of training by PyTorch's profiler.

Bridge's own use of it counts steps from where a run was resumed, records one step before those it is asked for, and
writes nothing for a run that ends among them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext


class TorchProfile(Callback):
    """Records the steps after ``start`` up to ``end``, as ``--nsys-profiling`` does: those that are still ahead.

    The steps are one trace; it is written at the end of the last of them, or of the run.
    """

    def __init__(self, folder: Path, *, rank: int, start: int, end: int) -> None:
        """Nothing is recorded yet.

        Args:
            folder: Where TensorBoard looks for the trace; made if missing.
            rank: This process among all, for the name of the file.
            start: Steps done before the first to record.
            end: Steps done after the last.
        """
        self._folder, self._rank, self._start, self._end = folder, rank, start, end
        self._profiler: torch.profiler.profile | None = None

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Called by Bridge before each step."""
        if self._profiler is None and self._start <= context.state.train_state.step < self._end:
            self._profiler = torch.profiler.profile(
                record_shapes=True,
                with_stack=True,
                on_trace_ready=torch.profiler.tensorboard_trace_handler(str(self._folder), f"rank{self._rank}"),
            )
            self._profiler.start()

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Called by Bridge after each step."""
        if context.state.train_state.step + 1 == self._end:
            self.finish()

    def finish(self) -> None:
        """Write the trace if one is being recorded."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
