# SPDX-License-Identifier: Apache-2.0
"""One Hyena layer: mixer and gated MLP, each with a residual connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from evo2_megatron.model.gated_mlp import GatedMLP
from evo2_megatron.model.inference_state import HyenaState, InferenceState
from evo2_megatron.model.mixer import HyenaMixer

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider


class HyenaLayer(MegatronModule):
    """Layer symbols ``S``, ``D`` and ``H``."""

    def __init__(self, config: StripedHyenaProvider, symbol: str, layer_number: int) -> None:
        """``layer_number`` is global and counted from 1, as in Megatron."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.mixer = HyenaMixer(config, symbol)
        self.mlp = GatedMLP(config)
        self.mlp.set_layer_number(layer_number)

    def forward(self, hidden_states: Tensor, inference_context: InferenceState | None = None) -> Tensor:
        """Map the residual stream [L, B, H] to the next layer's."""
        state = None if inference_context is None else inference_context.layers[self.layer_number]
        hidden_states = self._add(self.mixer(hidden_states.to(self.config.params_dtype), state), hidden_states)
        return self._add(self.mlp(hidden_states.to(self.config.params_dtype)), hidden_states)

    def see(self, hidden_states: Tensor, rotary_pos_emb: Tensor, inference_context: InferenceState) -> None:
        """Bring the caches up to date with tokens whose output nobody needs."""
        self.mixer.see(hidden_states.to(self.config.params_dtype), inference_context.layers[self.layer_number])

    def _add(self, output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
        add = get_bias_dropout_add(self.training, self.config.bias_dropout_fusion)
        return add(output_and_bias, residual, self.config.hidden_dropout)

    def new_state(self, batch_size: int, max_tokens: int) -> HyenaState:
        """Empty caches; their size does not depend on ``max_tokens``."""
        return self.mixer.new_state(batch_size)
