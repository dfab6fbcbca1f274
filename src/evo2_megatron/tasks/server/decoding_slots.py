# SPDX-License-Identifier: Apache-2.0
"""Generations on their way: batches that advance in turns, and that others join as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from evo2_megatron.tasks.forward import OUTPUT_NOT_FINITE
from evo2_megatron.tasks.generation.completion import Generation
from evo2_megatron.tasks.generation.decoding import Decoding, Row
from evo2_megatron.tasks.generation.generate import fit_together
from evo2_megatron.tasks.server.jobs import Generated, GenerateJob, Refused

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel


_DONE = object()


def assign(
    jobs: Sequence[GenerateJob],
    running: Sequence[RunningBatch],
    new_batch: Callable[[], RunningBatch],
    *,
    negligible: int,
) -> dict[RunningBatch, list[GenerateJob]]:
    """Which jobs join which batch: of those that they ``fit_together`` with, the one whose caches grow least.

    Args:
        jobs: Who wants to join.
        running: The batches there are.
        new_batch: Makes one of nobody yet.
        negligible: Tokens that the caches of a batch may hold whatever its sequences need.

    Returns:
        All running batches, also those that nobody joins, as nobody does while prompts are read; then the new ones.
    """
    joining: dict[RunningBatch, list[GenerateJob]] = {batch: [] for batch in running}
    lengths = {batch: batch.most_tokens() for batch in running if not batch.is_reading}
    for job in sorted(jobs, key=lambda job: job.most_tokens):
        batch = _best_fit([job.most_tokens], lengths, negligible) or new_batch()
        joining.setdefault(batch, []).append(job)
        lengths.setdefault(batch, []).append(job.most_tokens)
    return joining


def best_fit(new: Sequence[int], batches: Sequence[RunningBatch], *, negligible: int) -> RunningBatch | None:
    """Of the batches that sequences of ``new`` tokens ``fit_together`` with, the one whose caches grow least."""
    lengths = {batch: batch.most_tokens() for batch in batches if not batch.is_reading}
    return _best_fit(new, lengths, negligible)


def _best_fit(
    new: Sequence[int], lengths: Mapping[RunningBatch, Sequence[int]], negligible: int
) -> RunningBatch | None:
    growth = {}
    for batch, before in lengths.items():
        after = [*before, *new]
        if fit_together(len(after), max(after), sum(after), negligible=negligible):
            growth[batch] = len(after) * max(after) - len(before) * max(before)
    return min(growth, key=growth.__getitem__) if growth else None


def make_room(joining: Mapping[RunningBatch, Sequence[GenerateJob]], max_batch_size: int) -> None:
    """Before jobs join: no more caches than for ``max_batch_size`` sequences in all, for which there is memory.

    Some may be left of sequences that have ended.
    """
    later = {batch: batch.num_sequences + len(jobs) for batch, jobs in joining.items()}
    if sum(max(batch.num_cache_rows, num_sequences) for batch, num_sequences in later.items()) > max_batch_size:
        for batch, num_sequences in later.items():
            batch.shrink_caches(num_sequences)


@dataclass(kw_only=True, eq=False, slots=True)
class _Running:
    """One job and what is known of it so far."""

    job: GenerateJob
    row: Row
    last: float
    """Time of the newest token, or when it joined."""

    logits: list[list[float]] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)


def _rows_of(jobs: Sequence[GenerateJob]) -> list[_Running]:
    start = time.perf_counter()
    return [
        _Running(job=job, row=Row(prompt=job.ids, seed=job.seed, settings=job.settings), last=start) for job in jobs
    ]


class RunningBatch:
    """Sequences that advance together, however each is drawn; each is answered as soon as it has ended."""

    def __init__(self, model: StripedHyenaModel) -> None:
        """Of nobody yet."""
        self._decoding = Decoding(model)
        self._running: list[_Running] = []
        self._reading: Generator[None, None, None] | None = None

    def feed(self) -> None:
        """Have the model read what was drawn, which comes before ``join``; if that fails, nobody can go on."""
        self._decoding.feed()

    def join(self, jobs: Sequence[GenerateJob]) -> None:
        """Read the prompts of more jobs, after ``feed``; if that fails, the others can go on."""
        new = _rows_of(jobs)
        self._decoding.join([each.row for each in new])
        self._running += new

    def begin(self, jobs: Sequence[GenerateJob]) -> None:
        """Let ``advance`` read the prompts of the first jobs of this batch, a piece each time."""
        assert not self._running
        self._running = _rows_of(jobs)
        self._reading = self._decoding.joining([each.row for each in self._running])

    @property
    def is_reading(self) -> bool:
        """Whether prompts are being read, so that nobody can join."""
        return self._reading is not None

    @property
    def has_read(self) -> bool:
        """Whether prompts have been read, and no token been drawn yet."""
        return not self.is_reading and not any(each.row.completion.token_ids for each in self._running)

    def absorb(self, other: RunningBatch) -> None:
        """Take over who is in another batch, after ``feed`` of both; if that fails, both can go on."""
        self._decoding.absorb(other._decoding)
        self._running += other._running
        other._running = []

    def advance(self) -> int:
        """One more token each, or one more piece of the prompts; the number of jobs that it answered."""
        for each in self._running:
            each.row.cancelled = each.job.dropped
        if self._reading is not None:
            self._read_on(self._reading)
            return 0
        self._decoding.advance()
        num_answered = sum(self._deliver(each) for each in self._running if not each.row.cancelled)
        self._running = [each for each in self._running if not each.row.ended]
        return num_answered

    def _read_on(self, reading: Generator[None, None, None]) -> None:
        self._running = [each for each in self._running if not each.row.ended]
        if not self._running:
            self._free()
        elif next(reading, _DONE) is _DONE:
            self._reading = None

    def _free(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None
        self._decoding.close()

    @property
    def jobs(self) -> list[GenerateJob]:
        """Of those who have not ended."""
        return [each.job for each in self._running]

    def most_tokens(self) -> list[int]:
        """Of each sequence at its end."""
        return [each.row.most_tokens for each in self._running]

    @property
    def num_sequences(self) -> int:
        """How many have not ended."""
        return len(self._running)

    @property
    def num_cache_rows(self) -> int:
        """How many the caches have room for."""
        return self._decoding.num_cache_rows

    def shrink_caches(self, num_sequences: int) -> None:
        """Have room for no more than so many, of which those who run are some."""
        if not self.is_reading:  # else they have the size that their sequences need
            self._decoding.shrink_caches(num_sequences)

    def fail(self, refused: Refused) -> None:
        """Free the caches and answer everyone who still waits."""
        self._free()
        for each in self._running:
            each.job.reply.put(refused)
        self._running = []

    def _deliver(self, each: _Running) -> bool:
        """Hand out what is new; whether that was the end."""
        job, completion = each.job, each.row.completion
        if each.row.failed:
            job.reply.put(Refused(500, OUTPUT_NOT_FINITE))
            return True
        now = time.perf_counter()
        each.step_ms.append((now - each.last) * 1000)
        each.last = now
        if job.wants_logits:
            each.logits.append(self._decoding.logits_of(each.row).float().tolist())
        if job.wants_pieces:
            ids, log_probs = completion.release()
            if ids:
                job.reply.put(Generation(ids, None, log_probs if job.settings.return_log_probs else None))
        if completion.finish_reason is None:
            return False
        generation = completion.generation(log_probs=job.settings.return_log_probs)
        # the token that ended the document is no part of the result
        num_new = len(generation.token_ids)
        job.reply.put(Generated(generation, each.logits[:num_new], each.step_ms[:num_new]))
        return True
