# SPDX-License-Identifier: Apache-2.0
"""How uncertain a prediction is.

Shape legend: L tokens, B batch, V rows of the vocabulary that this process has.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def vocab_parallel_entropy(logits_LBV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Entropy of the prediction over the whole vocabulary in nat, float32 [B, L].

    ``log sum_v exp(x_v) - sum_v x_v exp(x_v) / sum_v exp(x_v)``, in float32, from logits less their maximum.

    Args:
        logits_LBV: In any float dtype; left as they are.
        group: The processes that the vocabulary is split over.
    """
    logits_LBV = logits_LBV.float()
    top_LB = logits_LBV.amax(-1)
    dist.all_reduce(top_LB, op=dist.ReduceOp.MAX, group=group)
    shifted_LBV = logits_LBV - top_LB[..., None]
    weight_LBV = shifted_LBV.exp()
    sums_2LB = torch.stack([weight_LBV.sum(-1), (weight_LBV * shifted_LBV).sum(-1)])
    dist.all_reduce(sums_2LB, group=group)
    total_LB, weighted_LB = sums_2LB
    return (total_LB.log() - weighted_LB / total_LB).transpose(0, 1)
