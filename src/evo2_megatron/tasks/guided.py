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

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from evo2_megatron.config import Fp8Choice, ParallelConfig, UserError
from evo2_megatron.data import tokenizer
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks import records as record_files
from evo2_megatron.tasks.cache_memory import memory_limit
from evo2_megatron.tasks.completion import Completion, FinishReason, Generation
from evo2_megatron.tasks.generate import GenerationSettings, forward_last, prefill, tokens_with_log_probs
from evo2_megatron.tasks.generation_model import GenerationCheckpoint, check_layout, find_checkpoint, running_model
from evo2_megatron.tasks.prompts import Prompt, encode_prompt
from evo2_megatron.tasks.records import Record, RecordFile
from evo2_megatron.tasks.sampling import derive_seed, draw, uniforms
from evo2_megatron.tasks.scorers import Score, check_scores

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
        row.token_ids += self.token_ids
        row.log_probs += self.log_probs
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
        """
        self._model, self._settings, self._search, self._score, self._name = model, settings, search, score, name
        self._seeds = [derive_seed(seed, sample=lane) for lane in range(search.width)]
        self._device = next(model.parameters()).device
        self._blocked_V = settings.blocked(model.vocab_size, self._device)

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
            drawn_B = draw(logits_BV, uniform_BN[:, step], self._settings.sampling, blocked_V=self._blocked_V)
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


class _Start(NamedTuple):
    """A prompt to search from."""

    prompt: Prompt
    token_ids: list[int]
    seed: int

    def record(self, rank: int, guided: Guided, settings: GenerationSettings) -> Record:
        """``rank``: number of the sequence in its search, from 0, the best."""
        new, log_probs = guided.generation, guided.generation.log_probs
        if not settings.return_log_probs:
            new = new._replace(log_probs=None)
        record = record_files.make_record(
            self.prompt, new, num_prompt_tokens=len(self.token_ids), seed=self.seed, sample=rank
        )
        record["score"] = guided.score
        record["log_prob_mean"] = math.fsum(log_probs) / len(log_probs) if log_probs else None
        return record


def guide(
    prompts: Sequence[Prompt],
    ckpt_dir: Path,
    settings: GenerationSettings,
    search: SearchSettings,
    score: Score,
    *,
    max_seq_length: int | None = None,
    parallel: ParallelConfig = ParallelConfig(),
    precision: str | None = None,
    provider_overrides: Mapping[str, Any] | None = None,
    base_ckpt_dir: Path | None = None,
    fp8: Fp8Choice = "as_asked",
    with_self_test: bool = False,
    output_file: Path | None = None,
    output_format: str | None = None,
    include_prompt: bool = False,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Search from each prompt with the model of a checkpoint, one prompt after the other; every process calls this.

    Args:
        prompts: Where to start; a seed of a prompt comes before the settings'.
        ckpt_dir: A Megatron Bridge checkpoint, or a folder of iterations.
        settings: How tokens are drawn, and how many; the tokenizer's size is filled in.
        search: How wide.
        score: Called on rank 0 with a list of strings; one number for each, higher is better.
        max_seq_length: As for ``tasks.infer.infer``, like what follows; there is one copy of the model.
        on_record: Called on rank 0 with each record as its search ends.

    Returns:
        On rank 0, for each prompt at most ``search.beams`` records, best first, with ``score`` and ``log_prob_mean``,
        which is in nat per new base; nothing on other ranks. A record's seed is that of its prompt's search.

    Raises:
        UserError: Something about the checkpoint, the prompts, the settings or the scorer is wrong; no output file is
            written.
    """
    _check_processes(parallel)
    checkpoint = find_checkpoint(ckpt_dir, base_ckpt_dir)
    settings = dataclasses.replace(settings, vocab_size=checkpoint.vocab_size)
    settings.check_vocabulary(checkpoint.vocab_size)
    starts = _starts(prompts, checkpoint, settings)
    if max_seq_length is None:
        _check_lengths(starts, settings, checkpoint.seq_length, "that the checkpoint was trained for")
    else:
        _check_lengths(starts, settings, max_seq_length, "of --max-seq-length")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_output(starts, search, output_file, output_format, include_prompt))
        how = {"precision": precision, "provider_overrides": provider_overrides, "fp8": fp8}
        running = running_model(checkpoint, parallel=parallel, with_self_test=with_self_test, **how)
        model = stack.enter_context(running)
        if max_seq_length is None:
            rows = search.beams + min(search.width, settings.max_batch_size)
            _check_lengths(starts, settings, memory_limit(model, rows), "that the caches have memory for")
        records: list[Record] = []
        for start in starts:
            run = Search(model, settings, search, _for_every_rank(score), seed=start.seed, name=start.prompt.id)
            found = run.run(start.token_ids)
            if distributed.rank() != 0:
                continue
            new = [start.record(rank, guided, settings) for rank, guided in enumerate(found)]
            records += new
            if file is not None:
                file.add(new)
            for record in new if on_record else ():
                on_record(record)
        if file is not None:
            file.finish(records)
        return records


def _check_processes(parallel: ParallelConfig) -> None:
    check_layout(parallel)
    if distributed.world_size() > parallel.model_size:
        raise UserError(
            f"a search is done by one copy of the model, which takes {parallel.model_size} of the "
            f"{distributed.world_size()} processes; start as many, or run evo2_guide once for each part of the prompts"
        )


def _starts(prompts: Sequence[Prompt], checkpoint: GenerationCheckpoint, settings: GenerationSettings) -> list[_Start]:
    starts = []
    for number, prompt in enumerate(prompts):
        base, own = (settings.sampling.seed, number) if prompt.seed is None else (prompt.seed, 0)
        ids = encode_prompt(prompt, checkpoint.vocab_size)
        starts.append(_Start(prompt, ids, derive_seed(base, prompt=own)))
    return starts


def _check_lengths(starts: Sequence[_Start], settings: GenerationSettings, limit: int, whose: str) -> None:
    for start in starts:
        if len(start.token_ids) + settings.max_new_tokens > limit:
            raise UserError(
                f"Prompt {start.prompt.id!r} has {len(start.token_ids)} tokens, which with {settings.max_new_tokens} "
                f"new ones exceeds the {limit} {whose}; shorten it, lower --max-new-tokens, --beams or "
                "--max-batch-size, or raise --max-seq-length"
            )


def _output(
    starts: Sequence[_Start], search: SearchSettings, path: Path | None, format_name: str | None, include_prompt: bool
) -> contextlib.AbstractContextManager[RecordFile | None]:
    """The file to write, on rank 0; UserError if its format does not suit the records."""
    if format_name is None:
        format_name = "jsonl" if path is None else record_files.format_of(Path(path))
    names = [record_files.sequence_name(start.prompt.id, k) for start in starts for k in range(search.beams)]
    record_files.check_format(format_name, names, include_prompt=include_prompt)
    if path is None or distributed.rank() != 0:
        return contextlib.nullcontext()
    return RecordFile(path, format_name=format_name, include_prompt=include_prompt)


def _for_every_rank(score: Score) -> Score:
    """Let rank 0 ask the scorer, and tell the others what it said."""
    if distributed.world_size() == 1:
        return score

    def shared(sequences: list[str]) -> Sequence[float]:
        answer: list[Any] = [None, None]
        if distributed.rank() == 0:
            try:
                answer[0] = check_scores(score(sequences), len(sequences), "the scorer")
            except UserError as error:
                answer[1] = str(error)
        torch.distributed.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    return shared
