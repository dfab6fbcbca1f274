# SPDX-License-Identifier: Apache-2.0
"""Weights of the next-token loss: soft-masked (lower-case) bases count for a tenth.

Shape legend: B batch, L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evo2_megatron.ops.casing import is_lower

LOWERCASE_WEIGHT = 0.1
"""Weight of a repeat-masked base relative to any other (Evo 2's training)."""


def loss_weights(labels_BL: Tensor, loss_mask_BL: Tensor, *, normalize: bool) -> Tensor:
    """Weight of each label in the loss, float32 [B, L].

    Args:
        labels_BL: Token ids with their case.
        loss_mask_BL: 1 where the label counts, 0 elsewhere.
        normalize: Scale the weights of this micro-batch so that their sum is the number of labels that count
            (at most: a sum of weights below 1 is taken as 1).
    """
    mask_BL = loss_mask_BL.float()
    weight_BL = mask_BL * torch.where(is_lower(labels_BL), LOWERCASE_WEIGHT, 1.0)
    if normalize:
        weight_BL = weight_BL * (mask_BL.sum() / weight_BL.sum().clamp(min=1.0))
    return weight_BL
