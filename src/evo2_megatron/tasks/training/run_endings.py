# SPDX-License-Identifier: Apache-2.0
"""How a training run ends before its last step: what is told, and what must be put away for the process to end."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext

from evo2_megatron.checkpoint import run_checkpoints
from evo2_megatron.config import UserError
from evo2_megatron.runtime import distributed

_NOT_FINITE = re.compile(r"iteration (\d+): .*found (NaN|Inf) in local (forward loss|grad norm)")
"""How Megatron says so."""


class EarlyEnd(Callback):
    """Knows what is to be put away; ``tidy`` does it."""

    def __init__(self, checkpoint_dir: Path) -> None:
        """``checkpoint_dir``: folder of the run's checkpoints."""
        self._checkpoint_dir = checkpoint_dir
        self._state: Any = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Called by Bridge when everything is built and loaded."""
        self._state = context.state

    @contextlib.contextmanager
    def tidy(self) -> Iterator[None]:
        """Around Bridge's loop: let an end on request pass as a normal one, and no failure leave anything running.

        Raises:
            UserError: Loss or gradient were not finite.
        """
        on_sigterm, has_failed = signal.getsignal(signal.SIGTERM), True
        try:
            yield
            has_failed = False
        except SystemExit as ending:
            # how Bridge ends a run early, after it has saved: on SIGTERM, or on the step to stop at
            if ending.code:
                raise
            has_failed = False
            _clean_up()
        except UserError:
            _clean_up()
            raise
        except RuntimeError as error:
            found = _NOT_FINITE.search(str(error))
            if found is None:
                raise
            if distributed.world_size() == 1:  # the others may be waiting for this process
                _clean_up()
            raise UserError(self._not_finite(*found.groups())) from None
        finally:
            if has_failed:
                self._end_writer()
            signal.signal(signal.SIGTERM, on_sigterm)

    def _not_finite(self, step: str, value: str, where: str) -> str:
        what = "loss" if where == "forward loss" else "gradient"
        newest = run_checkpoints.newest(self._checkpoint_dir)
        after = "it begins anew, for there is no checkpoint yet"
        if newest is not None:
            after = f"it goes on from {newest.name}"
        return (
            f"the {what} of step {step} is {value}: the run diverges; run the command again with a lower --lr, "
            f"or a longer --warmup-steps: {after}"
        )

    def _end_writer(self) -> None:
        """The process that writes checkpoints in the background is of no use any more, and Python would wait for it:
        for its answer to a farewell, and for somebody to read what was on the way to it."""
        queue = None if self._state is None else self._state.async_calls_queue
        caller = None if queue is None else queue.persistent_caller
        if caller is None or caller.process is None:
            return
        caller.process.kill()
        caller.process.join()
        caller.process = None
        for pipe in (caller.queue, caller.preload_q):
            pipe.cancel_join_thread()


def _clean_up() -> None:
    import torch
    from megatron.bridge.training.initialize import destroy_global_state

    destroy_global_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
