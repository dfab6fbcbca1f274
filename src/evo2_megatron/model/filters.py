# SPDX-License-Identifier: Apache-2.0
"""Learned filters: plain taps, decayed taps, and sums of exponentials.

Attribute names are keys of every checkpoint. A filter is called as a module, so that hooks run before its parameters
are read: Megatron's wait for parameters that other processes still send (``--overlap-param-gather``).
Shape legend: G filters, K taps, M modes.
Initial values are those of StripedHyena 2 (arXiv 2503.01868) as trained by Savanna.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo2_megatron.model.sharded_parameters import ShardedParameters

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider

INPUT_FILTER_LENGTH = 3
"""Taps of the convolution before every operator."""

SE_FILTER_LENGTH = 7
"""Taps of a short explicit filter."""

MR_FILTER_LENGTH = 128
"""Taps of a medium regularised filter."""

NUM_MODES = 16
"""Exponentials in a long implicit filter."""

_MIN_GAMMA, _MAX_GAMMA = 0.01, 0.1


def uniform_(tensor: Tensor, fan: int) -> Tensor:
    """Fill from U(-1/sqrt(fan), 1/sqrt(fan)), torch's own choice for convolutions."""
    bound = 1 / math.sqrt(fan)
    return torch.nn.init.uniform_(tensor, -bound, bound)


class DepthwiseFilter(ShardedParameters):
    """Taps of a short causal filter in correlation order: the last tap meets the current token."""

    def __init__(self, config: StripedHyenaProvider, *shape: int) -> None:
        """``shape`` as in checkpoints: [G, K] for the input convolution, [G, 1, K] for the short operator."""
        super().__init__(config)
        # sic: the bound of a 3-tap filter, for the 7 taps of the short operator too
        self.short_conv_weight = self.new_parameter(
            *shape, init=lambda taps: uniform_(taps, INPUT_FILTER_LENGTH), dtype=config.params_dtype
        )

    def forward(self) -> Tensor:
        """The taps, [G, K]."""
        return self.short_conv_weight.flatten(1)


class DecayedFilter(ShardedParameters):
    """128 taps times a fixed exponential decay, in lag order: tap 0 meets the current token."""

    def __init__(self, config: StripedHyenaProvider) -> None:
        super().__init__(config)
        num_filters = config.num_groups_hyena_medium
        self.h = self.new_parameter(
            num_filters,
            MR_FILTER_LENGTH,
            init=lambda taps: torch.nn.init.normal_(taps, std=1e-5 / math.sqrt(MR_FILTER_LENGTH)),
            dtype=torch.float32,
        )
        rates = torch.logspace(-2, 2, num_filters)
        decay_GK = torch.exp(-rates[:, None] * torch.linspace(0, 1, MR_FILTER_LENGTH))
        size, rank = self.tp_group.size(), self.tp_group.rank()
        # a buffer, not a formula: the published models were trained with another time axis
        self.register_buffer("decay", decay_GK.chunk(size)[rank].to(self.h.device, copy=True))

    def forward(self) -> Tensor:
        """The taps, [G, K]: the product, formed in the storage dtype as in training."""
        return self.h * self.decay


class ModalFilter(ShardedParameters):
    """``h[t] = sum_m R[m] exp(log_pole[m] t)`` with real poles ``log_pole = -exp(p) exp(gamma) <= 0``."""

    def __init__(self, config: StripedHyenaProvider) -> None:
        super().__init__(config)
        shape = (config.num_groups_hyena, NUM_MODES)
        self.gamma = self.new_parameter(
            *shape, init=lambda x: torch.nn.init.uniform_(x, _MIN_GAMMA, _MAX_GAMMA).log_(), dtype=torch.float32
        )
        self.R = self.new_parameter(
            *shape, init=lambda x: torch.nn.init.normal_(x, std=0.1 / math.sqrt(NUM_MODES)), dtype=torch.float32
        )
        self.p = self.new_parameter(*shape, init=lambda x: torch.nn.init.constant_(x, -1.0), dtype=torch.float32)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Log-poles and residues, [G, M].

        Float32 whatever the storage: a pole near 1 decides what is remembered over thousands of tokens.
        """
        return -torch.exp(self.p.float()) * torch.exp(self.gamma.float()), self.R.float()
