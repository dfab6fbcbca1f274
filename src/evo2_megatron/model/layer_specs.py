# SPDX-License-Identifier: Apache-2.0
"""Which module class fills which slot of a layer, with and without Transformer Engine, and with weights in 8 bits."""

from __future__ import annotations

from typing import NamedTuple

from evo2_megatron.model.int8_linear import Int8RMSNormColumnLinear, Int8RowLinear
from evo2_megatron.model.torch_modules import RMSNorm, RMSNormColumnLinear, RowLinear, TorchCoreAttention
from evo2_megatron.runtime.megatron import have_transformer_engine


class LayerModules(NamedTuple):
    """Classes with Megatron's constructor signatures."""

    norm: type
    """Stand-alone RMSNorm."""

    norm_column_linear: type
    """RMSNorm and a linear layer split by output rows."""

    row_linear: type
    """Linear layer split by input columns."""

    core_attention: type


def layer_modules(*, int8_weights: bool = False) -> LayerModules:
    """The classes for this machine; ``int8_weights``: linear layers that are loaded to 8 bits, on any device."""
    plain = _layer_modules()
    if not int8_weights:
        return plain
    return plain._replace(norm_column_linear=Int8RMSNormColumnLinear, row_linear=Int8RowLinear)


def _layer_modules() -> LayerModules:
    if have_transformer_engine():
        from megatron.core.extensions import transformer_engine as te

        return LayerModules(
            te.TENorm, te.TELayerNormColumnParallelLinear, te.TERowParallelLinear, te.TEDotProductAttention
        )
    return LayerModules(RMSNorm, RMSNormColumnLinear, RowLinear, TorchCoreAttention)
