# SPDX-License-Identifier: Apache-2.0
"""Batches of sequences through a trained model, and what is kept of each.

Shape legend: B sequences, L tokens of the longest, S = L rounded up to what the parallel layout needs, C tokens of a
piece, V vocabulary rows, H hidden channels, X either of the two.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo2_megatron import layouts
from evo2_megatron.config import ParallelConfig, UserError, uses_fp8
from evo2_megatron.data.tokenizer import PAD
from evo2_megatron.model import pieces
from evo2_megatron.model.pooling import Pool
from evo2_megatron.ops.zigzag import zigzag_split, zigzag_unsplit
from evo2_megatron.tasks.scoring.prediction_settings import Output, Window
from evo2_megatron.tasks.steps import finished

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from evo2_megatron.model.inference_state import InferenceState
    from evo2_megatron.model.provider import StripedHyenaProvider


class Runner:
    """One forward pass per batch, and what is kept of it.

    Attributes:
        multiple: What the layout wants lengths to be divisible by: sequences are padded to it, and what ``extend``
            gets must have it.
        min_length: What sequences are padded to, at least.
        chunk_length: Tokens of a piece.
    """

    def __init__(
        self,
        model: MegatronModule,
        output: Output,
        *,
        precision: str,
        layers: Sequence[int] = (),
        min_length: int = 1,
        chunk_length: int | None = None,
    ) -> None:
        """Use it on all processes of a copy of the model alike.

        Args:
            model: In evaluation mode, with as many layers as the output needs; its wrapper for 16 bits will do, too.
            output: What to compute.
            precision: Name of the model's precision recipe.
            layers: What ``output.layers_of`` gives; the last must be the model's last.
            min_length: Tokens that every batch is padded to, at least.
            chunk_length: Longer sequences go through the model in pieces of this many tokens. None: what suits the
                device.

        Raises:
            UserError: Several layers, which lie on different pipeline stages.
        """
        from megatron.core.utils import unwrap_model

        self.model, self.output, self.layers = model, output, list(layers)
        self._inner = unwrap_model(model)
        provider = self._inner.config
        self._groups = self._inner.pg_collection
        self._device = next(self._inner.parameters()).device
        if len(layers) > 1 and self._groups.pp.size() > 1:
            raise UserError("several --embedding-layer need the layers in one place; use --pipeline-parallel-size 1")
        layout = ParallelConfig(
            tensor=self._groups.tp.size(),
            context=self._groups.cp.size(),
            sequence_parallel=provider.sequence_parallel,
        )
        self._splits_activations = layout.splits_activations
        of_part = _precision_multiple(provider, precision)
        self.multiple = math.lcm(layouts.sequence_multiple(layout), of_part * layout.context)
        # results are padded to the length asked for; what the layout wants beyond it is cut off again
        self._shown_length = min_length
        self.min_length = max(min_length, layouts.min_sequence_length(layout))
        self.chunk_length = chunk_length or pieces.chunk_length()

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor] | None:
        """Results of one batch, on the CPU; None on all pipeline stages but the last.

        - Log-probabilities: ``log_likelihood``, float64 [B], the sum in nat over the ``num_scored`` tokens, int64 [B];
          ``per_token`` also ``log_probs_seqs`` and, if asked for, ``entropy_seqs``, float32 [B, L - 1], 0 where
          ``loss_mask``, bool, is not set.
        - Logits, ``token_logits`` [B, L, V], or hidden states [B, L, H], float32, with ``tokens`` and ``pad_mask`` (1
          for a token that counts), int64 [B, L]; pooled, hidden states [B, H] only. Their name is that of
          ``Output.hidden_name``.

        And ``seq_idx``, int64 [B].
        """
        return finished(self.in_pieces(items))

    @torch.no_grad()
    def in_pieces(self, items: Sequence[dict[str, Tensor]]) -> Generator[None, None, dict[str, Tensor] | None]:
        """As a call, with an item after each piece that goes through the model."""
        batch = collate(items, self.min_length, self.multiple)
        longest = max(self._shown_length, *(len(item["tokens"]) for item in items))
        tokens_BS = batch["tokens"].to(self._device)
        indices = {"seq_idx": batch["seq_idx"]}
        if self.output.log_probs is not None:
            # of the next token: at the last position, of something that is no token
            values = yield from self._values(tokens_BS)
            if values is None:
                return None
            shown = {name: values_BS[:, : longest - 1] for name, values_BS in values.items()}
            return self._scores(shown, batch["loss_mask"][:, 1:longest].bool()) | indices
        if self.output.pooling is not None:
            pooled = yield from self._pooled(tokens_BS, batch["loss_mask"])
            return None if pooled is None else pooled | indices
        values = yield from self._values(tokens_BS)
        if values is None:
            return None
        same_for_all = {name: batch[name][:, :longest] for name in ("loss_mask", "tokens")}
        return (
            {name: values_BSX[:, :longest].float() for name, values_BSX in values.items()}
            | {"pad_mask": same_for_all["loss_mask"], "tokens": same_for_all["tokens"]}
            | indices
        )

    def _values(self, tokens_BS: Tensor) -> Generator[None, None, dict[str, Tensor] | None]:
        return _joined(self._pieces(tokens_BS), tokens_BS.shape[1])

    def _scores(self, values: dict[str, Tensor], counts_BL: Tensor) -> dict[str, Tensor]:
        # where(), not a product: log-probabilities of padding may be anything, and 0 * nan is nan
        kept = {f"{name}_seqs": torch.where(counts_BL, values_BL, 0.0) for name, values_BL in values.items()}
        # in float64 a million terms lose no digit
        total_B = kept["log_probs_seqs"].sum(-1, dtype=torch.float64)
        result = {"log_likelihood": total_B, "num_scored": counts_BL.sum(-1)}
        return result | (kept | {"loss_mask": counts_BL} if self.output.log_probs == "per_token" else {})

    @property
    def _with_entropy(self) -> bool:
        return "entropy" in self.output.columns

    def _pooled(self, tokens_BS: Tensor, mask_BS: Tensor) -> Generator[None, None, dict[str, Tensor] | None]:
        """One vector for each sequence, summed up piece by piece."""
        mask_BS, how = mask_BS.to(self._device), self.output.pooling
        pools: defaultdict[str, Pool] = defaultdict(
            lambda: Pool(mask_BS, range(how.first, how.last + 1) if isinstance(how, Window) else how)
        )
        for start, values in self._pieces(tokens_BS):
            for name, values_BCH in values.items():
                pools[name].add(start, values_BCH)
            yield
        return {name: pool.vector_BH.cpu() for name, pool in pools.items()} or None

    def _pieces(self, tokens_BS: Tensor) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Run the model, over long sequences piece by piece with its caches; yield (start, results [B, C, ...]).

        Sequences that are split over processes go through in one piece. Only the last pipeline stage yields.
        """
        num_tokens = tokens_BS.shape[1]
        in_pieces = num_tokens > self._chunk(tokens_BS.shape[0]) and self._groups.cp.size() == 1
        length = self._chunk(tokens_BS.shape[0]) if in_pieces else num_tokens
        state = self.new_state(*tokens_BS.shape) if in_pieces else None
        yield from self._pieces_from(state, tokens_BS, tokens_BS.roll(-1, dims=1), length)

    def _pieces_from(
        self, state: InferenceState | None, tokens_BS: Tensor, next_BS: Tensor, length: int
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        from evo2_megatron.model.pipeline import forward_through_stages

        for start in range(0, tokens_BS.shape[1], length):
            piece = slice(start, start + length)
            values = forward_through_stages(
                self.model,
                self._my_part(tokens_BS[:, piece]),
                inference_context=state,
                runtime_gather_output=True,
                **self._wanted(self._my_part(next_BS[:, piece])),
            )
            if values is not None:
                yield start, {name: self._all_parts(part, name) for name, part in self._named(values).items()}

    def new_state(self, batch_size: int, max_tokens: int) -> InferenceState:
        """Caches of sequences that have seen nothing, for ``extending``."""
        return self._inner.new_inference_state(batch_size, max_tokens)

    @torch.no_grad()
    def extending(
        self, state: InferenceState, tokens_BS: Tensor, next_BS: Tensor
    ) -> Generator[None, None, Tensor | None]:
        """Log-probabilities of ``next_BS``, the tokens after each of ``tokens_BS``, float32 [B, S] on the CPU.

        Long sequences go through in pieces, with an item after each. None on all pipeline stages but the last.

        Args:
            state: What has been seen before, brought up to date in place.
            tokens_BS, next_BS: Ids, S a multiple of ``multiple``.
        """
        tokens_BS, next_BS = tokens_BS.to(self._device), next_BS.to(self._device)
        values = self._pieces_from(state, tokens_BS, next_BS, self._chunk(tokens_BS.shape[0]))
        joined = yield from _joined(values, tokens_BS.shape[1])
        return None if joined is None else joined["log_probs"]

    def _chunk(self, batch_size: int) -> int:
        """Tokens of a piece; of several sequences at a time the pieces are shorter."""
        return pieces.of_each(self.chunk_length, batch_size, multiple=self.multiple)

    def _wanted(self, next_BC: Tensor) -> dict[str, object]:
        if self.output.log_probs is not None:
            return {"log_probs_of": next_BC, "with_entropy": self._with_entropy}
        if not self.layers:
            return {}
        if self._groups.pp.size() == 1:
            return {"hidden_after_layers": self.layers}
        is_last = self._groups.pp.rank() == self._groups.pp.size() - 1
        return {"hidden_after_layers": [len(self._inner.decoder.layers) - 1]} if is_last else {}

    def _named(self, values: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
        if self.output.log_probs is not None:
            return dict(zip(("log_probs", "entropy"), values if self._with_entropy else (values,)))
        if not self.layers:
            return {"token_logits": values}
        return {self.output.hidden_name(layer): hidden_BCH for layer, hidden_BCH in zip(self.layers, values)}

    def _my_part(self, values_BS: Tensor) -> Tensor:
        """What this process has of whole sequences."""
        group = self._groups.cp
        return zigzag_split(values_BS, 1, num_ranks=group.size(), rank=group.rank()) if group.size() > 1 else values_BS

    def _all_parts(self, values: Tensor, name: str) -> Tensor:
        """Whole sequences [B, C, ...] from what each process has of them."""
        if self._splits_activations and name.startswith("hidden"):
            values = torch.cat(_of_all(values, self._groups.tp), dim=1)
        group = self._groups.cp
        return zigzag_unsplit(_of_all(values, group), 1) if group.size() > 1 else values


def _joined(
    pieces: Iterator[tuple[int, dict[str, Tensor]]], num_tokens: int
) -> Generator[None, None, dict[str, Tensor] | None]:
    """Results [B, S, ...] on the CPU from those of pieces; None if there are none.

    Nothing of a piece stays: small tensors that outlive it would lie between the next one's, and the heap would grow.
    """
    joined: dict[str, Tensor] = {}
    for start, values in pieces:
        for name, part in values.items():
            if name not in joined:
                joined[name] = torch.empty((part.shape[0], num_tokens, *part.shape[2:]), dtype=part.dtype)
            joined[name][:, start : start + part.shape[1]] = part
        yield
    return joined or None


def _of_all(values: Tensor, group: torch.distributed.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(group.size())]
    torch.distributed.all_gather(parts, values.contiguous(), group=group)
    return parts


def _precision_multiple(provider: StripedHyenaProvider, precision: str) -> int:
    """What the number of tokens that a process has must be divisible by for 8-bit products."""
    if provider.fp8 or provider.fp4 or uses_fp8(precision):
        return pieces.LOW_PRECISION_TOKENS
    return 1


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
