# SPDX-License-Identifier: Apache-2.0
"""What Transformer Engine provides on a GPU, in plain torch: RMSNorm, norm fused with a linear layer, attention.

Parameter names are Transformer Engine's, so that checkpoints do not depend on where they were written.
Shape legend: L tokens, B batch, H channels, N heads, C channels per head, S tokens of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


def _norm_weight(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype))
    # its gradient is a sum over tokens, which sequence parallelism spreads over the tensor-parallel processes
    weight.sequence_parallel = config.sequence_parallel
    return weight


class RMSNorm(torch.nn.Module):
    """``y = w * x / sqrt(mean(x^2) + eps)``, statistics in float32 (the form of Transformer Engine)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = _norm_weight(config, hidden_size)
        self.eps = eps

    def forward(self, x_LBH: Tensor) -> Tensor:
        return F.rms_norm(x_LBH, (x_LBH.shape[-1],), self.weight, self.eps)


class RMSNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm of the input, then a column-parallel linear layer."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = _norm_weight(config, input_size)

    def forward(self, x_LBH: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        norm_LBH = F.rms_norm(x_LBH, (x_LBH.shape[-1],), self.layer_norm_weight, self.config.layernorm_epsilon)
        return super().forward(norm_LBH, *args, **kwargs)


def causal_attention(query_BNLC: Tensor, key_BNSC: Tensor, value_BNSC: Tensor, dropout: float = 0.0) -> Tensor:
    """Scaled dot-product attention in which the last query meets the last key.

    Args:
        query_BNLC: L queries, the last L positions of the S.
        key_BNSC: Keys of all positions up to the last query's.
        value_BNSC: Values of the same positions.
        dropout: Probability of dropping an attention weight.

    Returns:
        context_BNLC, in the dtype of the query.
    """
    L, S = query_BNLC.shape[2], key_BNSC.shape[2]
    if L == S:
        return F.scaled_dot_product_attention(query_BNLC, key_BNSC, value_BNSC, dropout_p=dropout, is_causal=True)
    # one query sees everything; several need the mask's diagonal to end in the lower right corner
    mask = None if L == 1 else causal_lower_right(L, S)
    return F.scaled_dot_product_attention(query_BNLC, key_BNSC, value_BNSC, attn_mask=mask, dropout_p=dropout)


class TorchCoreAttention(MegatronModule):
    """The ``core_attention`` of a Megatron attention layer on torch's own attention, which never holds L x L scores."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self" and softmax_scale is None and config.context_parallel_size == 1
        self.attn_mask_type = attn_mask_type

    def forward(
        self,
        query_LBNC: Tensor,
        key_SBNC: Tensor,
        value_SBNC: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend causally; returns context [L, B, N*C]."""
        assert (attn_mask_type or self.attn_mask_type) is AttnMaskType.causal
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        context_BNLC = causal_attention(
            query_LBNC.permute(1, 2, 0, 3),
            key_SBNC.permute(1, 2, 0, 3),
            value_SBNC.permute(1, 2, 0, 3),
            dropout=self.config.attention_dropout if self.training else 0.0,
        )
        return context_BNLC.permute(2, 0, 1, 3).flatten(2)
