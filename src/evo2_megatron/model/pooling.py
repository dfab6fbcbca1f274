# SPDX-License-Identifier: Apache-2.0
"""One vector for each sequence out of the hidden states of its tokens, which may come piece by piece.

Shape legend: B sequences, S tokens, C tokens of a piece, H hidden channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pooling = Literal["mean", "last"]


def without_padding(*values_BS: Tensor, mask: Tensor) -> list[Tensor]:
    """All as long as the longest sequence: what is beyond its last base, by the mask [B, S], is padding in all."""
    length = int(mask.any(0).nonzero().max()) + 1
    return [value_BS[:, :length] for value_BS in values_BS]


class Pool:
    """Adds up a mean over the tokens that count."""

    def __init__(self, mask_BS: Tensor, how: Pooling | range) -> None:
        """Begin with nothing.

        Args:
            mask_BS: Not 0 where a base is.
            how: ``mean`` over the bases; ``last``: the last base's, the only one that has seen all others; or the mean
                over those with these numbers, counted from 1. Where none of them is, the vector is 0.
        """
        # bases counted from 1: a token in front and masked tags are none
        is_base_BS = mask_BS > 0
        number_BS = is_base_BS.cumsum(1) * is_base_BS
        if how == "last":
            kept_BS = is_base_BS & (number_BS == number_BS.amax(1, keepdim=True))
        elif how == "mean":
            kept_BS = is_base_BS
        else:
            kept_BS = is_base_BS & (number_BS >= how.start) & (number_BS < how.stop)
        self._weight_BS = kept_BS / kept_BS.sum(1, keepdim=True).clamp(min=1)
        self.vector_BH: Tensor | None = None
        """Float32, of the pieces that were added."""

    def add(self, start: int, hidden_BCH: Tensor) -> None:
        """Count the hidden states, of any float dtype, of the tokens from ``start`` on."""
        weight_BC = self._weight_BS[:, start : start + hidden_BCH.shape[1]]
        # padding has no say, whatever is there: 0 * nan is nan
        kept_BCH = torch.where(weight_BC[..., None] > 0, hidden_BCH, 0.0)
        part_BH = torch.einsum("bc,bch->bh", weight_BC, kept_BCH.float())
        self.vector_BH = part_BH if self.vector_BH is None else self.vector_BH + part_BH
