# SPDX-License-Identifier: Apache-2.0
"""What the three Hyena operators have in common.

Shape legend: B batch, D channels, E = 3D projection rows, L tokens, K taps, P tokens of history, G filters.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo2_megatron.model.context_parallel import SplitSequence
from evo2_megatron.model.filters import INPUT_FILTER_LENGTH
from evo2_megatron.model.inference_state import FirState, ModalState
from evo2_megatron.model.sharded_parameters import ShardedParameters
from evo2_megatron.ops.backends import PLAIN, compiled_kernels
from evo2_megatron.ops.causal_conv import causal_conv_step, last_inputs

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider


def streams(f_BEx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Post-gate, pre-gate and value of every channel: the projection's rows interleave them with period 3."""
    # not three slices: the gradient of each would be a whole tensor, mostly of zeros
    return f_BEx.unflatten(1, (-1, 3)).unbind(2)


class HyenaOperator(ShardedParameters):
    """A causal convolution of the gated value, ``Op`` in ``y = post_gate * Op(pre_gate * value)``."""

    def __init__(self, config: StripedHyenaProvider) -> None:
        super().__init__(config)
        self.num_channels = config.hidden_size // self.tp_group.size()
        self.kernels = compiled_kernels() if config.use_subquadratic_ops else PLAIN

    def per_channel(self, filter_G: Tensor) -> Tensor:
        """Repeat the filter of each group for its channels; groups are contiguous."""
        # not repeat_interleave, whose gradient on a CPU adds up row by row
        repeats = self.num_channels // filter_G.shape[0]
        return filter_G[:, None].expand(-1, repeats, *filter_G.shape[1:]).flatten(0, 1)

    @abstractmethod
    def forward(self, u_BEL: Tensor, input_taps_EK: Tensor, split: SplitSequence | None = None) -> Tensor:
        """Input convolution, gates and operator on whole sequences; differentiable.

        Args:
            u_BEL: Projection rows, three per channel.
            input_taps_EK: Taps of the input convolution.
            split: Where what came before the L tokens is, if they are chunks of longer sequences.

        Returns:
            y_BDL, ready for the output projection.
        """

    @abstractmethod
    def new_state(self, batch_size: int) -> FirState | ModalState:
        """The state before the first token."""

    @abstractmethod
    def derived_filter(self) -> tuple[Tensor, ...]:
        """The filter as the two methods below take it."""

    @abstractmethod
    def extend(self, x_BDL: Tensor, filter: tuple[Tensor, ...], state: FirState | ModalState) -> Tensor:
        """Convolve L more tokens and bring ``state`` up to date in place."""

    @abstractmethod
    def step(self, x_BD: Tensor, filter: tuple[Tensor, ...], state: FirState | ModalState) -> Tensor:
        """Convolve one more token and bring ``state`` up to date in place."""


class ExplicitOperator(HyenaOperator):
    """A finite filter per channel, and a skip term ``skip * x`` where the variant has one."""

    num_taps: int

    @abstractmethod
    def taps_DK(self) -> Tensor:
        """Taps per channel in correlation order: the last meets the current token."""

    @abstractmethod
    def skip_D(self) -> Tensor | None:
        """Gain of the direct path."""

    def taps_with_skip_DK(self) -> Tensor:
        """The skip term is one more term at lag 0: adding it to that tap, in float32, saves a pass over the signal."""
        taps_DK, skip_D = self.taps_DK().float(), self.skip_D()
        if skip_D is None:
            return taps_DK
        return torch.cat([taps_DK[:, :-1], taps_DK[:, -1:] + skip_D.float()[:, None]], dim=1)

    def forward(self, u_BEL: Tensor, input_taps_EK: Tensor, split: SplitSequence | None = None) -> Tensor:
        taps_DK = self.taps_with_skip_DK()

        def conv(u_BEL: Tensor) -> Tensor:
            return self.kernels.gated_conv(u_BEL, input_taps_EK, taps_DK)

        if split is None:
            return conv(u_BEL)
        return split.convolve(conv, u_BEL, INPUT_FILTER_LENGTH - 1 + self.num_taps - 1)

    def new_state(self, batch_size: int) -> FirState:
        shape = (batch_size, self.num_channels, self.num_taps - 1)
        return FirState(torch.zeros(shape, dtype=self.config.params_dtype, device=next(self.parameters()).device))

    def derived_filter(self) -> tuple[Tensor, ...]:
        return (self.taps_with_skip_DK(),)

    def extend(self, x_BDL: Tensor, filter: tuple[Tensor, ...], state: FirState) -> Tensor:
        y_BDL = self.kernels.causal_conv(x_BDL, *filter, state.inputs_BDP)
        state.inputs_BDP.copy_(last_inputs(x_BDL, self.num_taps - 1, state.inputs_BDP))
        return y_BDL

    def step(self, x_BD: Tensor, filter: tuple[Tensor, ...], state: FirState) -> Tensor:
        return causal_conv_step(x_BD, *filter, state.inputs_BDP)
