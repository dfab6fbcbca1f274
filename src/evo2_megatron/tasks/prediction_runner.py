# SPDX-License-Identifier: Apache-2.0
"""Batches of sequences through a trained model, and what is kept of each.

Shape legend: B sequences, L tokens of the longest, S = L rounded up to what the parallel layout needs, C tokens of a
piece, X vocabulary rows or hidden channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo2_megatron import layouts
from evo2_megatron.config import ParallelConfig, UserError, uses_fp8
from evo2_megatron.data.tokenizer import PAD
from evo2_megatron.ops.zigzag import zigzag_split, zigzag_unsplit
from evo2_megatron.runtime import megatron
from evo2_megatron.tasks.scoring import Collapse, collapse_log_probs, next_token_log_probs

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from evo2_megatron.model.provider import StripedHyenaProvider

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
        self,
        model: MegatronModule,
        output: Output,
        *,
        precision: str,
        min_length: int = 1,
        chunk_length: int = CHUNK_LENGTH,
    ) -> None:
        """Use it on all processes of a copy of the model alike.

        Args:
            model: In evaluation mode, with as many layers as the output needs; its wrapper for 16 bits will do, too.
            output: What to compute.
            precision: Name of the model's precision recipe.
            min_length: Tokens that every batch is padded to, at least.
            chunk_length: Longer sequences go through the model in pieces of this many tokens.
        """
        from megatron.core.utils import unwrap_model

        self.model, self.output = model, output
        self._inner = unwrap_model(model)
        provider = self._inner.config
        self._groups = self._inner.pg_collection
        layout = ParallelConfig(
            tensor=self._groups.tp.size(),
            context=self._groups.cp.size(),
            sequence_parallel=provider.sequence_parallel,
        )
        self._splits_activations = layout.splits_activations
        of_part = _precision_multiple(provider, precision)
        self._multiple = math.lcm(layouts.sequence_multiple(layout), of_part * layout.context)
        # results are padded to the length asked for; what the layout wants beyond it is cut off again
        self._shown_length = min_length
        self._min_length = max(min_length, layouts.min_sequence_length(layout))
        self._chunk = math.ceil(chunk_length / self._multiple) * self._multiple

    @torch.no_grad()
    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor] | None:
        """Results of one batch, on the CPU; their names and shapes are those of ``predict_evo2``'s files.

        ``token_logits`` [B, L, V] or ``hidden_embeddings`` [B, L, H], float32, with ``tokens`` and ``pad_mask`` (1 for
        a token that counts), int64 [B, L]; or ``log_probs_seqs``, float32 [B], or [B, L - 1] with a boolean
        ``loss_mask``. And ``seq_idx``, int64 [B]. None on all pipeline stages but the last.
        """
        batch = collate(items, self._min_length, self._multiple)
        longest = max(self._shown_length, *(len(item["tokens"]) for item in items))
        tokens_BS = batch["tokens"].to(megatron.device())
        with_log_probs = self.output.log_probs is not None
        values_BSX = self._log_probs(tokens_BS) if with_log_probs else self._values(tokens_BS)
        if values_BSX is None:
            return None
        if with_log_probs:
            return self._collapsed(values_BSX[:, : longest - 1], batch, longest)
        name = "token_logits" if self.output.embedding_layer is None else "hidden_embeddings"
        return {
            name: values_BSX[:, :longest].float(),
            "pad_mask": batch["loss_mask"][:, :longest],
            "seq_idx": batch["seq_idx"],
            "tokens": batch["tokens"][:, :longest],
        }

    def _values(self, tokens_BS: Tensor) -> Tensor | None:
        pieces = [values_BCX.cpu() for _, values_BCX in self._pieces(tokens_BS)]
        return torch.cat(pieces, dim=1) if pieces else None

    def _log_probs(self, tokens_BS: Tensor) -> Tensor | None:
        """Log-probability of the next token; at the last position of something that is no token."""
        next_BS = self._my_part(tokens_BS.roll(-1, dims=1))
        pieces = []
        for start, logits_BCV in self._pieces(tokens_BS, gather=False):
            is_whole = logits_BCV.shape[-1] == self._inner.vocab_size
            group = None if is_whole else self._groups.tp
            next_BC = next_BS[:, start : start + logits_BCV.shape[1]]
            log_probs_BC = next_token_log_probs(logits_BCV, next_BC, vocab_group=group)
            pieces.append(self._all_parts(log_probs_BC).cpu())
        return torch.cat(pieces, dim=1) if pieces else None

    def _collapsed(self, log_probs_BL: Tensor, batch: dict[str, Tensor], longest: int) -> dict[str, Tensor]:
        counts_BL = batch["loss_mask"][:, 1:longest].bool()
        how = self.output.log_probs
        result = {"log_probs_seqs": collapse_log_probs(log_probs_BL, counts_BL, how), "seq_idx": batch["seq_idx"]}
        return result | {"loss_mask": counts_BL} if how == "per_token" else result

    def _pieces(self, tokens_BS: Tensor, *, gather: bool = True) -> Iterator[tuple[int, Tensor]]:
        """Run the model, over long sequences piece by piece with its caches; yield (start, logits or hidden state).

        Sequences that are split over processes go through in one piece. Only the last pipeline stage yields.

        Args:
            tokens_BS: Whole sequences.
            gather: Whether to join what tensor- and context-parallel processes have; else, each yields its own.
        """
        from evo2_megatron.model.pipeline import forward_through_stages

        num_tokens = tokens_BS.shape[1]
        in_pieces = num_tokens > self._chunk and self._groups.cp.size() == 1
        length = self._chunk if in_pieces else num_tokens
        state = self._inner.new_inference_state(*tokens_BS.shape) if in_pieces else None
        is_last = self._groups.pp.rank() == self._groups.pp.size() - 1
        wants_hidden = self.output.embedding_layer is not None
        for start in range(0, num_tokens, length):
            values_BCX = forward_through_stages(
                self.model,
                self._my_part(tokens_BS[:, start : start + length]),
                inference_context=state,
                # log-probabilities need three numbers per token from each process instead of its logits
                runtime_gather_output=gather,
                hidden_after_layer=len(self._inner.decoder.layers) - 1 if wants_hidden and is_last else None,
            )
            if values_BCX is None:
                continue
            if wants_hidden and self._splits_activations:
                values_BCX = torch.cat(_of_all(values_BCX, self._groups.tp), dim=1)
            yield start, self._all_parts(values_BCX) if gather else values_BCX

    def _my_part(self, values_BS: Tensor) -> Tensor:
        """What this process has of whole sequences."""
        group = self._groups.cp
        return zigzag_split(values_BS, 1, num_ranks=group.size(), rank=group.rank()) if group.size() > 1 else values_BS

    def _all_parts(self, values_BCX: Tensor) -> Tensor:
        """Whole sequences from what each process has of them."""
        group = self._groups.cp
        return zigzag_unsplit(_of_all(values_BCX, group), 1) if group.size() > 1 else values_BCX


def _of_all(values: Tensor, group: torch.distributed.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(group.size())]
    torch.distributed.all_gather(parts, values.contiguous(), group=group)
    return parts


def _precision_multiple(provider: StripedHyenaProvider, precision: str) -> int:
    """What the number of tokens that a process has must be divisible by for 8-bit products."""
    if provider.fp8 or provider.fp4 or uses_fp8(precision):
        return 32  # rows of a block of MXFP8, the largest of all formats
    return 8 if provider.vortex_style_fp8 else 1


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
