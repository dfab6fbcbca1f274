# SPDX-License-Identifier: Apache-2.0
"""What Transformer Engine provides on a GPU, in plain torch: RMSNorm, norm fused with a linear layer, attention.

Parameter names are Transformer Engine's, so that checkpoints do not depend on where they were written.
Shape legend: L tokens, B batch, H channels, N heads, C channels per head, S tokens of keys and values.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from evo2_megatron.model.context_parallel import SplitSequence
from evo2_megatron.ops.int8 import row_blocks

_FEW_TOKENS = 8
"""Tokens up to which the product with a weight matrix takes as long as reading it."""

_LARGE_WEIGHT = 150_000
"""Numbers from which on reading a weight matrix takes longer than all else around the product."""

_WIDE_TOKENS = 8
"""Tokens from which on a CPU without arithmetic for bfloat16 is faster with weights made wide for them."""

_NORM_NUMBERS = 1 << 20
"""Numbers from which on a CPU norms without gradients go part by part, each of which stays in its cache."""

_NORM_PART = 1 << 16
"""Numbers of such a part."""

_MASKED_QUERIES = 512
"""Queries that attend together where some keys came before them all, at most."""

_MASKED_SCORES = 1 << 23
"""The same as queries x keys: what the mask for them holds on a CPU, 32 MiB in float32, whatever the length."""

_UNMASKED_QUERIES = 64
"""From here on, without gradients, a CPU attends to earlier keys and to the new ones in turn, and needs no mask."""


def _norm_weight(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    # where Megatron's own layers have theirs: a model computes before Bridge moves it to the GPU
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device))
    # its gradient is a sum over tokens, which sequence parallelism spreads over the tensor-parallel processes
    weight.sequence_parallel = config.sequence_parallel
    return weight


def rms_norm(x_LBH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """``y = w * x / sqrt(mean(x^2) + eps)`` as in Transformer Engine: statistics in float32, y in the dtype of x."""
    if x_LBH.is_cuda or x_LBH.is_meta:  # planning is for a GPU
        return F.rms_norm(x_LBH, (x_LBH.shape[-1],), weight_H, eps)
    if x_LBH.numel() <= _NORM_NUMBERS or torch.is_grad_enabled():
        return _rms_norm_in_steps(x_LBH, weight_H, eps)
    num_rows = max(1, _NORM_PART // x_LBH.shape[-1])
    parts = x_LBH.flatten(0, 1).split(num_rows)
    y_TH = x_LBH.new_empty(x_LBH.shape).flatten(0, 1)
    for part_RH, y_RH in zip(parts, y_TH.split(num_rows), strict=True):
        y_RH.copy_(_rms_norm_in_steps(part_RH, weight_H, eps))
    return y_TH.view(x_LBH.shape)


def _rms_norm_in_steps(x_LBH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    # torch has no fused kernel for the CPU: its own four steps take up to 14 times as long as these
    norm_LB1 = torch.linalg.vector_norm(
        x_LBH, dim=-1, keepdim=True, dtype=torch.promote_types(x_LBH.dtype, torch.float)
    )
    scale_LB1 = torch.rsqrt(norm_LB1.square() / x_LBH.shape[-1] + eps)
    return (x_LBH * scale_LB1 * weight_H).to(x_LBH.dtype)


class RMSNorm(torch.nn.Module):
    """``rms_norm`` with its weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = _norm_weight(config, hidden_size)
        self.eps = eps

    def forward(self, x_LBH: Tensor) -> Tensor:
        return rms_norm(x_LBH, self.weight, self.eps)


class ColumnLinear(ColumnParallelLinear):
    """Core's column-parallel layer; one process takes just the product, on a CPU or without gradients.

    Core's autograd functions around it cost a third of the time of decoding one token on a CPU, and they copy inputs
    and gradients whose channels lie apart, as those of a convolution do.
    """

    feeds_convolution = False
    """On a CPU, lay the tokens of a channel next to each other, as a convolution reads them.

    ``W x^T`` takes as long as ``x W^T``, and the copy from one layout to the other as long again, or ten times as long
    where the product is in bfloat16.
    """

    def forward(
        self, x_LBH: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if not _takes_just_the_product(self, x_LBH):
            return super().forward(x_LBH, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.feeds_convolution and x_LBH.device.type == "cpu" and len(x_LBH) > 1:
            assert self.bias is None
            return _product_by_channel(x_LBH, weight), None
        return _product(self, x_LBH, weight)


class RowLinear(RowParallelLinear):
    """Core's row-parallel layer, with the same short cut."""

    def forward(self, x_LBH: Tensor) -> tuple[Tensor, Tensor | None]:
        if not _takes_just_the_product(self, x_LBH):
            return super().forward(x_LBH)
        return _product(self, x_LBH, self.weight)


def _takes_just_the_product(layer: ColumnLinear | RowLinear, x_LBH: Tensor) -> bool:
    return layer.tp_group.size() == 1 and (x_LBH.device.type == "cpu" or not torch.is_grad_enabled())


def _product(layer: ColumnLinear | RowLinear, x_LBH: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    bias = None if layer.skip_bias_add else layer.bias
    # as a matrix, because of more dimensions torch would copy what is not contiguous
    x_TH = x_LBH.flatten(0, 1)
    reads_weights = len(x_TH) <= _FEW_TOKENS and weight.numel() >= _LARGE_WEIGHT
    if reads_weights and x_TH.dtype == torch.float32 and x_TH.device.type == "cpu":
        y_TD = _product_of_few(x_TH, weight, bias)
    elif len(x_TH) >= _WIDE_TOKENS and _wants_float32(x_TH, weight):
        y_TD = _product_in_float32(x_TH, weight, bias)
    else:
        y_TD = F.linear(x_TH, weight, bias)
    return y_TD.unflatten(0, x_LBH.shape[:2]), layer.bias if layer.skip_bias_add else None


def _product_by_channel(x_LBH: Tensor, weight_DH: Tensor) -> Tensor:
    """``F.linear`` as [L, B, D] in the memory of [D, B, L]."""
    num_tokens, num_sequences, num_channels = x_LBH.shape
    x_HT = x_LBH.transpose(0, 1).reshape(-1, num_channels).mT
    if x_HT.shape[1] >= _WIDE_TOKENS and _wants_float32(x_HT, weight_DH):
        y_DT = x_HT.new_empty(len(weight_DH), x_HT.shape[1])
        wide_HT = x_HT.float()
        for rows in row_blocks(weight_DH):
            y_DT[rows] = weight_DH[rows].float() @ wide_HT
    else:
        y_DT = weight_DH @ x_HT
    return y_DT.view(-1, num_sequences, num_tokens).permute(2, 1, 0)


def _product_of_few(x_TH: Tensor, weight_DH: Tensor, bias_D: Tensor | None) -> Tensor:
    """``F.linear`` as ``(W x^T)^T``: MKL then reads the weights two to four times as fast, from two columns on."""
    # a copy: of a view of one row, torch would make columns that lie apart, and the product takes four times as long
    x_HT = (x_TH.repeat(2, 1) if len(x_TH) == 1 else x_TH.contiguous()).mT
    # few numbers to copy; pipeline stages send only what is contiguous
    y_TD = torch.mm(weight_DH, x_HT).mT[: len(x_TH)].contiguous()
    return y_TD if bias_D is None else y_TD + bias_D


def _wants_float32(x_TH: Tensor, weight_DH: Tensor) -> bool:
    """Whether this CPU multiplies bfloat16 by taking every number apart; gradients go the usual way."""
    is_plain = x_TH.device.type == "cpu" and x_TH.dtype == weight_DH.dtype == torch.bfloat16
    return is_plain and not torch.is_grad_enabled() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _product_in_float32(x_TH: Tensor, weight_DH: Tensor, bias_D: Tensor | None) -> Tensor:
    """``F.linear`` of bfloat16, which is rounded once in the end, by float32 a block of rows at a time."""
    y_TD = x_TH.new_empty(len(x_TH), len(weight_DH))
    wide_TH = x_TH.float()
    for rows in row_blocks(weight_DH):
        y_TD[:, rows] = F.linear(wide_TH, weight_DH[rows].float(), None if bias_D is None else bias_D[rows].float())
    return y_TD


class RMSNormColumnLinear(ColumnLinear):
    """RMSNorm of the input, then a column-parallel linear layer."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = _norm_weight(config, input_size)
        self.return_layernorm_output = False
        """Return ``((output, normalised input), bias)``, as Transformer Engine's layer does for LoRA."""

    def forward(self, x_LBH: Tensor) -> tuple[Any, Tensor | None]:
        norm_LBH = rms_norm(x_LBH, self.layer_norm_weight, self.config.layernorm_epsilon)
        output, bias = self.product(norm_LBH)
        return ((output, norm_LBH), bias) if self.return_layernorm_output else (output, bias)

    def product(self, norm_LBH: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What follows the norm."""
        return super().forward(norm_LBH, weight)


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
    if L == 1:  # sees everything
        return F.scaled_dot_product_attention(query_BNLC, key_BNSC, value_BNSC, dropout_p=dropout)
    if L == S:
        return F.scaled_dot_product_attention(query_BNLC, key_BNSC, value_BNSC, dropout_p=dropout, is_causal=True)
    if query_BNLC.is_cuda or query_BNLC.is_meta:
        # a kernel of its own, which holds no mask. Planning, on no device, watches every operation, which torch's mask
        # object does not allow; memory and shape are the same
        options = {"is_causal": True} if query_BNLC.is_meta else {"attn_mask": causal_lower_right(L, S)}
        return F.scaled_dot_product_attention(query_BNLC, key_BNSC, value_BNSC, dropout_p=dropout, **options)
    if L >= _UNMASKED_QUERIES and not dropout and not torch.is_grad_enabled():
        return _earlier_and_new(query_BNLC, key_BNSC, value_BNSC)
    num_queries = min(_MASKED_QUERIES, L, max(32, _MASKED_SCORES // S))
    # the last columns of one mask serve all blocks: a tensor for each, a little larger every time, would leave gaps
    # in the heap that none of them fits into
    mask_QK = query_BNLC.new_zeros(num_queries, S + num_queries)
    mask_QK[:, S:] = query_BNLC.new_full((num_queries, num_queries), -math.inf).triu(1)
    context_BNLC = torch.empty_like(query_BNLC)
    for start in range(0, L, num_queries):
        part_BNLC = query_BNLC[:, :, start : start + num_queries]
        size = part_BNLC.shape[2]
        seen = S - L + start + size
        mask = mask_QK[:size, S + size - seen : S + size]
        context_BNLC[:, :, start : start + size] = F.scaled_dot_product_attention(
            part_BNLC, key_BNSC[:, :, :seen], value_BNSC[:, :, :seen], attn_mask=mask, dropout_p=dropout
        )
    return context_BNLC


def one_query_attention(query_BN1C: Tensor, key_BNSC: Tensor, value_BNSC: Tensor, num_keys_B: Tensor) -> Tensor:
    """Attention of each sequence's newest token to its first ``num_keys_B`` keys; context_BN1C."""
    mask_BS = torch.arange(key_BNSC.shape[2], device=num_keys_B.device) < num_keys_B[:, None]
    return F.scaled_dot_product_attention(query_BN1C, key_BNSC, value_BNSC, attn_mask=mask_BS[:, None, None])


def _earlier_and_new(query_BNLC: Tensor, key_BNSC: Tensor, value_BNSC: Tensor) -> Tensor:
    """``causal_attention`` of L < S queries as a mean of two, weighted by the sums of their exponentials.

    With a mask, a CPU takes 1.2 to 2.5 times as long for 4,128 queries and 8,192 keys. The operator is the one behind
    torch's own function, which does not return the sums; their gradient does not exist.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    num_earlier = key_BNSC.shape[2] - query_BNLC.shape[2]
    earlier_BNLC, log_earlier_BNL = attend(query_BNLC, key_BNSC[:, :, :num_earlier], value_BNSC[:, :, :num_earlier])
    new_BNLC, log_new_BNL = attend(
        query_BNLC, key_BNSC[:, :, num_earlier:], value_BNSC[:, :, num_earlier:], is_causal=True
    )
    share_BNL1 = torch.sigmoid(log_earlier_BNL - log_new_BNL)[..., None].to(new_BNLC.dtype)
    return new_BNLC.lerp_(earlier_BNLC, share_BNL1)


class TorchCoreAttention(MegatronModule):
    """The ``core_attention`` of a Megatron layer on torch's own attention, which never holds L x L scores."""

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
        assert attention_type == "self" and softmax_scale is None
        self.attn_mask_type = attn_mask_type
        group = config.process_groups().cp
        self._split = SplitSequence(group) if group.size() > 1 else None

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
        dropout = self.config.attention_dropout if self.training else 0.0
        ends = (key_SBNC.shape[0],)
        if self._split is not None:
            ends = self._split.ends(query_LBNC.shape[0] // 2)
            key_SBNC, value_SBNC = self._split.gather(key_SBNC), self._split.gather(value_SBNC)
        query_BNLC, key_BNSC, value_BNSC = (x.permute(1, 2, 0, 3) for x in (query_LBNC, key_SBNC, value_SBNC))
        with self._own_random_numbers() if dropout else contextlib.nullcontext():
            contexts = [
                causal_attention(part_BNLC, key_BNSC[:, :, :end], value_BNSC[:, :, :end], dropout)
                for part_BNLC, end in zip(query_BNLC.chunk(len(ends), dim=2), ends)
            ]
        context_BNLC = contexts[0] if len(contexts) == 1 else torch.cat(contexts, dim=2)
        return context_BNLC.permute(2, 0, 1, 3).flatten(2)

    def _own_random_numbers(self) -> contextlib.AbstractContextManager[object]:
        """For dropout, where processes have different heads; under sequence parallelism the whole stack has them."""
        if self.config.tensor_model_parallel_size > 1 and not self.config.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()
