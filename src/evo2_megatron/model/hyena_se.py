# SPDX-License-Identifier: Apache-2.0
"""Hyena-SE: short explicit filters of 7 taps, shared within groups of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from evo2_megatron.model.filters import SE_FILTER_LENGTH, DepthwiseFilter, uniform_
from evo2_megatron.model.operator import ExplicitOperator

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider


class HyenaSE(ExplicitOperator):
    """Layer symbol ``S``. NVIDIA's variants add a skip term with one gain per group."""

    num_taps = SE_FILTER_LENGTH

    def __init__(self, config: StripedHyenaProvider) -> None:
        super().__init__(config)
        num_groups = config.num_groups_hyena_short
        self.short_conv = DepthwiseFilter(config, num_groups, 1, SE_FILTER_LENGTH)
        self.conv_bias = None
        if config.use_short_conv_bias:
            self.conv_bias = self.new_parameter(
                num_groups, init=lambda x: uniform_(x, SE_FILTER_LENGTH), dtype=config.params_dtype
            )

    def taps_DK(self) -> Tensor:
        return self.per_channel(self.short_conv())

    def skip_D(self) -> Tensor | None:
        return None if self.conv_bias is None else self.per_channel(self.conv_bias)
