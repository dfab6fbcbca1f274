# SPDX-License-Identifier: Apache-2.0
"""Hyena-LI: long implicit filters, a sum of 16 decaying exponentials for every channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo2_megatron.model.context_parallel import SplitSequence
from evo2_megatron.model.filters import INPUT_FILTER_LENGTH, NUM_MODES, ModalFilter, uniform_
from evo2_megatron.model.inference_state import ModalState
from evo2_megatron.model.operator import HyenaOperator, streams
from evo2_megatron.ops.modal import modal_conv, modal_state, modal_step

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider


class HyenaLI(HyenaOperator):
    """Layer symbol ``H``: as long as the sequence, with a state of fixed size, and a skip term."""

    def __init__(self, config: StripedHyenaProvider) -> None:
        super().__init__(config)
        self.conv_bias = self.new_parameter(
            config.hidden_size, init=lambda x: uniform_(x, config.seq_length), dtype=config.params_dtype
        )
        self.filter = ModalFilter(config)

    def derived_filter(self) -> tuple[Tensor, ...]:
        """Log-poles [D, M], residues [D, M] and skip gains [D], float32; poles [D, M] for single steps."""
        log_pole_DM, residue_DM = map(self.per_channel, self.filter())
        return log_pole_DM, residue_DM, self.conv_bias.float(), log_pole_DM.exp()

    def forward(self, u_BEL: Tensor, input_taps_EK: Tensor, split: SplitSequence | None = None) -> Tensor:
        log_pole_DM, residue_DM, skip_D, _ = self.derived_filter()

        def input_conv(u_BEL: Tensor) -> Tensor:
            return self.kernels.causal_conv(u_BEL, input_taps_EK, None)

        f_BEL = input_conv(u_BEL) if split is None else split.convolve(input_conv, u_BEL, INPUT_FILTER_LENGTH - 1)
        post_gate, pre_gate, value = streams(f_BEL)
        x_BDL, entering_BDM = pre_gate * value, None
        if split is not None:
            entering_BDM = split.entering_states(modal_state(x_BDL, log_pole_DM), log_pole_DM, x_BDL.shape[-1])
        # with what enters, and its gradient, only the plain form
        conv = self.kernels.modal_conv if split is None else modal_conv
        return post_gate * conv(x_BDL, log_pole_DM, residue_DM, skip_D, entering_BDM).y_BDL

    def new_state(self, batch_size: int) -> ModalState:
        shape = (batch_size, self.num_channels, NUM_MODES)
        return ModalState(torch.zeros(shape, dtype=torch.float32, device=self.conv_bias.device))

    def extend(self, x_BDL: Tensor, filter: tuple[Tensor, ...], state: ModalState) -> Tensor:
        log_pole_DM, residue_DM, skip_D, _ = filter
        y_BDL, modes_BDM = self.kernels.modal_conv(x_BDL, log_pole_DM, residue_DM, skip_D, state.modes_BDM)
        state.modes_BDM.copy_(modes_BDM)
        return y_BDL

    def step(self, x_BD: Tensor, filter: tuple[Tensor, ...], state: ModalState) -> Tensor:
        _, residue_DM, skip_D, pole_DM = filter
        return modal_step(x_BD, pole_DM, residue_DM, skip_D, state.modes_BDM)
