# SPDX-License-Identifier: Apache-2.0
"""The Hyena input projection with both operands in 8 bits: rounded, on any device, or multiplied as such.

``y = round(norm(x) * s_x) round(W * s_w)^T / (s_x * s_w)``, with fixed scales s_x and s_w. They are fixed in
Transformer Engine's delayed scaling, too, when no gradients are computed. A scale made from the tensor at hand would
let a score depend on what else is in its batch, on padding and on how a sequence is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from evo2_megatron.model.torch_modules import RMSNormColumnLinear
from evo2_megatron.ops.fp8 import e4m3_matmul, remaining_factor, round_scaled, to_e4m3


class Scales(NamedTuple):
    """Factors that take the operands of one layer's projection into the range of e4m3, both above 0."""

    input: float = 1.0
    weight: float = 1.0


class E4M3ColumnLinear(RMSNormColumnLinear):
    """``RMSNormColumnLinear`` whose matrix product sees nothing but e4m3 values; sums and output as without."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.bias is None
        self.scales = Scales()
        self._weight_is_rounded = False

    def product(self, norm_LBH: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = self.weight if self._weight_is_rounded else round_scaled(self.weight, self.scales.weight)
        y_LBE, bias = super().product(round_scaled(norm_LBH, self.scales.input), weight)
        factor = remaining_factor(self.scales.input) * remaining_factor(self.scales.weight)
        return (y_LBE if factor == 1.0 else y_LBE * factor), bias

    @torch.no_grad()
    def round_weight(self) -> None:
        """Round the weight itself, once, for a model that will not be trained; the output stays the same."""
        self.weight.copy_(round_scaled(self.weight, self.scales.weight))
        self._weight_is_rounded = True


class ScaledColumnLinear(RMSNormColumnLinear):
    """The same product by the device's 8-bit units; for a loaded model that will not be trained.

    Sums are those of the device: on Hopper short ones, as when the models were trained.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.bias is None
        self.scales = Scales()
        # on the device: a copy from the host for every product would be waited for
        self.register_buffer("scale_2", torch.ones(2), persistent=False)

    def product(self, norm_LBH: Tensor) -> tuple[Tensor, None]:
        assert self.weight.dtype == torch.float8_e4m3fn, "round_weight comes first"
        if self.sequence_parallel and self.tp_group.size() > 1:
            norm_LBH = gather_from_sequence_parallel_region(norm_LBH, group=self.tp_group)
        y_TE = e4m3_matmul(norm_LBH.flatten(0, 1), self.weight, *self.scale_2)
        return y_TE.unflatten(0, norm_LBH.shape[:2]), None

    @torch.no_grad()
    def round_weight(self) -> None:
        """Keep the weight in 8 bits from now on; half of what it takes in 16 bits."""
        self.scale_2 = self.weight.new_tensor(self.scales, dtype=torch.float32)
        self.weight = torch.nn.Parameter(to_e4m3(self.weight, self.scales.weight), requires_grad=False)


def fix_projections(model: torch.nn.Module, scales: Mapping[int, Scales]) -> None:
    """Give the 8-bit projections of a loaded model their scales, and round their weights for good.

    Args:
        model: With ``decoder.layers``, of which this process may have some only; adapters may wrap a projection.
        scales: By number of the layer, counted from 0; layers without keep a scale of 1.
    """
    for layer in model.decoder.layers:
        for module in layer.modules():
            if isinstance(module, E4M3ColumnLinear | ScaledColumnLinear):
                module.scales = scales.get(layer.layer_number - 1, Scales())
                module.round_weight()
