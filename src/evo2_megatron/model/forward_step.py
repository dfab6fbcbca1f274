# SPDX-License-Identifier: Apache-2.0
"""One micro-batch through the model, as Megatron Bridge's training loop asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from megatron.bridge.training.gpt_step import get_batch
from megatron.bridge.training.losses import create_masked_next_token_loss_function
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.core.transformer import MegatronModule
from torch import Tensor


def forward_step(state: GlobalState, data_iterator: Iterable, model: MegatronModule) -> tuple[Tensor, partial]:
    """Run the next micro-batch forward.

    The model down-weights lower-case bases, so it gets the loss mask, unlike a GPT. The number of tokens that the loss
    is divided by is the number of unmasked ones, whatever their weight.

    Returns:
        The loss per token ``[B, L]`` on the last pipeline stage, the hidden state on the others; and a function that
        turns the former into the sum over the micro-batch, the number of unmasked tokens, and what to report.
    """
    state.timers("batch-generator", log_level=2).start()
    with state.straggler_timer(bdata=True):
        # under context parallelism this is this process's part of the sequence
        tokens, labels, loss_mask, attention_mask, position_ids, *_ = get_batch(
            data_iterator, state.cfg, pg_collection=get_pg_collection(model)
        )
    state.timers("batch-generator").stop()

    with state.straggler_timer:
        output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    checks = state.cfg.rerun_state_machine
    loss = create_masked_next_token_loss_function(loss_mask, checks.check_for_nan_in_loss, checks.check_for_spiky_loss)
    return output, loss
