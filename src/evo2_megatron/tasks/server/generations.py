# SPDX-License-Identifier: Apache-2.0
"""All generations that are on their way: who joins whom, and what they do at each turn of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evo2_megatron.tasks.generation.cache_memory import tokens_like_weights
from evo2_megatron.tasks.server.attempt import attempt
from evo2_megatron.tasks.server.decoding_slots import RunningBatch, assign, best_fit, make_room
from evo2_megatron.tasks.server.jobs import GenerateJob, Refused

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel


class Generations:
    """Batches that advance in turns.

    A short prompt is read at once and joins a batch. One of several pieces is read beside the batches, a piece at a
    turn, so that nobody waits for it, and its sequence joins one of them when it has been read.
    """

    def __init__(self, model: StripedHyenaModel, max_batch_size: int) -> None:
        """Of nobody yet; at most ``max_batch_size`` sequences at a time, for which there is memory."""
        self._model, self._max_batch_size = model, max_batch_size
        # another batch would read the weights once more, which takes longer than to read caches that are smaller
        self._negligible = tokens_like_weights(model)
        self._batches: list[RunningBatch] = []

    @property
    def num_sequences(self) -> int:
        return sum(batch.num_sequences for batch in self._batches)

    @property
    def jobs(self) -> list[GenerateJob]:
        """Of those who have not ended."""
        return [job for batch in self._batches for job in batch.jobs]

    def admit(self, jobs: Sequence[GenerateJob]) -> None:
        """Let jobs join the batches that run, or new ones."""
        how = {"new_batch": lambda: RunningBatch(self._model), "negligible": self._negligible}
        reading = assign([job for job in jobs if job.is_long], [], **how)
        joining = assign([job for job in jobs if not job.is_long], self._batches, **how)
        refused = attempt(make_room, joining | reading, self._max_batch_size)
        for batch, new in reading.items():
            if isinstance(refused, Refused):
                _refuse(new, refused)
            else:
                batch.begin(new)
                self._batches.append(batch)
        for batch, new in joining.items():
            if new:
                self._join(batch, new, refused)
        self._batches = [batch for batch in self._batches if batch.num_sequences]

    def _join(self, batch: RunningBatch, new: Sequence[GenerateJob], refused: Refused | None) -> None:
        not_read = attempt(batch.feed)
        if isinstance(not_read, Refused):
            batch.fail(not_read)
        no_room = refused or not_read or attempt(batch.join, new)
        if isinstance(no_room, Refused):
            _refuse(new, no_room)
        elif batch not in self._batches:
            self._batches.append(batch)

    def advance(self) -> int:
        """One more token for each sequence, and a piece of the oldest long prompt; the number of jobs answered."""
        self._merge()
        num_answered = 0
        reading = [batch for batch in self._batches if batch.is_reading]
        for batch in self._batches:
            if batch in reading[1:]:
                continue
            answered = attempt(batch.advance)
            if isinstance(answered, Refused):
                batch.fail(answered)
            else:
                num_answered += answered
        self._batches = [batch for batch in self._batches if batch.num_sequences]
        return num_answered

    def _merge(self) -> None:
        """Let batches that have just read their prompts join others; where memory does not allow it, they go on."""
        for batch in [batch for batch in self._batches if batch.has_read]:
            # one that has joined another is empty by now
            others = [other for other in self._batches if other is not batch and other.num_sequences]
            other = best_fit(batch.most_tokens(), others, negligible=self._negligible)
            if other is None:
                continue
            for each in (batch, other):
                not_read = attempt(each.feed)
                if isinstance(not_read, Refused):
                    each.fail(not_read)
            attempt(other.absorb, batch)
        self._batches = [batch for batch in self._batches if batch.num_sequences]

    def fail(self, refused: Refused) -> None:
        """Free everything and answer everyone."""
        for batch in self._batches:
            batch.fail(refused)
        self._batches = []


def _refuse(jobs: Sequence[GenerateJob], refused: Refused) -> None:
    for job in jobs:
        job.reply.put(refused)
