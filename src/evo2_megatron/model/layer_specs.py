# SPDX-License-Identifier: Apache-2.0
"""Which module class fills which slot of a layer, with and without Transformer Engine, and with weights in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from evo2_megatron.model.quantized_linear import QuantizedRMSNormColumnLinear, QuantizedRowLinear
from evo2_megatron.model.torch_modules import RMSNorm, RMSNormColumnLinear, RowLinear, TorchCoreAttention
from evo2_megatron.runtime.megatron import have_transformer_engine

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider


class LayerModules(NamedTuple):
    """Classes with Megatron's constructor signatures."""

    norm: type
    """Stand-alone RMSNorm."""

    norm_column_linear: type
    """RMSNorm and a linear layer split by output rows."""

    row_linear: type
    """Linear layer split by input columns."""

    core_attention: type


def uses_transformer_engine(config: StripedHyenaProvider) -> bool:
    """Whether a model's norms, linear layers and attention are Transformer Engine's: where it is, in 16 bits and less.

    It multiplies float32 in TF32, and of attention in float32 it has only the form that holds all L x L scores.
    """
    return have_transformer_engine() and config.params_dtype != torch.float32


def layer_modules(config: StripedHyenaProvider) -> LayerModules:
    """The classes for a model on this machine; quantized linear layers are the same on any device."""
    plain = _layer_modules(config)
    if config.quantize_weights == "none":
        return plain
    return plain._replace(norm_column_linear=QuantizedRMSNormColumnLinear, row_linear=QuantizedRowLinear)


def _layer_modules(config: StripedHyenaProvider) -> LayerModules:
    if uses_transformer_engine(config):
        from megatron.core.extensions import transformer_engine as te

        return LayerModules(
            te.TENorm, te.TELayerNormColumnParallelLinear, te.TERowParallelLinear, te.TEDotProductAttention
        )
    return LayerModules(RMSNorm, RMSNormColumnLinear, RowLinear, TorchCoreAttention)
