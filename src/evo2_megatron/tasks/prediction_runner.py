# SPDX-License-Identifier: Apache-2.0
"""Batches of sequences through a trained model, and what is kept of each.

Shape legend: B sequences, L tokens of the longest, S = L rounded up to what the parallel layout needs, C tokens of a
piece, X vocabulary rows or hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evo2_megatron.checkpoint.load import LoadedModel
from evo2_megatron.config import UserError, uses_fp8
from evo2_megatron.data.tokenizer import PAD
from evo2_megatron.runtime import megatron
from evo2_megatron.tasks.scoring import Collapse, collapse_log_probs, next_token_log_probs

CHUNK_LENGTH = 65_536
"""Longer sequences go through the model in pieces of this many tokens: activations then stop growing with length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What is computed for each sequence: logits, unless one of the two fields is set."""

    log_probs: Collapse | None = None
    """Log-probability of the sequence: their sum, their mean over scored tokens, or one value per token."""

    embedding_layer: int | None = None
    """Residual stream after this layer, counted from 0, or from -1 backwards; before the final norm."""

    def __post_init__(self) -> None:
        if self.log_probs is not None and self.embedding_layer is not None:
            raise UserError(
                "Cannot use --output-log-prob-seqs with --embedding-layer: hidden states have no probabilities; "
                "leave one of the two out"
            )


class Runner:
    """One forward pass per batch, and what is kept of it."""

    def __init__(
        self, loaded: LoadedModel, output: Output, *, min_length: int = 1, chunk_length: int = CHUNK_LENGTH
    ) -> None:
        """Use it on all processes of a copy of the model alike.

        Args:
            loaded: Model with as many layers as the output needs.
            output: What to compute.
            min_length: Tokens that every batch is padded to, at least.
            chunk_length: Longer sequences go through the model in pieces of this many tokens.
        """
        from megatron.core import parallel_state
        from megatron.core.utils import unwrap_model

        self.model, self.output = loaded.model, output
        self._inner = unwrap_model(loaded.model)
        self._tp_group = parallel_state.get_tensor_model_parallel_group()
        self._min_length = min_length
        self._multiple = _length_multiple(loaded)
        self._splits_sequence = loaded.provider.sequence_parallel
        self._chunk = math.ceil(chunk_length / self._multiple) * self._multiple

    @torch.no_grad()
    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Results of one batch, on the CPU; their names and shapes are those of ``predict_evo2``'s files.

        ``token_logits`` [B, L, V] or ``hidden_embeddings`` [B, L, H], float32, with ``tokens`` and ``pad_mask`` (1 for
        a token that counts), int64 [B, L]; or ``log_probs_seqs``, float32 [B], or [B, L - 1] with a boolean
        ``loss_mask``. And ``seq_idx``, int64 [B].
        """
        batch = collate(items, self._min_length, self._multiple)
        longest = max(self._min_length, *(len(item["tokens"]) for item in items))
        tokens_BS = batch["tokens"].to(megatron.device())
        if self.output.log_probs is not None:
            return self._log_probs(tokens_BS, batch, longest)
        values = [values_BCX[:, : longest - start].cpu() for start, values_BCX in self._pieces(tokens_BS)]
        name = "token_logits" if self.output.embedding_layer is None else "hidden_embeddings"
        return {
            name: torch.cat(values, dim=1).float(),
            "pad_mask": batch["loss_mask"][:, :longest],
            "seq_idx": batch["seq_idx"],
            "tokens": batch["tokens"][:, :longest],
        }

    def _log_probs(self, tokens_BS: Tensor, batch: dict[str, Tensor], longest: int) -> dict[str, Tensor]:
        # the last position has no next token; what stands here is cut off below
        next_BS = tokens_BS.roll(-1, dims=1)
        pieces = []
        for start, logits_BCV in self._pieces(tokens_BS):
            is_whole = logits_BCV.shape[-1] == self._inner.vocab_size
            group = None if is_whole else self._tp_group
            next_BC = next_BS[:, start : start + logits_BCV.shape[1]]
            pieces.append(next_token_log_probs(logits_BCV, next_BC, vocab_group=group).cpu())
        log_probs_BL = torch.cat(pieces, dim=1)[:, : longest - 1]
        counts_BL = batch["loss_mask"][:, 1:longest].bool()
        how = self.output.log_probs
        result = {"log_probs_seqs": collapse_log_probs(log_probs_BL, counts_BL, how), "seq_idx": batch["seq_idx"]}
        return result | {"loss_mask": counts_BL} if how == "per_token" else result

    def _pieces(self, tokens_BS: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Run the model, over long sequences piece by piece with its caches; yield (start, logits or hidden state)."""
        num_tokens = tokens_BS.shape[1]
        state = self._inner.new_inference_state(*tokens_BS.shape) if num_tokens > self._chunk else None
        hidden_after = None if self.output.embedding_layer is None else self._inner.config.num_layers - 1
        for start in range(0, num_tokens, self._chunk):
            values_BCX = self.model(
                tokens_BS[:, start : start + self._chunk],
                inference_context=state,
                # log-probabilities need three numbers per token from each process instead of its logits
                runtime_gather_output=self.output.log_probs is None,
                hidden_after_layer=hidden_after,
            )
            if hidden_after is not None and self._splits_sequence:
                values_BCX = self._gather_sequence(values_BCX)
            yield start, values_BCX

    def _gather_sequence(self, values_BCX: Tensor) -> Tensor:
        parts = [torch.empty_like(values_BCX) for _ in range(self._tp_group.size())]
        torch.distributed.all_gather(parts, values_BCX.contiguous(), group=self._tp_group)
        return torch.cat(parts, dim=1)


def _length_multiple(loaded: LoadedModel) -> int:
    """What the number of tokens must be divisible by."""
    provider = loaded.provider
    multiple = provider.tensor_model_parallel_size if provider.sequence_parallel else 1
    if provider.fp8 or provider.fp4 or uses_fp8(loaded.precision):
        multiple = math.lcm(multiple, 32)  # rows of a block of MXFP8, the largest of all formats
    elif provider.vortex_style_fp8:
        multiple = math.lcm(multiple, 8)
    return multiple


def collate(items: Sequence[dict[str, Tensor]], min_length: int = 1, multiple: int = 1) -> dict[str, Tensor]:
    """Stack sequences, filled with PAD on the right to a common length; a causal model never sees it from the left.

    Args:
        items: ``tokens`` and ``loss_mask`` [L_i] and the scalar ``seq_idx``, int64.
        min_length: Tokens, at least.
        multiple: The common length is rounded up to a multiple of this.
    """
    length = max(min_length, *(len(item["tokens"]) for item in items))
    length = math.ceil(length / multiple) * multiple
    tokens_BS = torch.full((len(items), length), PAD)
    mask_BS = torch.zeros_like(tokens_BS)
    for row, item in enumerate(items):
        tokens_BS[row, : len(item["tokens"])] = item["tokens"]
        mask_BS[row, : len(item["tokens"])] = item["loss_mask"]
    return {"tokens": tokens_BS, "loss_mask": mask_BS, "seq_idx": torch.stack([item["seq_idx"] for item in items])}


def shard(num_sequences: int, micro_batch_size: int, *, rank: int, size: int) -> Iterator[range]:
    """Batches of one copy of the model: of each block of ``micro_batch_size * size`` sequences, the ``rank``-th part.

    A copy that would get an empty part of the last block gets none.
    """
    for block in range(0, num_sequences, micro_batch_size * size):
        start = block + rank * micro_batch_size
        batch = range(start, min(start + micro_batch_size, num_sequences))
        if batch:
            yield batch
