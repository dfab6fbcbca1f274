# SPDX-License-Identifier: Apache-2.0
"""What a head sees of a language model that does not learn: computed once for each sequence, however often it comes.

Shape legend: B sequences, L tokens, F channels that the head sees.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evo2_megatron.model.pooling import without_padding

if TYPE_CHECKING:
    from evo2_megatron.model.head import StripedHyenaWithHead

_DIGEST_BYTES = 16

MAX_BYTES = 4 << 30
"""Most memory for what is kept: 560,000 sequences of the 1B model, 260,000 of the 7B; or 524,000 bases of the 7B, half
as many where the head sees both sides."""


class FrozenFeatures:
    """Hidden states of sequences, pooled or of each base, in this process's memory."""

    def __init__(self, model: StripedHyenaWithHead, *, max_bytes: int = MAX_BYTES) -> None:
        """Compute nothing yet.

        Args:
            model: Whose backbone has no parameter that learns.
            max_bytes: Once so much is kept, further sequences are computed whenever they come.
        """
        self._model = model
        self._known: dict[bytes, Tensor] = {}
        self._room = max_bytes

    def __call__(self, tokens_BL: Tensor, mask_BL: Tensor, opposite_BL: Tensor | None = None) -> Tensor:
        """[B, F], or of each base [B, L of the longest, F], on the model's device.

        Call it on all processes alike: pooled vectors they tell each other. Hidden states of bases are too many.

        Args:
            tokens_BL: Ids, int64 on the CPU.
            mask_BL: Bool, true where a base is.
            opposite_BL: Ids of the reverse complement, if the head sees both sides.
        """
        keys = [_digest(tokens_L[mask_L]) for tokens_L, mask_L in zip(tokens_BL, mask_BL)]
        new = {key: row for row, key in enumerate(keys) if key not in self._known}
        computed = self._compute([tokens_BL, mask_BL, *([] if opposite_BL is None else [opposite_BL])], new)
        mine = [computed[key] if key in computed else self._known[key] for key in keys]
        per_base = self._model.config.head_per_base
        for key, features in (computed if per_base else self._shared(computed)).items():
            if key not in self._known and features.nbytes <= self._room:
                self._known[key] = features
                self._room -= features.nbytes
        of_batch = nn.utils.rnn.pad_sequence(mine, batch_first=True) if per_base else torch.stack(mine)
        return of_batch.to(next(self._model.parameters()).device)

    def _compute(self, inputs: list[Tensor], new: dict[bytes, int]) -> dict[bytes, Tensor]:
        if not new:
            return {}
        rows = list(new.values())
        device = next(self._model.parameters()).device
        for part in (self._model.embedding, self._model.decoder):
            part.eval()  # no dropout, no recomputation; nothing in them learns
        # samples are padded to the longest of all, and most are much shorter
        mask_NL = inputs[1][rows]
        of_new = without_padding(*(value_BL[rows] for value_BL in inputs), mask=mask_NL)
        features = self._model.features_in_pieces(*(value_NL.to(device) for value_NL in of_new)).cpu()
        lengths = mask_NL.sum(1).tolist()
        of_each = (row[:length] if self._model.config.head_per_base else row for row, length in zip(features, lengths))
        # of their own: none keeps the others of its batch in memory
        return {key: row.clone() for key, row in zip(new, of_each)}

    @staticmethod
    def _shared(computed: dict[bytes, Tensor]) -> dict[bytes, Tensor]:
        """What all processes have computed."""
        if torch.distributed.get_world_size() == 1:
            return computed
        of_all: list[dict[bytes, Tensor]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_all, computed)
        return {key: vector_F for of_one in of_all for key, vector_F in of_one.items()}


def _digest(bases_L: Tensor) -> bytes:
    return hashlib.blake2b(bases_L.numpy().tobytes(), digest_size=_DIGEST_BYTES).digest()
