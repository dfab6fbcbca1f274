# SPDX-License-Identifier: Apache-2.0
"""Hyena-MR: medium filters of 128 taps, regularised by a decay, shared within groups of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from evo2_megatron.model.filters import MR_FILTER_LENGTH, DecayedFilter, uniform_
from evo2_megatron.model.operator import ExplicitOperator

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider


class HyenaMR(ExplicitOperator):
    """Layer symbol ``D``, with a skip term of one gain per channel."""

    num_taps = MR_FILTER_LENGTH

    def __init__(self, config: StripedHyenaProvider) -> None:
        super().__init__(config)
        self.conv_bias = self.new_parameter(
            config.hidden_size, init=lambda x: uniform_(x, MR_FILTER_LENGTH), dtype=config.params_dtype
        )
        self.filter = DecayedFilter(config)

    def taps_DK(self) -> Tensor:
        # stored in lag order, wanted in correlation order
        return self.per_channel(self.filter().flip(1))

    def skip_D(self) -> Tensor:
        return self.conv_bias
