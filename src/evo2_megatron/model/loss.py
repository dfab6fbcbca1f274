# SPDX-License-Identifier: Apache-2.0
"""Weights of the next-token loss: soft-masked (lower-case) bases count less, a tenth unless told otherwise.

Shape legend: B batch, L tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from evo2_megatron.ops.casing import is_lower

LOWERCASE_WEIGHT = 0.1
"""Weight of a repeat-masked base relative to any other in Evo 2's training."""

Normalization = Literal["sequence", "micro_batch"]
"""Over what lower-case weights are made up for: each sequence by itself, which does not depend on how a batch is
divided over steps and processes; or what one process has of a micro-batch, as in the former recipe."""


def loss_weights(
    labels_BL: Tensor,
    loss_mask_BL: Tensor,
    *,
    normalize: Normalization | None,
    lowercase_weight: float,
    split_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Weight of each label in the loss, float32 [B, L].

    Args:
        labels_BL: Token ids with their case.
        loss_mask_BL: 1 where the label counts, 0 elsewhere.
        normalize: Scale the weights so that their sum, over this, is the number of labels that count (at most: a sum
            of weights below 1 is taken as 1); None: do not.
        lowercase_weight: Of a repeat-masked base relative to any other.
        split_group: The processes that each sequence is split over, if it is.
    """
    mask_BL = loss_mask_BL.float()
    weight_BL = mask_BL * torch.where(is_lower(labels_BL), lowercase_weight, 1.0)
    if normalize is None:
        return weight_BL
    sums_2B = torch.stack([mask_BL.sum(1), weight_BL.sum(1)])
    if normalize == "micro_batch":
        sums_2B = sums_2B.sum(1, keepdim=True)
    elif split_group is not None and split_group.size() > 1:
        dist.all_reduce(sums_2B, group=split_group)
    return weight_BL * (sums_2B[0] / sums_2B[1].clamp(min=1.0))[:, None]
