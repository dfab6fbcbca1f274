# SPDX-License-Identifier: Apache-2.0
"""Megatron's self-attention, with a declared cache for prefill and decoding.

Shape legend: L new tokens, B batch, H channels, N heads, C channels per head, S all tokens so far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd, apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from evo2_megatron.config import UserError
from evo2_megatron.model.gated_mlp import GatedMLP
from evo2_megatron.model.inference_state import InferenceState, KeyValueState
from evo2_megatron.model.layer_specs import layer_modules
from evo2_megatron.model.torch_modules import causal_attention, one_query_attention

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider

_MOST_NUMBERS = 2**31 - 1
"""That Transformer Engine 2.11's rotary embedding can count; beyond, it would read and write elsewhere."""


class CachedSelfAttention(SelfAttention):
    """Core's SelfAttention; given an InferenceState it attends to the cached keys as well.

    Core's own static cache stores keys before the rotary embedding and rotates all of them again for every token.
    """

    def new_state(self, batch_size: int, max_tokens: int) -> KeyValueState:
        """An empty cache, in the dtype of the model and on the device of the weights."""
        weight = next(self.linear_qkv.parameters())  # a layer with an adapter has no attribute ``weight``
        options = {"dtype": self.config.params_dtype, "device": weight.device}
        shape = (batch_size, self.num_query_groups_per_partition, max_tokens, self.hidden_size_per_attention_head)
        return KeyValueState(torch.zeros(shape, **options), torch.zeros(shape, **options))

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Core's; UserError where a process has more of them at a time than can be rotated."""
        query_LBNC, key_LBNC, *others = super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        if self.config.apply_rope_fusion and len(query_LBNC) * query_LBNC.stride(0) > _MOST_NUMBERS:
            if query_LBNC.numel() > _MOST_NUMBERS:
                L, B = query_LBNC.shape[:2]
                raise UserError(
                    f"{L} tokens of {B} sequence(s) are more than Transformer Engine's rotary embedding can count; "
                    "lower --chunk-length, or use more tensor- or context-parallel processes"
                )
            # not views of what the projection gives for all three, which is three times as much to count
            query_LBNC, key_LBNC = query_LBNC.contiguous(), key_LBNC.contiguous()
        return query_LBNC, key_LBNC, *others

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        inference_context: InferenceState | None = None,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend causally.

        Args:
            hidden_states: [L, B, H], before the fused norm.
            inference_context: What the layers have seen so far; None for training and scoring.
            rotary_pos_emb: Angles of the new tokens, [L, 1, 1, C], or [1, B, 1, C] where sequences differ in length.

        Returns:
            Output [L, B, H] and its bias [H] or None, not yet added.
        """
        if inference_context is None:
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        query_LBNC, key_LBNC, value_LBNC = self.get_query_key_value_tensors(hidden_states)
        key_BNSC, value_BNSC = self._remember(key_LBNC, value_LBNC, rotary_pos_emb, inference_context)
        query_BNLC = self._rotate(query_LBNC, rotary_pos_emb).permute(1, 2, 0, 3)
        seen_B = inference_context.seen_B
        if seen_B is None:
            context_BNLC = causal_attention(query_BNLC, key_BNSC, value_BNSC)
        else:
            context_BNLC = one_query_attention(query_BNLC, key_BNSC, value_BNSC, seen_B + 1)
        return self.linear_proj(context_BNLC.permute(2, 0, 1, 3).flatten(2))

    def see(self, hidden_states: Tensor, rotary_pos_emb: Tensor, inference_context: InferenceState) -> None:
        """Keep keys and values of tokens whose output nobody needs; arguments as for ``forward``."""
        _, key_LBNC, value_LBNC = self.get_query_key_value_tensors(hidden_states)
        self._remember(key_LBNC, value_LBNC, rotary_pos_emb, inference_context)

    def _remember(
        self, key_LBNC: Tensor, value_LBNC: Tensor, rotary_pos_emb: Tensor, inference_context: InferenceState
    ) -> tuple[Tensor, Tensor]:
        """Put new keys and values into the cache; all of them so far, [B, N, S, C]."""
        key_LBNC = self._rotate(key_LBNC, rotary_pos_emb)
        key_BNLC, value_BNLC = (x.permute(1, 2, 0, 3) for x in (key_LBNC, value_LBNC))
        cache = inference_context.layers[self.layer_number]
        return cache.append(key_BNLC, value_BNLC, inference_context.num_before, inference_context.seen_B)

    def _rotate(self, x_LBNC: Tensor, angles: Tensor) -> Tensor:
        if angles.shape[1] == 1:
            return apply_rotary_pos_emb(x_LBNC, angles, config=self.config, cp_group=self.pg_collection.cp)
        # the fused kernel, and core's check of its arguments, know one angle for the whole batch
        return _apply_rotary_pos_emb_bshd(x_LBNC, angles, rotary_interleaved=self.config.rotary_interleaved)


class AttentionLayer(TransformerLayer):
    """Megatron's layer, which can also just look on."""

    def see(self, hidden_states: Tensor, rotary_pos_emb: Tensor, inference_context: InferenceState) -> None:
        """Bring the cache up to date with tokens whose output nobody needs."""
        self.self_attention.see(hidden_states.to(self.config.params_dtype), rotary_pos_emb, inference_context)


def attention_layer_spec(config: StripedHyenaProvider) -> ModuleSpec:
    """An ``AttentionLayer``: causal self-attention and a gated MLP, each behind its fused norm."""
    modules = layer_modules(config)
    return ModuleSpec(
        module=AttentionLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=CachedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=modules.norm_column_linear,
                    core_attention=modules.core_attention,
                    linear_proj=_with_bias(modules.row_linear) if config.add_attn_proj_bias else modules.row_linear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=GatedMLP,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _with_bias(row_linear: type) -> type:
    class BiasedRowParallelLinear(row_linear):
        """Megatron asks for ``bias=config.add_bias_linear``, one switch for all layers; this one always has a bias."""

        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    return BiasedRowParallelLinear
