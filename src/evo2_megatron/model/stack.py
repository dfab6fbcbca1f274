# SPDX-License-Identifier: Apache-2.0
"""The stack of layers that a pattern such as ``SDH*SDHSDH*`` spells out.

Shape legend: L tokens, B batch, H channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.enums import Fp8Recipe
from megatron.core.fp4_utils import get_fp4_context
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import WrappedTensor, make_viewless_tensor
from torch import Tensor, nn

from evo2_megatron.model.attention import attention_layer_spec
from evo2_megatron.model.inference_state import InferenceState
from evo2_megatron.model.layer import HyenaLayer
from evo2_megatron.model.layer_specs import layer_modules

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider


def stage_layers(num_layers: int, *, stage: int, num_stages: int) -> range:
    """Layers of a pipeline stage, counted from 0: contiguous, and of two sizes that differ by one.

    The larger stages are the last ones: an earlier stage holds the activations of more micro-batches.
    """
    size, num_larger = divmod(num_layers, num_stages)
    first_larger = num_stages - num_larger
    start = stage * size + max(0, stage - first_larger)
    return range(start, start + size + (stage >= first_larger))


def _quantized(
    config: StripedHyenaProvider, layer: int = -1, *, is_init: bool = False
) -> AbstractContextManager[object]:
    """Within it, Transformer Engine's layers multiply 8 or 4 bits if the recipe says so, of this layer (-1: of any).

    With ``is_init`` they are made with such parameters instead, if the recipe says that.
    """
    return (get_fp4_context if config.fp4 else get_fp8_context)(config, layer, is_init)


class HyenaStack(MegatronModule):
    """This pipeline stage's contiguous share of the layers, and on the last stage the final norm."""

    def __init__(self, config: StripedHyenaProvider, *, pre_process: bool, post_process: bool) -> None:
        super().__init__(config=config)
        groups = config.process_groups()
        self.pre_process = pre_process
        self.tp_group = groups.tp
        self.input_tensor: Tensor | None = None
        self.layers = nn.ModuleList()
        for index in stage_layers(config.num_layers, stage=groups.pp.rank(), num_stages=groups.pp.size()):
            symbol = config.hybrid_override_pattern[index]
            with _quantized(config, index, is_init=True):
                if symbol == "*":
                    # a TransformerLayer adds to its number what the layers before its stage would be if all were equal
                    added = get_transformer_layer_offset(config, pp_rank=groups.pp.rank())
                    layer = build_module(
                        attention_layer_spec(config),
                        config=config,
                        layer_number=index + 1 - added,
                        pg_collection=groups,
                    )
                else:
                    layer = HyenaLayer(config, symbol, layer_number=index + 1)
            self.layers.append(layer)
        self.final_norm = None
        if post_process:
            self.final_norm = layer_modules(config).norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def set_input_tensor(self, input_tensor: Tensor) -> None:
        """Take the residual stream from the previous pipeline stage instead of from ``forward``'s argument."""
        self.input_tensor = input_tensor

    def forward(
        self,
        hidden_states: Tensor | WrappedTensor | None,
        rotary_pos_emb: Tensor,
        inference_context: InferenceState | None = None,
        *,
        hidden_after_layers: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Run the layers of this stage.

        Args:
            hidden_states: Residual stream [L, B, H]; wrapped, it is freed as soon as the first layer is done with it.
            rotary_pos_emb: Angles [L, 1, 1, C] for the attention layers.
            inference_context: Caches to continue from.
            hidden_after_layers: Return the raw residual stream after each of these local layers, counted from 0 and
                ascending, and stop after the last.

        Returns:
            Residual stream [L, B, H], after the final norm on the last stage; or one for each of those layers.
        """
        if not self.pre_process:
            hidden_states = self.input_tensor
        quantized = _quantized(self.config) if self._one_fp8_context() else nullcontext()
        with self._own_random_numbers(), quantized:
            if self.training and self.config.recompute_granularity == "full":
                hidden_states = self._forward_recomputed(hidden_states, rotary_pos_emb)
            elif hidden_after_layers is None:
                hidden_states = self._forward_layers(
                    0, len(self.layers), hidden_states, rotary_pos_emb, inference_context
                )
            else:
                kept, start = [], 0
                for layer in hidden_after_layers:
                    hidden_states = self._forward_layers(
                        start, layer + 1, hidden_states, rotary_pos_emb, inference_context
                    )
                    kept.append(hidden_states)
                    start = layer + 1
                return tuple(kept)
        if self.final_norm is not None:
            hidden_states = self.final_norm(hidden_states)
        # pipeline communication frees the data of what it has sent, which must not be a view
        return make_viewless_tensor(hidden_states, requires_grad=hidden_states.requires_grad, keep_graph=True)

    def _own_random_numbers(self) -> AbstractContextManager[object]:
        """For dropout, under sequence parallelism, where each process has other tokens: others' would be the same."""
        if self.training and self.config.sequence_parallel:
            return tensor_parallel.get_cuda_rng_tracker().fork()
        return nullcontext()

    def _one_fp8_context(self) -> bool:
        """Delayed scaling keeps one history for the whole pass; the other recipes choose layer by layer."""
        return bool(self.config.fp8) and self.config.fp8_recipe == Fp8Recipe.delayed

    def _forward_layers(
        self,
        start: int,
        end: int,
        hidden_states: Tensor | WrappedTensor,
        rotary_pos_emb: Tensor,
        inference_context: InferenceState | None = None,
    ) -> Tensor:
        if isinstance(hidden_states, WrappedTensor):  # of which no caller holds what is in it
            hidden_states = hidden_states.unwrap()
        for layer in self.layers[start:end]:
            with nullcontext() if self._one_fp8_context() else _quantized(self.config, layer.layer_number - 1):
                if len(hidden_states) > 1 and self._gives_the_last_token(layer, inference_context):
                    layer.see(hidden_states[:-1], rotary_pos_emb[:-1], inference_context)
                    with inference_context.ahead(len(hidden_states) - 1):
                        return self._forward_layer(layer, hidden_states[-1:], rotary_pos_emb[-1:], inference_context)
                hidden_states = self._forward_layer(layer, hidden_states, rotary_pos_emb, inference_context)
        return hidden_states

    def _gives_the_last_token(self, layer: nn.Module, inference_context: InferenceState | None) -> bool:
        """Whether of what a layer gives only the last token is used: a prompt need not go through all of it."""
        if inference_context is None or not inference_context.last_token_logits_only:
            return False
        return self.final_norm is not None and layer is self.layers[-1]

    @staticmethod
    def _forward_layer(
        layer: nn.Module, hidden_states: Tensor, rotary_pos_emb: Tensor, inference_context: InferenceState | None
    ) -> Tensor:
        if isinstance(layer, HyenaLayer):
            return layer(hidden_states, inference_context)
        return layer(
            hidden_states=hidden_states.to(layer.config.params_dtype),
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            inference_context=inference_context,
        )[0]

    def _forward_recomputed(self, hidden_states: Tensor | WrappedTensor, rotary_pos_emb: Tensor) -> Tensor:
        """Keep only the input of every block of layers, and run it again in the backward pass."""
        if isinstance(hidden_states, WrappedTensor):
            hidden_states = hidden_states.unwrap()
        if torch.is_grad_enabled() and not hidden_states.requires_grad:
            # behind a frozen embedding: autograd skips a checkpointed block of which no input wants a gradient, and
            # with it the gradients of what is trained inside
            hidden_states = hidden_states.detach().requires_grad_()
        block, num_layers = self.config.recompute_num_layers, len(self.layers)
        # "uniform" recomputes blocks of that many layers; "block" the first that many, one by one
        uniform = self.config.recompute_method == "uniform"
        starts = range(0, num_layers, block) if uniform else range(min(block, num_layers))
        for start in starts:
            end = min(start + block, num_layers) if uniform else start + 1

            def run(hidden: Tensor, rotary: Tensor, start: int = start, end: int = end) -> Tensor:
                return self._forward_layers(start, end, hidden, rotary)

            hidden_states = self._checkpoint(run, hidden_states, rotary_pos_emb)
        done = num_layers if uniform else len(starts)
        return self._forward_layers(done, num_layers, hidden_states, rotary_pos_emb)

    def _checkpoint(self, run: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        distribute = self.config.distribute_saved_activations
        if not (self.config.fp8 or self.config.fp4):
            return tensor_parallel.checkpoint(run, distribute, *arguments)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        # the backward pass is outside the context for 8 bits around the whole forward pass: this one enters it again
        return te_checkpoint(run, distribute, tensor_parallel.random.get_cuda_rng_tracker, self.tp_group, *arguments)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Keys with global layer numbers, so that a checkpoint does not depend on the pipeline."""
        sharded: ShardedStateDict = {}
        for local, layer in enumerate(self.layers):
            local_prefix = f"{prefix}layers.{local}."
            of_layer = layer.sharded_state_dict(local_prefix, (), metadata)
            replace_prefix_for_sharding(of_layer, local_prefix, f"{prefix}layers.{layer.layer_number - 1}.")
            sharded |= of_layer
        if self.final_norm is not None:
            sharded |= sharded_state_dict_default(
                self.final_norm, f"{prefix}final_norm.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return sharded
