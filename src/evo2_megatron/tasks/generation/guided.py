# SPDX-License-Identifier: Apache-2.0
"""Guided generation: a beam search by chunks, in which a scorer decides which continuations go on.

In each round, the sequences that are kept get ``beams * samples`` continuations of one chunk, drawn from the model;
the scorer gives each a number, and the ``beams`` best go on. More samples cost more compute and find better scores.

Only the kept sequences' caches live from round to round. A batch of continuations is drawn from copies of them, which
are then dropped; the chunks that win go through the model once more, as one block, in place of the step that their
last base would have taken. So memory is that of the beams and one batch, and the prompt is computed once.
Shape legend: B rows of a batch, L live sequences, N bases of a chunk, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from evo2_megatron.config import UserError
from evo2_megatron.data import tokenizer
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks.forward import forward_last, prefill
from evo2_megatron.tasks.generation.completion import Completion, FinishReason, Generation
from evo2_megatron.tasks.generation.decoding import tokens_with_log_probs
from evo2_megatron.tasks.generation.generate import GenerationSettings
from evo2_megatron.tasks.generation.sampling import BatchSampling, derive_seed, uniforms
from evo2_megatron.tasks.generation.scorers import Score, check_scores

if TYPE_CHECKING:
    from evo2_megatron.model.inference_state import InferenceState
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

logger = logging.getLogger(__name__)

CHUNK = 128
"""Bases of a round, unless told otherwise; as in Evo 2's paper."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """How wide the search is.

    Raises:
        UserError: A number is out of range.
    """

    beams: int = 2
    """Sequences that go on after each round."""

    samples: int = 8
    """Continuations of each in a round. Where fewer sequences than ``beams`` go on, as in the first round, they share
    the same ``beams * samples``."""

    chunk: int = CHUNK
    """Bases that a round adds; the last may add fewer."""

    score_of: Literal["sequence", "completion"] = "sequence"
    """What the scorer gets: the prompt with all new bases, or the new bases alone."""

    def __post_init__(self) -> None:
        for name in ("beams", "samples", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    @property
    def width(self) -> int:
        """Continuations of a round."""
        return self.beams * self.samples


class Guided(NamedTuple):
    """One sequence that the search kept."""

    generation: Generation
    """With log-probabilities."""

    score: float
    """What the scorer gave it."""


class _Candidate(NamedTuple):
    """A sequence in the search."""

    token_ids: tuple[int, ...]
    """New ones, from the prompt on."""

    log_probs: tuple[float, ...]
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    parent: int = 0
    """Number of the live sequence that it continues."""

    score: float = math.nan

    @classmethod
    def of(cls, row: Completion, parent: int) -> _Candidate:
        return cls(tuple(row.token_ids), tuple(row.log_probs), row.finish_reason, row.stop_string, parent)

    def row(self, settings: GenerationSettings) -> Completion:
        """Takes the tokens that continue it."""
        row = settings.new_completion()
        row.go_on_from(self.token_ids, self.log_probs)
        return row

    def guided(self) -> Guided:
        generation = Generation(list(self.token_ids), self.finish_reason, list(self.log_probs), self.stop_string)
        return Guided(generation, self.score)


class Search:
    """The search from one prompt."""

    def __init__(
        self,
        model: StripedHyenaModel,
        settings: GenerationSettings,
        search: SearchSettings,
        score: Score,
        *,
        seed: int,
        name: str = "0",
    ) -> None:
        """Compute nothing yet.

        Args:
            model: In evaluation mode; all processes of one copy of the model must search alike.
            settings: How tokens are drawn, how many, and how many rows a batch has.
            search: How wide.
            score: Gives one number for each sequence; the same on every process.
            seed: With a continuation's number in its round and its places it decides the random numbers. The first
                continuation's are those of plain generation with this seed.
            name: Of the prompt, in the log.

        Raises:
            UserError: The settings ask for CUDA graphs, or do not fit the model's vocabulary.
        """
        if settings.cuda_graphs:
            raise UserError("a search changes its rows from round to round and records no CUDA graphs; leave them out")
        self._model, self._settings, self._search, self._score, self._name = model, settings, search, score, name
        self._seeds = [derive_seed(seed, sample=lane) for lane in range(search.width)]
        self._device = next(model.parameters()).device
        blocked_V = settings.blocked(model.vocab_size, self._device)
        self._sampling = BatchSampling([settings.sampling], blocked_V[None])

    @torch.inference_mode()
    def run(self, prompt: Sequence[int]) -> list[Guided]:
        """Search to the end.

        Args:
            prompt: Token ids, at least one.

        Returns:
            At most ``beams`` sequences that differ, best first. Of equal scores, those that were not yet finished come
            first, then those whose number in the round is lower.

        Raises:
            UserError: The prompt is empty, the scorer's answer is no list of numbers, or the model's output is not
                finite.
        """
        if not prompt:
            raise UserError("a prompt is empty; give at least one token")
        max_new = self._settings.max_new_tokens
        state = self._model.new_inference_state(1, len(prompt) + max_new, last_token_logits_only=True)
        logits_LV = self._feed([prompt], state)
        live, ended = [_Candidate((), ())], []
        for number, begin in enumerate(range(0, max_new, self._search.chunk), start=1):
            length = min(self._search.chunk, max_new - begin)
            new = self._scored(self._continue(live, state, logits_LV, len(prompt) + begin, length), prompt)
            kept = _best([*new, *ended], self._search.beams)
            self._log(number, new, kept)
            live = [candidate for candidate in kept if candidate.finish_reason is None]
            ended = [candidate for candidate in kept if candidate.finish_reason]
            if not live:
                break
            state.select(torch.tensor([candidate.parent for candidate in live], device=self._device))
            logits_LV = self._feed([candidate.token_ids[begin:] for candidate in live], state)
        return [candidate.guided() for candidate in kept]

    def _feed(self, tokens: Sequence[Sequence[int]], state: InferenceState) -> Tensor:
        """Bring a state up to date; logits_LV after the last tokens."""
        token_LN = torch.tensor(tokens, device=self._device)
        return prefill(self._model, token_LN, state, chunk=self._settings.prefill_chunk)

    def _continue(
        self, live: list[_Candidate], state: InferenceState, logits_LV: Tensor, position: int, length: int
    ) -> list[_Candidate]:
        """All continuations of a round, not scored; ``position`` is the place of their first new token."""
        found = []
        lanes = range(self._search.width)
        size = self._settings.max_batch_size
        for first in range(0, len(lanes), size):
            # dealt out in turn, so that each live sequence gets as many as the others
            parents = [lane % len(live) for lane in lanes[first : first + size]]
            uniforms_BN = [uniforms(self._seeds[lane], position, length) for lane in lanes[first : first + size]]
            rows = [live[parent].row(self._settings) for parent in parents]
            self._draw(rows, parents, torch.stack(uniforms_BN).to(self._device), state, logits_LV)
            found += [_Candidate.of(row, parent) for row, parent in zip(rows, parents)]
        return found

    def _draw(
        self,
        rows: list[Completion],
        parents: list[int],
        uniform_BN: Tensor,
        state: InferenceState,
        logits_LV: Tensor,
    ) -> None:
        """Give a batch of rows their new tokens; the state stays as it is."""
        row_B = torch.tensor(parents, device=self._device)
        logits_BV = logits_LV[row_B]
        length = uniform_BN.shape[1]
        copies = state.copies(row_B) if length > 1 else None
        for step in range(length):
            drawn_B = distributed.of_first_in_model(self._sampling.draw(logits_BV, uniform_BN[:, step]))
            for row, (token, log_prob) in zip(rows, tokens_with_log_probs(drawn_B, logits_BV, wanted=True)):
                if row.finish_reason is None:
                    row.add(token, log_prob)
            if step == length - 1 or all(row.finish_reason for row in rows):
                return
            logits_BV = forward_last(self._model, drawn_B[:, None], copies)

    def _scored(self, candidates: list[_Candidate], prompt: Sequence[int]) -> list[_Candidate]:
        before = list(prompt) if self._search.score_of == "sequence" else []
        texts = [tokenizer.decode([*before, *c.token_ids], skip_special_tokens=True) for c in candidates]
        scores = check_scores(self._score(texts), len(texts), "the scorer")
        return [candidate._replace(score=score) for candidate, score in zip(candidates, scores)]

    def _log(self, number: int, new: list[_Candidate], kept: list[_Candidate]) -> None:
        size, chunk = self._settings.max_new_tokens, self._search.chunk
        logger.info(
            "[GUIDE] %s: round %d of %d, %d bases, %d continuations, score best %.6g, mean %.6g; kept %s",
            self._name, number, math.ceil(size / chunk), min(number * chunk, size), len(new),
            max(c.score for c in new), math.fsum(c.score for c in new) / len(new),
            " ".join(f"{c.score:.6g}" for c in kept),
        )  # fmt: skip


def _best(candidates: list[_Candidate], count: int) -> list[_Candidate]:
    """The best that differ; the order among equals is that of ``Search.run``."""
    distinct: dict[tuple[Any, ...], _Candidate] = {}
    for candidate in candidates:
        # the same sequence twice would only be continued twice
        distinct.setdefault((candidate.token_ids, candidate.finish_reason), candidate)
    ordered = sorted(distinct.values(), key=lambda c: (-c.score, c.finish_reason is not None))
    return ordered[:count]
