# SPDX-License-Identifier: Apache-2.0
"""What a head sees of a language model that does not learn: computed once for each sequence, however often it comes.

Shape legend: B sequences, L tokens, H channels of the backbone.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo2_megatron.model.pooling import without_padding

if TYPE_CHECKING:
    from evo2_megatron.model.head import StripedHyenaWithHead

_DIGEST_BYTES = 16

MAX_BYTES = 4 << 30
"""Most memory for what is kept: 560,000 sequences of the 1B model, 260,000 of the 7B."""


class FrozenFeatures:
    """Pooled hidden states of sequences, in this process's memory."""

    def __init__(self, model: StripedHyenaWithHead, *, max_bytes: int = MAX_BYTES) -> None:
        """Compute nothing yet.

        Args:
            model: Whose backbone has no parameter that learns.
            max_bytes: Once so much is kept, further sequences are computed whenever they come.
        """
        self._model = model
        self._known: dict[bytes, Tensor] = {}
        self._most = max_bytes // (4 * model.config.hidden_size)

    def __call__(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Float32 [B, H] on the model's device; call on all processes alike, which tell each other what they compute.

        Args:
            tokens_BL: Ids, int64 on the CPU.
            mask_BL: Bool, true where a base is.
        """
        keys = [_digest(tokens_L[mask_L]) for tokens_L, mask_L in zip(tokens_BL, mask_BL)]
        new = {key: row for row, key in enumerate(keys) if key not in self._known}
        computed = self._compute(tokens_BL, mask_BL, new)
        mine_BH = torch.stack([computed[key] if key in computed else self._known[key] for key in keys])
        for key, vector_H in self._shared(computed).items():
            if len(self._known) < self._most:
                self._known[key] = vector_H
        return mine_BH.to(next(self._model.parameters()).device)

    def _compute(self, tokens_BL: Tensor, mask_BL: Tensor, new: dict[bytes, int]) -> dict[bytes, Tensor]:
        if not new:
            return {}
        rows = list(new.values())
        device = next(self._model.parameters()).device
        for part in (self._model.embedding, self._model.decoder):
            part.eval()  # no dropout, no recomputation; nothing in them learns
        # samples are padded to the longest of all, and most are much shorter
        tokens_NL, mask_NL = without_padding(tokens_BL[rows], mask_BL[rows])
        pooled_NH = self._model.pooled_in_pieces(tokens_NL.to(device), mask_NL.to(device))
        # rows of their own: none keeps the others of its batch in memory
        return {key: vector_H.clone() for key, vector_H in zip(new, pooled_NH.cpu())}

    @staticmethod
    def _shared(computed: dict[bytes, Tensor]) -> dict[bytes, Tensor]:
        """What all processes have computed."""
        if torch.distributed.get_world_size() == 1:
            return computed
        of_all: list[dict[bytes, Tensor]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_all, computed)
        return {key: vector_H for of_one in of_all for key, vector_H in of_one.items()}


def _digest(bases_L: Tensor) -> bytes:
    return hashlib.blake2b(bases_L.numpy().tobytes(), digest_size=_DIGEST_BYTES).digest()
