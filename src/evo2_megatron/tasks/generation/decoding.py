# SPDX-License-Identifier: Apache-2.0
"""Sequences on their way through a model, one token each at a time; others may join them between two tokens.

Shape legend: B sequences, U different prompts, T tokens of a prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evo2_megatron.config import UserError
from evo2_megatron.model.shared_caches import SharedCaches
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks.forward import OUTPUT_NOT_FINITE, prefill_in_pieces
from evo2_megatron.tasks.generation.completion import Completion, Generation
from evo2_megatron.tasks.generation.decoding_step import DecodingStep, GraphedStep, ToHost
from evo2_megatron.tasks.generation.sampling import NOT_FINITE, BatchSampling, log_probability, uniforms
from evo2_megatron.tasks.steps import finished

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel
    from evo2_megatron.tasks.generation.generate import GenerationSettings

_MOST_UNUSED = 2
"""Caches that hold more than so many times what the sequences present may need are copied into smaller ones."""


class GeneratedBatch(NamedTuple):
    """Prompts that went through the model together."""

    generations: list[Generation]
    """In the order of the batch's prompts."""

    num_prefill_tokens: int
    """Of all prompts; one that several sequences share counts once."""

    prefill_seconds: float
    """Time to the first drawn token."""

    num_steps: int
    """Forward passes of one token per sequence."""

    num_decoded_tokens: int
    """What these gave to sequences that had not ended."""

    decode_seconds: float
    """Time of those passes."""


@dataclass(kw_only=True, eq=False, slots=True)
class Row:
    """One sequence, which depends on its prompt, seed and settings only.

    Raises:
        UserError: The prompt is empty.
    """

    prompt: Sequence[int]
    """Token ids."""

    seed: int
    """With the places in the sequence it decides the random numbers."""

    settings: GenerationSettings
    """How it is drawn and when it ends."""

    completion: Completion = field(init=False)
    """What it has drawn so far."""

    failed: bool = field(default=False, init=False)
    """The model's output for it was not finite; it has no further token."""

    cancelled: bool = field(default=False, init=False)
    """Set by whom it belongs to: nobody wants further tokens."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("a prompt is empty; give at least one token")
        self.completion = self.settings.new_completion()

    @property
    def ended(self) -> bool:
        return self.failed or self.cancelled or self.completion.finish_reason is not None

    @property
    def most_tokens(self) -> int:
        """With its prompt, at the end."""
        return len(self.prompt) + self.settings.max_new_tokens


class Decoding:
    """A batch of sequences, of which each joins when it comes, and leaves when it has ended."""

    def __init__(self, model: StripedHyenaModel, rows: Sequence[Row] = (), *, cuda_graphs: bool = False) -> None:
        """Compute nothing yet.

        Args:
            model: In evaluation mode.
            rows: With whom ``steps`` begins.
            cuda_graphs: Record a step of ``rows``. It has one size, so nobody can join, and who has ended is computed.
        """
        self._model, self._cuda_graphs = model, cuda_graphs
        self.rows = list(rows)
        self._device = next(model.parameters()).device
        # a GPU goes on while the host looks at what was drawn, even if that turns out to have been the end
        self._runs_ahead = self._device.type == "cuda"
        self._caches = SharedCaches(model)
        self.prefill_seconds = self.decode_seconds = 0.0
        self.num_steps = self.num_prefill_tokens = self.num_decoded_tokens = 0
        self.close()

    @classmethod
    def alike(
        cls,
        model: StripedHyenaModel,
        settings: GenerationSettings,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
    ) -> Decoding:
        """Of prompts that have their settings in common; ``rows`` are in their order."""
        rows = [Row(prompt=prompt, seed=seed, settings=settings) for prompt, seed in zip(prompts, seeds, strict=True)]
        return cls(model, rows, cuda_graphs=settings.cuda_graphs)

    def close(self) -> None:
        """Free the caches and drop everyone; what was drawn is still known."""
        self._drop_all()
        self._drawn_rows: list[Row] = []
        self._drawn_from_BV: Tensor | None = None

    def _drop_all(self) -> None:
        self._caches.clear()
        self._present: list[Row] = []  # in the order of the caches, of which the tensors below have a row each
        self._logits_BV: Tensor | None = None  # what the next token is drawn from, when drawn_B has been read
        self._drawn_B: Tensor | None = None  # the newest token, if the model has not read it yet
        self._uniform_BN: Tensor | None = None  # of the tokens to come
        self._blocked_BV: Tensor | None = None
        self._sampling: BatchSampling | None = None
        self._forward: DecodingStep | GraphedStep | None = None

    @property
    def present(self) -> Sequence[Row]:
        """Who has caches: those that have not ended, and without CUDA graphs nobody else after a step."""
        return self._present

    @property
    def num_cache_rows(self) -> int:
        """Sequences that the caches have room for."""
        return self._caches.num_rows

    def logits_of(self, row: Row) -> Tensor:
        """What the newest token of a sequence was drawn from, before any limit, logits_V; until the next step."""
        return self._drawn_from_BV[self._drawn_rows.index(row)]

    def run(self) -> GeneratedBatch:
        """Go to the end of ``rows``; errors as ``steps``."""
        for _ in self.steps():
            pass
        return self.result()

    def steps(self) -> Iterator[None]:
        """Give each of ``rows`` one more token at each item. Closing the iterator frees the caches.

        Raises:
            UserError: The model's output is not finite.
        """
        start = time.perf_counter()
        try:
            self.join(self.rows)
            while self.advance():
                if any(row.failed for row in self.rows):
                    raise UserError(OUTPUT_NOT_FINITE)
                now = time.perf_counter()
                self.prefill_seconds = self.prefill_seconds or now - start
                self.decode_seconds = now - start - self.prefill_seconds
                yield
        finally:
            self.close()

    def result(self) -> GeneratedBatch:
        """What ``rows`` gave."""
        return GeneratedBatch(
            [row.completion.generation(log_probs=row.settings.return_log_probs) for row in self.rows],
            num_prefill_tokens=self.num_prefill_tokens,
            prefill_seconds=self.prefill_seconds,
            num_steps=self.num_steps,
            num_decoded_tokens=self.num_decoded_tokens,
            decode_seconds=self.decode_seconds,
        )

    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of more sequences, which are present from then on.

        If that fails after ``feed``, those present go on as if nothing had been. Prompts of equal length go through
        together, equal ones once.
        """
        finished(self.joining(rows))

    @torch.inference_mode()
    def joining(self, rows: Sequence[Row]) -> Generator[None, None, None]:
        """As ``join``, with an item after each piece of a prompt; meanwhile nobody may advance, join or leave."""
        assert not (self._cuda_graphs and self._present), "the step that was recorded has one size"
        self._drop_ended()
        self.feed()
        rows = sorted(rows, key=_read_together)
        blocked_BV = torch.stack([row.settings.blocked(self._model.vocab_size, self._device) for row in rows])
        self._caches.reserve(len(rows), max(row.most_tokens for row in rows))
        logits: list[Tensor] = []
        for (_, chunk), group in itertools.groupby(rows, key=_read_together):
            read = self._read([tuple(row.prompt) for row in group], sum(map(len, logits)), chunk)
            logits.append((yield from read))
        new = [uniforms(row.seed, len(row.prompt), row.settings.max_new_tokens) for row in rows]
        uniform_BN = torch.nn.utils.rnn.pad_sequence(new, batch_first=True).to(self._device)
        self._caches.arrive([len(row.prompt) for row in rows])
        self._enter(rows, torch.cat(logits), blocked_BV, uniform_BN)

    @torch.inference_mode()
    def absorb(self, other: Decoding) -> None:
        """Take over the sequences of another batch of the same model, which is empty then.

        If that fails after ``feed`` of both, both go on as if nothing had been.
        """
        assert not (self._cuda_graphs or other._cuda_graphs)
        for each in (self, other):
            each._drop_ended()
            each.feed()
        if other._present:
            self._caches.reserve(len(other._present), max(row.most_tokens for row in other._present))
            self._caches.take(other._caches)
            self._enter(other._present, other._logits_BV, other._blocked_BV, other._uniform_BN)
        other.close()

    def _enter(self, rows: Sequence[Row], logits_BV: Tensor, blocked_BV: Tensor, uniform_BN: Tensor) -> None:
        """Count those among the present whose caches have arrived."""
        if self._present:
            logits_BV = torch.cat([self._logits_BV, logits_BV])
            blocked_BV = torch.cat([self._blocked_BV, blocked_BV])
            uniform_BN = _below_each_other(self._uniform_BN, uniform_BN)
        self._logits_BV, self._blocked_BV, self._uniform_BN = logits_BV, blocked_BV, uniform_BN
        self._present = [*self._present, *rows]
        self._compose()

    def _read(self, prompts: list[tuple[int, ...]], first: int, chunk: int) -> Generator[None, None, Tensor]:
        """Fill caches behind those present, from the number ``first`` on, with prompts of one length; logits_BV."""
        different = list(dict.fromkeys(prompts))
        token_UT = torch.tensor(different, device=self._device)
        caches = self._caches.behind(first, len(prompts))
        state = caches.rows(slice(len(different)))
        logits_UV = yield from prefill_in_pieces(self._model, token_UT, state, chunk=chunk)
        self.num_prefill_tokens += token_UT.numel()
        if len(different) == len(prompts):
            return logits_UV
        row_B = torch.tensor([different.index(prompt) for prompt in prompts], device=self._device)
        caches.overwrite(slice(len(prompts)), row_B)
        return logits_UV[row_B]

    def _compose(self) -> None:
        """Prepare steps of those who are present now."""
        self._sampling = BatchSampling([row.settings.sampling for row in self._present], self._blocked_BV)
        self._forward = (GraphedStep if self._cuda_graphs else DecodingStep)(self._model, self._caches.state)

    @torch.inference_mode()
    def advance(self) -> bool:
        """One more token for each sequence that has not ended; False if there is none."""
        self._drop_ended()
        if all(row.ended for row in self._present):
            return False
        self.feed()
        logits_BV, wanted = self._logits_BV, any(row.settings.return_log_probs for row in self._present)
        drawn_B = distributed.of_first_in_model(self._sampling.draw(logits_BV, self._uniform_BN[:, 0]))
        self._uniform_BN = self._uniform_BN[:, 1:]
        arriving = ToHost(_drawn(drawn_B, logits_BV, wanted=wanted))
        self._drawn_rows, self._drawn_from_BV = self._present, logits_BV.clone() if self._cuda_graphs else logits_BV
        # what is no token must not reach the embedding before the host has seen it
        self._drawn_B = drawn_B.clamp(min=0)
        if self._runs_ahead and any(_has_more_after_next(row) for row in self._present):
            self.feed()
        self._take(_pairs(arriving))
        self._drop_ended()
        return True

    @torch.inference_mode()
    def feed(self) -> None:
        """Have the model read what was drawn, unless it has; if that fails, those present cannot go on."""
        if self._drawn_B is not None:
            self._logits_BV, self._drawn_B = self._forward(self._drawn_B), None
            self.num_steps += 1

    def _take(self, drawn: Sequence[tuple[int, float | None]]) -> None:
        """Give each row that has not ended its new token."""
        for row, (token, log_prob) in zip(self._present, drawn):
            if row.ended:
                continue
            self.num_decoded_tokens += bool(row.completion.token_ids)  # the first comes from the prompt
            row.failed = token == NOT_FINITE
            if not row.failed:
                row.completion.add(token, log_prob if row.settings.return_log_probs else None)

    def _drop_ended(self) -> None:
        ended = [number for number, row in enumerate(self._present) if row.ended]
        if not ended or self._cuda_graphs:
            return
        if len(ended) == len(self._present):
            self._drop_all()
            return
        order = self._caches.leave(ended)
        self._present = [self._present[number] for number in order]
        row_B = torch.tensor(order, device=self._device)
        self._logits_BV, self._uniform_BN = self._logits_BV[row_B], self._uniform_BN[row_B]
        self._blocked_BV = self._blocked_BV[row_B]
        self._drawn_B = None if self._drawn_B is None else self._drawn_B[row_B]
        most_tokens = max(row.most_tokens for row in self._present)
        if self.num_cache_rows * self._caches.max_tokens >= _MOST_UNUSED * len(order) * most_tokens:
            self._caches.resize(len(order), most_tokens)
        self._compose()

    @torch.inference_mode()
    def shrink_caches(self, num_sequences: int) -> None:
        """Have room for no more than so many sequences, of which those present that have not ended are some."""
        self._drop_ended()
        if num_sequences < self.num_cache_rows:
            self._caches.resize(num_sequences, self._caches.max_tokens)


def _read_together(row: Row) -> tuple[int, int]:
    return len(row.prompt), row.settings.prefill_chunk


def _has_more_after_next(row: Row) -> bool:
    return not row.ended and len(row.completion.token_ids) + 1 < row.settings.max_new_tokens


def _below_each_other(*values_BN: Tensor) -> Tensor:
    """Rows of all; the shorter ones get zeros behind."""
    longest = max(x.shape[1] for x in values_BN)
    return torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in values_BN])


def tokens_with_log_probs(drawn_B: Tensor, logits_BV: Tensor, *, wanted: bool) -> list[tuple[int, float | None]]:
    """Bring what was drawn to the host, in one wait for the device.

    Raises:
        UserError: The logits of a sequence are not finite.
    """
    pairs = _pairs(ToHost(_drawn(drawn_B, logits_BV, wanted=wanted)))
    if any(token == NOT_FINITE for token, _ in pairs):
        raise UserError(OUTPUT_NOT_FINITE)
    return pairs


def _drawn(drawn_B: Tensor, logits_BV: Tensor, *, wanted: bool) -> Tensor:
    """Tokens [B, 1], or with their log-probabilities [B, 2], float64."""
    if not wanted:
        return drawn_B[:, None]
    # float64 holds every token id and every float32 exactly
    log_prob_B = log_probability(logits_BV, drawn_B.clamp(min=0))
    return torch.stack([drawn_B.double(), log_prob_B.double()], dim=1)


def _pairs(drawn: ToHost) -> list[tuple[int, float | None]]:
    return [(int(row[0]), row[1] if len(row) == 2 else None) for row in drawn.tolist()]
