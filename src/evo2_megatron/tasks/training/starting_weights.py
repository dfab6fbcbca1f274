# SPDX-License-Identifier: Apache-2.0
"""Give a model to fine-tune its weights, and show that it knows more with them than with those it was made with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from evo2_megatron.data import tokenizer
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks.scoring.prediction_runner import Runner
from evo2_megatron.tasks.scoring.prediction_settings import Output

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

logger = logging.getLogger(__name__)

_NUM_BASES = 512


def load_and_compare(stage: MegatronModule, load: Callable[[], None], precision: str) -> None:
    """Call ``load``, and log the loss after it, and before, on made-up DNA; all processes call this alike.

    Weights in 8 bits are nothing, not random, before they are loaded. Where communication overlaps with products there
    is no loss: Transformer Engine's buffers for it take a batch of training, whatever they are given.

    Nothing can be known of what made-up DNA holds but its alphabet, so that a trained model's loss there is near
    ln 4 = 1.39 nat per base, and that of random weights near the logarithm of the vocabulary, 5.5 to 6.3.

    Args:
        stage: This process's layers, with random weights.
        load: What replaces them.
        precision: Name of the precision recipe.
    """
    from megatron.core.utils import unwrap_model

    config = unwrap_model(stage).config
    if config.tp_comm_overlap:
        load()
        return
    was_training = stage.training
    stage.eval()
    narrow = config.quantize_weights != "none"
    before = None if narrow else _loss(stage, precision)
    load()
    # Transformer Engine keeps weights in 8 bits from the first pass on, until it is told that there are new ones
    stage.set_is_first_microbatch()
    after = _loss(stage, precision)
    stage.train(was_training)
    if after is None or distributed.rank() != distributed.world_size() - 1:
        return
    if before is None:
        logger.info("Loss on %s made-up bases with the loaded weights: %.4f nat per base", _NUM_BASES, after)
        return
    logger.info(
        "Loss on %s made-up bases, nat per base: %.4f with the loaded weights, %.4f with random ones",
        _NUM_BASES, after, before,
    )  # fmt: skip
    if not after < before:
        logger.warning("The loaded weights are no better there than random ones: are they those of a trained model?")


def _loss(stage: MegatronModule, precision: str) -> float | None:
    """Mean over a sequence that is always the same; None on all pipeline stages but the last."""
    bases = torch.tensor(tokenizer.encode("ACGT"))
    tokens = bases[torch.randint(4, (_NUM_BASES,), generator=torch.Generator().manual_seed(0))]
    item = {"tokens": tokens, "loss_mask": torch.ones_like(tokens), "seq_idx": torch.tensor(0)}
    result = Runner(stage, Output(log_probs="mean"), precision=precision)([item])
    return None if result is None else -(result["log_likelihood"] / result["num_scored"]).item()
