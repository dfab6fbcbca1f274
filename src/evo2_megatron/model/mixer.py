# SPDX-License-Identifier: Apache-2.0
"""The Hyena mixer: projection, input convolution, gates around an operator, projection back.

``y = W_o (post_gate * Op(pre_gate * value)) + b_o``, where projection rows 3c, 3c + 1 and 3c + 2 are channel c's
post-gate, pre-gate and value.
Shape legend: L tokens, B batch, H hidden channels, D this process's channels, E = 3D projection rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from evo2_megatron.model.context_parallel import SplitSequence
from evo2_megatron.model.filters import INPUT_FILTER_LENGTH, DepthwiseFilter
from evo2_megatron.model.fp8_linear import E4M3ColumnLinear, ScaledColumnLinear
from evo2_megatron.model.hyena_li import HyenaLI
from evo2_megatron.model.hyena_mr import HyenaMR
from evo2_megatron.model.hyena_se import HyenaSE
from evo2_megatron.model.inference_state import FirState, HyenaState
from evo2_megatron.model.layer_specs import layer_modules
from evo2_megatron.model.operator import streams
from evo2_megatron.ops.causal_conv import causal_conv_step
from evo2_megatron.ops.fused_conv import gated_operator

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider

_OPERATORS = {"S": HyenaSE, "D": HyenaMR, "H": HyenaLI}


class HyenaMixer(MegatronModule):
    """The sequence-mixing half of a Hyena layer; the input norm is fused into ``dense_projection``."""

    def __init__(self, config: StripedHyenaProvider, symbol: str) -> None:
        super().__init__(config=config)
        modules = layer_modules(config)
        groups = config.process_groups()
        hidden, tp_group = config.hidden_size, groups.tp
        self._split = SplitSequence(groups.cp) if groups.cp.size() > 1 else None
        linear = {"config": config, "is_expert": False, "tp_group": tp_group}
        norm_column_linear = modules.norm_column_linear
        if config.fp8_emulation or config.fp8_projections:
            norm_column_linear = E4M3ColumnLinear if config.fp8_emulation else ScaledColumnLinear
        self.dense_projection = norm_column_linear(
            hidden,
            3 * hidden,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            # Transformer Engine overlaps communication for four names; an attention layer's have these shapes
            tp_comm_buffer_name="qkv",
            **linear,
        )
        self.dense_projection.feeds_convolution = True
        self.hyena_proj_conv = DepthwiseFilter(config, 3 * hidden, INPUT_FILTER_LENGTH)
        self.mixer = _OPERATORS[symbol](config)
        self.dense = modules.row_linear(
            hidden,
            hidden,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            bias=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **linear,
        )

    def forward(self, x_LBH: Tensor, state: HyenaState | None = None) -> tuple[Tensor, Tensor]:
        """Mix along the sequence.

        Args:
            x_LBH: Residual stream (its sequence may be split by sequence parallelism).
            state: What came before, brought up to date in place; None: nothing came before, and nothing is kept.

        Returns:
            Output [L, B, H] and the bias [H], not yet added.
        """
        u_LBE, _ = self.dense_projection(x_LBH)
        if self._split is not None:
            assert state is None, "a sequence that is split over processes has no caches"
            y_CDl = self.mixer(self._split.to_chunks(u_LBE), self.hyena_proj_conv(), self._split)
            return self.dense(self._split.from_chunks(y_CDl))
        if state is None:
            y_BDL = self.mixer(u_LBE.permute(1, 2, 0), self.hyena_proj_conv())
        else:
            y_BDL = self._go_on(u_LBE, state)
        y_LBD = y_BDL.permute(2, 0, 1)
        # products on a CPU take either layout
        return self.dense(y_LBD if y_LBD.device.type == "cpu" else y_LBD.contiguous())

    def see(self, x_LBH: Tensor, state: HyenaState) -> None:
        """Bring ``state`` up to date, and no more."""
        self._go_on(self.dense_projection(x_LBH)[0], state)

    def _go_on(self, u_LBE: Tensor, state: HyenaState) -> Tensor:
        if u_LBE.shape[0] == 1:
            return self._step(u_LBE[0], state)[..., None]
        return self._extend(u_LBE.permute(1, 2, 0), state)

    def _extend(self, u_BEL: Tensor, state: HyenaState) -> Tensor:
        def operator(x_BDL: Tensor, channels: slice) -> Tensor:
            of_channels = tuple(part[channels] for part in state.operator_filter)
            return self.mixer.extend(x_BDL, of_channels, state.operator.channels(channels))

        return gated_operator(u_BEL, state.input_taps_EK, operator, state.input_conv.inputs_BDP)

    def _step(self, u_BE: Tensor, state: HyenaState) -> Tensor:
        f_BE = causal_conv_step(u_BE, state.input_taps_EK, state.input_conv.inputs_BDP)
        post_gate, pre_gate, value = streams(f_BE)
        return post_gate * self.mixer.step(pre_gate * value, state.operator_filter, state.operator)

    def new_state(self, batch_size: int) -> HyenaState:
        """The state before the first token, with the filters as they are now."""
        taps_EK = self.hyena_proj_conv()
        shape = (batch_size, taps_EK.shape[0], INPUT_FILTER_LENGTH - 1)
        return HyenaState(
            input_conv=FirState(torch.zeros(shape, dtype=self.config.params_dtype, device=taps_EK.device)),
            operator=self.mixer.new_state(batch_size),
            input_taps_EK=taps_EK.detach().float(),
            operator_filter=tuple(part.detach() for part in self.mixer.derived_filter()),
        )
