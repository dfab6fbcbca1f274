# SPDX-License-Identifier: Apache-2.0
"""Notes what validations find, so that the best checkpoint is kept, and ends a run that gets no better."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from megatron.bridge.training.callbacks import Callback, CallbackContext

from evo2_megatron.checkpoint.evaluations import Evaluation, best, has_stalled, write_evaluations
from evo2_megatron.runtime import distributed

logger = logging.getLogger(__name__)


class BestCheckpoint(Callback):
    """Needs a checkpoint after every validation; the lowest loss is the best."""

    def __init__(self, folder: Path, evaluations: Sequence[Evaluation], *, patience: int | None) -> None:
        """Use it on all processes alike.

        Args:
            folder: Of the run's checkpoints.
            evaluations: Of the part of the run that is done.
            patience: Validations without a better one before the run ends; None: it does not.
        """
        self._folder, self._evaluations, self._patience = folder, list(evaluations), patience

    def on_eval_end(self, context: CallbackContext) -> None:
        """Called by Bridge after a validation, before it saves; after the last step once more."""
        step = context.state.train_state.step
        if any(evaluation.step == step for evaluation in self._evaluations):
            return
        (loss,) = (value.item() for name, value in context.total_loss_dict.items() if name.endswith("loss"))
        self._evaluations.append(Evaluation(step, loss if math.isfinite(loss) else math.inf))
        if distributed.rank() == 0:
            write_evaluations(self._folder, self._evaluations)
        if has_stalled(self._evaluations, self._patience):
            lowest = best(self._evaluations)
            logger.info(
                "The last %d validations were no better than that of step %d (%.4f): ending", self._patience, *lowest
            )
            # how Bridge is told to save and end; it looks after every step whether this divides the step's number
            context.state.cfg.train.exit_interval = step
