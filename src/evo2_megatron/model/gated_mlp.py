# SPDX-License-Identifier: Apache-2.0
"""The gated MLP, and which activation its gate has.

Arc's models lost the gate's GELU in every layer but the first while they were trained, and keep it so; NVIDIA's
variants have it everywhere, in the tanh form.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from evo2_megatron.model.layer_specs import layer_modules

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider


def _identity(x: Tensor) -> Tensor:
    return x


class GatedMLP(MLP):
    """``W2 (g(W1 x) * V1 x)``: rows [0, F) of ``linear_fc1`` are the gate, rows [F, 2F) the linear half."""

    def __init__(self, config: StripedHyenaProvider, **kwargs: Any) -> None:
        modules = layer_modules(config)
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=modules.norm_column_linear, linear_fc2=modules.row_linear),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=config.process_groups().tp,
            **kwargs,
        )
        self.gate_function = F.gelu

    def set_layer_number(self, layer_number: int) -> None:
        """Choose the gate's activation by the layer's global number, counted from 1."""
        if not self.config.remove_activation_post_first_layer:
            self.gate_function = functools.partial(F.gelu, approximate="tanh")
        elif layer_number > 1:
            self.gate_function = _identity

    def forward(self, x_LBH: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        gate_up, _ = self.linear_fc1(x_LBH)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.linear_fc2(self.gate_function(gate) * up)
