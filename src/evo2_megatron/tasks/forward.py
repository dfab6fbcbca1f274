# SPDX-License-Identifier: Apache-2.0
"""Tokens through all pipeline stages of a model, continuing from a state; and what to say of a broken output.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo2_megatron.tasks.steps import finished

if TYPE_CHECKING:
    from evo2_megatron.model.inference_state import InferenceState
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

OUTPUT_NOT_FINITE = "the model's output is not finite; check the weights, or try --mixed-precision-recipe fp32"


def prefill(model: StripedHyenaModel, token_BT: Tensor, state: InferenceState, *, chunk: int) -> Tensor:
    """Run tokens through the model, ``chunk`` at a time (0: all at once), as ``forward_last``; logits_BV."""
    return finished(prefill_in_pieces(model, token_BT, state, chunk=chunk))


def prefill_in_pieces(
    model: StripedHyenaModel, token_BT: Tensor, state: InferenceState, *, chunk: int
) -> Generator[None, None, Tensor]:
    """As ``prefill``, with an item after each piece."""
    for chunk_BT in token_BT.split(chunk or token_BT.shape[1], dim=1):
        logits_BV = forward_last(model, chunk_BT, state)
        yield
    return logits_BV


def forward_last(model: StripedHyenaModel, token_BT: Tensor, state: InferenceState) -> Tensor:
    """Run tokens through the model, all its pipeline stages, continuing from a state.

    Args:
        model: This process's stage.
        token_BT: The new tokens; every stage gets the same.
        state: Made with ``last_token_logits_only``; brought up to date in place.

    Returns:
        Logits after the last token, logits_BV, on every process.
    """
    from evo2_megatron.model.pipeline import forward_through_stages

    output = forward_through_stages(model, token_BT, inference_context=state)
    group = model.pg_collection.pp
    if group.size() == 1:
        return output[:, -1]
    if output is None:
        logits_BV = torch.empty((token_BT.shape[0], model.vocab_size), device=token_BT.device)
    else:
        logits_BV = output[:, -1].float().contiguous()
    torch.distributed.broadcast(logits_BV, group=group, group_src=group.size() - 1)
    return logits_BV
