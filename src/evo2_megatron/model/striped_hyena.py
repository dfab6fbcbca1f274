# SPDX-License-Identifier: Apache-2.0
"""StripedHyena 2 as a Megatron language model: embedding, stack, output head, loss.

Shape legend: B batch, L tokens, V vocabulary rows of this process, H channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.enums import ModelType
from megatron.core.utils import WrappedTensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evo2_megatron.config import UserError
from evo2_megatron.model.entropy import vocab_parallel_entropy
from evo2_megatron.model.inference_state import InferenceState
from evo2_megatron.model.loss import loss_weights
from evo2_megatron.model.stack import HyenaStack
from evo2_megatron.model.torch_modules import ColumnLinear
from evo2_megatron.ops.casing import to_upper

LOSS_BLOCK_TOKENS = 4_096
"""Tokens whose logits exist together while the loss is computed: 8 MiB in float32 for 512 rows of vocabulary, a few
times as much with what is derived from them."""


class StripedHyenaModel(LanguageModule):
    """One pipeline stage of the model; with one stage, all of it."""

    def __init__(self, config: Any, vocab_size: int, *, pre_process: bool, post_process: bool) -> None:
        """Build from a StripedHyenaProvider; ``vocab_size`` counts the embedding's rows, padding included."""
        groups = config.process_groups()
        super().__init__(config=config, pg_collection=groups)
        self.pre_process, self.post_process = pre_process, post_process
        self.vocab_size = vocab_size
        self.share_embeddings_and_output_weights = config.share_embeddings_and_output_weights
        self.model_type = ModelType.encoder_or_decoder
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=vocab_size,
                max_sequence_length=config.seq_length,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=config.rotary_percent,
            seq_len_interpolation_factor=config.seq_len_interpolation_factor,
            rotary_base=config.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=groups.cp,
        )
        self.decoder = HyenaStack(config, pre_process=pre_process, post_process=post_process)
        if post_process:
            self.output_layer = ColumnLinear(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=config.add_bias_output,
                skip_bias_add=False,
                gather_output=not config.parallel_output,
                skip_weight_param_allocation=pre_process and config.share_embeddings_and_output_weights,
                tp_group=groups.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Receive the residual stream from the previous pipeline stage."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.decoder.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        inference_context: InferenceState | None = None,
        runtime_gather_output: bool | None = None,
        *,
        log_probs_of: Tensor | None = None,
        with_entropy: bool = False,
        hidden_after_layers: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Next-token logits, or the loss when there are labels.

        Args:
            input_ids: Token ids [B, L].
            position_ids: Not read: positions are consecutive, from 0 or from what ``inference_context`` has seen.
            attention_mask: Must be None: attention is causal.
            labels: Next-token ids [B, L], with their case.
            loss_mask: [B, L], 1 where a label counts; None: everywhere.
            inference_context: Caches to continue from; brought up to date in place.
            runtime_gather_output: Gather the vocabulary over tensor parallelism; always so in inference.
            log_probs_of: Ids [B, L] of the tokens that follow: return their log-probabilities instead of logits, of
                which there is then only a block of tokens at a time.
            with_entropy: Return with these the entropy of each prediction over the whole vocabulary.
            hidden_after_layers: Return the residual stream after each of these layers of this stage, counted from 0
                and ascending, and stop after the last.

        Returns:
            Logits [B, L, V]; or weighted loss in nat per token, float32 [B, L]; or log-probabilities in nat, float32
            [B, L], and entropies in nat, float32 [B, L]; or [B, L, H] for each layer asked for; or [L, B, H] on
            earlier stages.
        """
        assert attention_mask is None, "attention is causal; a mask would be ignored"
        hidden_states = self.through_layers(input_ids, inference_context, hidden_after_layers=hidden_after_layers)
        if hidden_after_layers is not None:
            return tuple(hidden_LBH.transpose(0, 1).contiguous() for hidden_LBH in hidden_states)
        if not self.post_process:
            return hidden_states
        if log_probs_of is not None:
            if with_entropy:
                values_BL2 = self._by_blocks(
                    self._entropy_and_loss, hidden_states, self._output_weight(), log_probs_of
                )
                return -values_BL2[..., 1], values_BL2[..., 0]
            return -self._by_blocks(self._loss, hidden_states, self._output_weight(), log_probs_of)
        return self._head(hidden_states, labels, loss_mask, inference_context, runtime_gather_output)

    def through_layers(
        self,
        input_ids: Tensor | None,
        inference_context: InferenceState | None = None,
        *,
        hidden_after_layers: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """What ``HyenaStack`` gives for these tokens, [L, B, H]; arguments as of ``forward``."""
        embedded_LBH = self.embedding(input_ids=input_ids, position_ids=None) if self.pre_process else None
        rotary_pos_emb = self._rotary_angles(input_ids, embedded_LBH, inference_context)
        wrapped = WrappedTensor(embedded_LBH) if self.pre_process else None
        del embedded_LBH
        hidden_states = self.decoder(
            wrapped, rotary_pos_emb, inference_context, hidden_after_layers=hidden_after_layers
        )
        if inference_context is not None:
            inference_context.advance(input_ids.shape[1])
        return hidden_states

    def _rotary_angles(
        self, input_ids: Tensor | None, hidden_states: Tensor | None, inference_context: InferenceState | None
    ) -> Tensor:
        if inference_context is not None:
            inference_context.check_room(*input_ids.shape)
            if inference_context.seen_B is not None:
                return self._angles_of_rows(inference_context.seen_B)
            # not through forward(), whose cache of the last 32 results would fill with one-token tables
            return self.rotary_pos_emb.get_emb(input_ids.shape[1], inference_context.num_tokens_seen)
        length = self.rotary_pos_emb.get_rotary_seq_len(None, self.decoder, hidden_states, self.config, None)
        return self.rotary_pos_emb(length)

    def _angles_of_rows(self, position_B: Tensor) -> Tensor:
        """What ``get_emb`` gives for one position, of each sequence its own, [1, B, 1, C]."""
        rotary = self.rotary_pos_emb
        frequencies = rotary.inv_freq.to(position_B.device)
        position_B = position_B.to(frequencies.dtype)
        if rotary.seq_len_interpolation_factor is not None:
            position_B = position_B * (1 / rotary.seq_len_interpolation_factor)
        angles_BC = torch.outer(position_B, frequencies)
        return torch.cat((angles_BC, angles_BC), dim=-1)[None, :, None]

    def _head(
        self,
        hidden_states: Tensor,
        labels: Tensor | None,
        loss_mask: Tensor | None,
        inference_context: InferenceState | None,
        runtime_gather_output: bool | None,
    ) -> Tensor:
        if inference_context is not None:
            runtime_gather_output = True
            if inference_context.last_token_logits_only:
                hidden_states = hidden_states[-1:]
        weight = self._output_weight()
        if labels is None:
            logits_LBV, _ = self.output_layer(hidden_states, weight, runtime_gather_output)
            return logits_LBV.transpose(0, 1).contiguous()
        loss_BL = self._by_blocks(self._loss, hidden_states, weight, to_upper(labels))
        weight_BL = loss_weights(
            labels,
            loss_BL.new_ones(loss_BL.shape) if loss_mask is None else loss_mask,
            normalize=self.config.loss_normalization if self.config.to_upper == "normalized_weighted" else None,
            lowercase_weight=self.config.lowercase_loss_weight,
            split_group=self.pg_collection.cp,
        )
        return loss_BL * weight_BL

    def _output_weight(self) -> Tensor | None:
        """The embedding's, if the output layer has none of its own."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _loss(self, labels_BL: Tensor, logits_LBV: Tensor) -> Tensor:
        """In nat per token, float32 [B, L]."""
        return self.compute_language_model_loss(labels_BL, logits_LBV).float()

    def _entropy_and_loss(self, labels_BL: Tensor, logits_LBV: Tensor) -> Tensor:
        """In nat per token, float32 [B, L, 2]."""
        entropy_BL = vocab_parallel_entropy(
            logits_LBV, self.pg_collection.tp
        )  # first: the loss changes logits in place
        return torch.stack([entropy_BL, self._loss(labels_BL, logits_LBV)], dim=-1)

    def _by_blocks(
        self,
        of_logits: Callable[[Tensor, Tensor], Tensor],
        hidden_LBH: Tensor,
        weight: Tensor | None,
        labels_BL: Tensor,
    ) -> Tensor:
        """What ``of_logits`` makes of labels and logits; of long sequences those of a block of tokens exist at a time.

        The backward pass computes them again, which costs a thousandth of the step.
        """

        def of_block(hidden_LBH: Tensor, labels_BL: Tensor) -> Tensor:
            return of_logits(labels_BL, self.output_layer(hidden_LBH, weight)[0])

        # under sequence parallelism the output layer puts the parts of T processes one after the other
        num_parts = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        length = max(1, LOSS_BLOCK_TOKENS // (num_parts * hidden_LBH.shape[1]))
        if length >= hidden_LBH.shape[0]:
            return of_block(hidden_LBH, labels_BL)
        blocks = [
            checkpoint(of_block, hidden, labels.flatten(1), use_reentrant=False, preserve_rng_state=False).unflatten(
                1, (num_parts, -1)
            )
            for hidden, labels in zip(
                hidden_LBH.split(length), labels_BL.unflatten(1, (num_parts, -1)).split(length, dim=2)
            )
        ]
        return torch.cat(blocks, dim=2).flatten(1, 2)

    def new_inference_state(
        self, batch_size: int, max_tokens: int, *, last_token_logits_only: bool = False
    ) -> InferenceState:
        """Empty caches for a batch.

        Args:
            batch_size: Sequences that advance together.
            max_tokens: Prompt and generated tokens together, at most; sizes the keys and values.
            last_token_logits_only: Return logits [B, 1, V] of the last token of each call instead of all of them.
        """
        if self.config.context_parallel_size > 1:
            raise UserError("generation does not split sequences over processes; use --context-parallel-size 1")
        layers = {}
        for layer in self.decoder.layers:
            owner = layer if hasattr(layer, "mixer") else layer.self_attention
            layers[layer.layer_number] = owner.new_state(batch_size, max_tokens)
        return InferenceState(batch_size, max_tokens, layers, last_token_logits_only)
