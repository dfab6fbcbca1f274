# SPDX-License-Identifier: Apache-2.0
"""How probable a model finds the tokens of a sequence.

``log p[t] = logits[t, x[t+1]] - log sum_v exp(logits[t, v])``, over all rows of the padded vocabulary, in float32.
Shape legend: B batch, L tokens, V vocabulary rows (of this process, if they are split), N rows of B * L.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Collapse = Literal["sum", "mean", "per_token"]

_PIECE_VALUES = 1 << 23  # float32 temporaries of 32 MiB, whatever the length


@torch.no_grad()
def next_token_log_probs(
    logits_BLV: Tensor, next_BL: Tensor, *, vocab_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Log-probability, in nat, of the token that follows each position.

    Args:
        logits_BLV: Logits in any float dtype. With ``vocab_group``, this process's rows of the vocabulary: process r
            of the group holds rows r*V to (r+1)*V - 1.
        next_BL: The next token's id at every position.
        vocab_group: Processes that split the vocabulary; None: it is whole.

    Returns:
        Float32 [B, L], the same on every process of the group.
    """
    logits_NV, next_N = logits_BLV.flatten(0, 1), next_BL.flatten()
    rows = max(1, _PIECE_VALUES // logits_NV.shape[1])
    pieces = [
        _log_probs(logits.float(), target, vocab_group)
        for logits, target in zip(logits_NV.split(rows), next_N.split(rows))
    ]
    return torch.cat(pieces).view(next_BL.shape)


def _log_probs(logits_NV: Tensor, target_N: Tensor, vocab_group: dist.ProcessGroup | None) -> Tensor:
    if vocab_group is None:
        return -F.cross_entropy(logits_NV, target_N, reduction="none")
    highest_N = logits_NV.amax(-1)
    dist.all_reduce(highest_N, op=dist.ReduceOp.MAX, group=vocab_group)
    shifted_NV = logits_NV - highest_N[:, None]
    total_N = shifted_NV.exp().sum(-1)
    num_rows = logits_NV.shape[1]
    row_N = target_N - num_rows * dist.get_rank(vocab_group)
    is_mine_N = (row_N >= 0) & (row_N < num_rows)
    chosen_N = shifted_NV.gather(1, row_N.clamp(0, num_rows - 1)[:, None])[:, 0] * is_mine_N
    both_2N = torch.stack([total_N, chosen_N])
    dist.all_reduce(both_2N, group=vocab_group)
    return both_2N[1] - both_2N[0].log()


def collapse_log_probs(log_probs_BL: Tensor, counts_BL: Tensor, how: Collapse) -> Tensor:
    """One score per sequence, or one per position.

    Args:
        log_probs_BL: What ``next_token_log_probs`` gives, in nat.
        counts_BL: Whether the token that is predicted at a position counts; padding and masked tokens do not.
        how: ``sum``: log-likelihood of the sequence; ``mean``: the same per token that counts, 0 if none does;
            ``per_token``: the values themselves, 0 where the token does not count.

    Returns:
        Float32 [B], or [B, L] for ``per_token``. Sums run in float64: a million terms lose no digit.
    """
    # where(), not a product: logits of padding may be anything, and 0 * nan is nan
    kept_BL = torch.where(counts_BL, log_probs_BL, 0.0)
    if how == "per_token":
        return kept_BL
    total_B = kept_BL.sum(-1, dtype=torch.float64)
    if how == "mean":
        total_B = total_B / counts_BL.sum(-1).clamp(min=1)
    return total_B.float()
