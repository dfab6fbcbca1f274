# SPDX-License-Identifier: Apache-2.0
"""What a run of a head does about its evaluations."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core.utils import unwrap_model
from torch.utils.data import default_collate

from evo2_megatron.checkpoint.evaluations import Evaluation, best, has_stalled, write_evaluations
from evo2_megatron.model.head import inputs_of
from evo2_megatron.runtime import distributed

logger = logging.getLogger(__name__)


_NUM_FITTED = 256
"""Sequences that say how the head's norm begins."""

_FITTED_TOKENS, _FEWEST_FITTED = 1 << 16, 16
"""If the head is one of bases, as many windows as make up so many tokens, but so many at least."""

_FITTED_BASES = 4_096
"""Of all these windows together."""


class FittedNorm(Callback):
    """Lets the head's norm begin with what it will see, in training sequences that are the same on all processes."""

    def on_train_start(self, context: CallbackContext) -> None:
        """Called by Bridge when everything is built and loaded."""
        config, model = context.state.cfg, unwrap_model(context.model[0])
        train = config.dataset.training_data()
        generator = torch.Generator().manual_seed(config.rng.seed)
        most = _NUM_FITTED
        if config.model.head_per_base:
            most = min(most, max(_FEWEST_FITTED, _FITTED_TOKENS // config.model.seq_length))
        chosen = torch.randperm(len(train), generator=generator)[:most]
        seen = []
        for places in chosen.split(config.train.micro_batch_size):
            batch = default_collate([train[place] for place in places.tolist()])
            features = model.frozen_features(*inputs_of(batch))
            if config.model.head_per_base:
                of_each = math.ceil(_FITTED_BASES / len(chosen))
                drawn = [
                    row[torch.randperm(int(mask.sum()), generator=generator)[:of_each]]
                    for row, mask in zip(features, batch["base_mask"])
                ]
                features = torch.cat(drawn)
            seen.append(features)
        model.prediction_head.begin_with(torch.cat(seen))
        context.optimizer.reload_model_params()


class SharedDropout(Callback):
    """Begins every step with one random state on all processes, which the lengths of their sequences move apart."""

    def on_train_step_start(self, context: CallbackContext) -> None:
        """Called by Bridge."""
        distributed.share_random_state()


class WholeTestSet(Callback):
    """Has the test go through all of its data, however many there are for validation."""

    def on_test_start(self, context: CallbackContext) -> None:
        """Called by Bridge before it looks how many batches that is."""
        config = context.state.cfg
        num_samples = config.dataset.num_samples[-1]
        config.train.eval_iters = math.ceil(num_samples / config.train.global_batch_size)


class BestCheckpoint(Callback):
    """Keeps what validations find, so that the best checkpoint is known, and ends a run that gets no better.

    Needs a checkpoint after every validation; the lowest loss is the best."""

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
            # Bridge asks before every step, and then saves and tests as at any end
            context.state.cfg.train.train_iters = step
