# SPDX-License-Identifier: Apache-2.0
"""Generations on their way: batches that advance in turns, so that none waits for the end of another."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from evo2_megatron.tasks.completion import Generation
from evo2_megatron.tasks.generate import Decoding, plan_batches
from evo2_megatron.tasks.server.jobs import Generated, GenerateJob, Refused

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel


def batches_of(
    jobs: Sequence[GenerateJob], *, max_batch_size: int, max_seq_length: int
) -> Iterator[list[GenerateJob]]:
    """Divide jobs into batches that the model can take together: drawn alike, and of similar length.

    The caches of a batch have room for its longest prompt and its longest completion, which need not be of the same
    job: together they do not exceed ``max_seq_length`` tokens, for which there is memory.
    """
    groups: dict[object, list[GenerateJob]] = {}
    for job in jobs:
        groups.setdefault(job.shared_settings, []).append(job)
    for settings, group in groups.items():
        most_new = max(job.settings.max_new_tokens for job in group)
        settings = dataclasses.replace(settings, max_new_tokens=most_new, max_batch_size=max_batch_size)
        for planned in plan_batches([len(job.ids) for job in group], settings):
            batch: list[GenerateJob] = []
            for job in (group[index] for index in planned):
                if batch and _room([*batch, job]) > max_seq_length:
                    yield batch
                    batch = []
                batch.append(job)
            yield batch


def _room(jobs: Sequence[GenerateJob]) -> int:
    return max(len(job.ids) for job in jobs) + max(job.settings.max_new_tokens for job in jobs)


class RunningBatch:
    """Sequences that advance together; each is answered as soon as it has ended."""

    def __init__(self, model: StripedHyenaModel, jobs: Sequence[GenerateJob]) -> None:
        """Compute nothing yet."""
        self.jobs = list(jobs)
        settings = dataclasses.replace(
            jobs[0].shared_settings,
            max_new_tokens=max(job.settings.max_new_tokens for job in jobs),
            return_log_probs=any(job.settings.return_log_probs for job in jobs),
        )
        self._decoding = Decoding(model, settings, [job.ids for job in jobs], seeds=[job.seed for job in jobs])
        # lengths and stop strings are each sequence's own
        self._decoding.rows[:] = [job.settings.new_completion() for job in jobs]
        self._steps = self._decoding.steps()
        self._answered = [False] * len(jobs)
        self._logits: list[list[list[float]]] = [[] for _ in jobs]
        self._step_ms: list[list[float]] = [[] for _ in jobs]
        self._num_released = [0] * len(jobs)
        self._last = time.perf_counter()

    def advance(self) -> int | None:
        """One more token each; the number of jobs that it answered, or None if all were before.

        Raises:
            UserError: The model's output is not finite.
        """
        for job, row in zip(self.jobs, self._decoding.rows):
            if job.reply.cancelled and row.finish_reason is None:
                row.finish_reason = "stop"  # the others go on without it
        if all(row.finish_reason for row in self._decoding.rows) or next(self._steps, self) is self:
            return None
        now = time.perf_counter()
        answered = sum(self._deliver(place, (now - self._last) * 1000) for place in range(len(self.jobs)))
        self._last = now
        return answered

    @property
    def num_sequences(self) -> int:
        """How many have caches."""
        return self._decoding.num_sequences

    def close(self) -> None:
        """Free the caches."""
        self._steps.close()

    def fail(self, refused: Refused) -> None:
        """Answer everyone who still waits."""
        self.close()
        for job in self.unanswered():
            job.reply.put(refused)

    def unanswered(self) -> list[GenerateJob]:
        """Who still waits."""
        return [job for job, answered in zip(self.jobs, self._answered) if not (answered or job.reply.cancelled)]

    def _deliver(self, place: int, milliseconds: float) -> bool:
        job, row = self.jobs[place], self._decoding.rows[place]
        if self._answered[place] or job.reply.cancelled:
            return False
        self._step_ms[place].append(milliseconds)
        if job.wants_logits:
            self._logits[place].append(self._decoding.logits_of(place).float().tolist())
        if job.wants_pieces:
            self._send_piece(place)
        if row.finish_reason is None:
            return False
        self._answered[place] = True
        generation = row.generation(log_probs=job.settings.return_log_probs)
        # the token that ended the document is no part of the result
        num_new = len(generation.token_ids)
        job.reply.put(Generated(generation, self._logits[place][:num_new], self._step_ms[place][:num_new]))
        return True

    def _send_piece(self, place: int) -> None:
        job = self.jobs[place]
        ids, log_probs = self._decoding.rows[place].release()
        # a job whose first batch failed has had the beginning already
        first = max(job.num_sent - self._num_released[place], 0)
        self._num_released[place] += len(ids)
        if ids[first:]:
            job.num_sent = self._num_released[place]
            job.reply.put(Generation(ids[first:], None, log_probs[first:] if job.settings.return_log_probs else None))
