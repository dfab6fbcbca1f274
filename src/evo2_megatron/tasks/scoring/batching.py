# SPDX-License-Identifier: Apache-2.0
"""Which sequences go through the model together, and what happens when memory does not suffice for them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from evo2_megatron.config import UserError
from evo2_megatron.runtime import megatron
from evo2_megatron.runtime.out_of_memory import is_out_of_memory
from evo2_megatron.tasks.scoring.prediction_files import concatenate
from evo2_megatron.tasks.steps import finished

logger = logging.getLogger(__name__)

BATCH_TOKENS_CUDA = 65_536
BATCH_TOKENS_CPU = 2_048
"""Tokens of a batch unless told otherwise: enough to keep the device busy, few enough for a small one's memory. A CPU
is busy with 2,048, and more leave its caches: sequences of some thousand bases took 1.6 times as long by 16,384."""

MIN_CHUNK = 256
"""Pieces are not made shorter than this: what is left then is the model itself."""

Item = dict[str, Tensor]
Batch = dict[str, Tensor]
Steps = Callable[[Sequence[Item]], Generator[None, None, Batch | None]]


def batch_tokens() -> int:
    """What suits this machine."""
    return BATCH_TOKENS_CUDA if megatron.on_cuda() else BATCH_TOKENS_CPU


def plan_batches(lengths: Sequence[int], *, max_tokens: int, max_sequences: int | None = None) -> list[list[int]]:
    """Put sequences of similar length together, the longest first: what does not fit into memory shows at once.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Most tokens of a batch, padding included; a longer sequence is a batch by itself.
        max_sequences: Most sequences of a batch.

    Returns:
        Positions in ``lengths``, each once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        last = batches[-1] if batches else None
        # the first is the longest, so that it is what the others are padded to
        if last is None or len(last) == max_sequences or (len(last) + 1) * lengths[last[0]] > max_tokens:
            batches.append([index])
        else:
            last.append(index)
    return batches


class RunsBatches(Protocol):
    """What runs a batch, as ``prediction_runner.Runner`` does."""

    chunk_length: int
    """Tokens of the pieces that long sequences go through in."""

    def __call__(self, items: Sequence[Item]) -> Batch | None: ...


class Backoff:
    """Runs batches; one that does not fit into memory is run in halves, and then one sequence in shorter pieces."""

    def __init__(self, runner: RunsBatches, *, can_split: bool) -> None:
        """``can_split``: False where other processes take part in a batch, which could not follow."""
        self._runner, self._can_split = runner, can_split
        self._max_tokens: float = float("inf")

    def __call__(self, items: Sequence[Item]) -> Batch | None:
        """What the runner gives for these sequences.

        Raises:
            UserError: There is not memory enough for one sequence in the shortest pieces.
        """
        return finished(self._run(items, _whole(self._runner)))

    def in_pieces(self, items: Sequence[Item]) -> Generator[None, None, Batch | None]:
        """As a call, with an item after each piece, of a runner that has ``in_pieces``."""
        return self._run(items, self._runner.in_pieces)

    def _run(self, items: Sequence[Item], run: Steps) -> Generator[None, None, Batch | None]:
        num_tokens = len(items) * max(len(item["tokens"]) for item in items)
        if num_tokens <= self._max_tokens or len(items) == 1:
            failed, result = yield from _try(run, items)
            if not failed:
                return result
            self._shrink(items, num_tokens)
            return (yield from self._run(items, run))
        middle = len(items) // 2
        first = yield from self._run(items[:middle], run)
        return concatenate([first, (yield from self._run(items[middle:], run))])

    def _shrink(self, items: Sequence[Item], num_tokens: int) -> None:
        longest = max(len(item["tokens"]) for item in items)
        advice = f"{len(items)} sequence(s) of up to {longest} tokens"
        if not self._can_split:
            raise UserError(
                f"not enough memory for {advice}; lower --max-batch-tokens or --chunk-length, or use more processes"
            )
        if len(items) > 1:
            self._max_tokens = num_tokens // 2
            logger.warning("Not enough memory for %s; going on with batches half as large", advice)
            return
        shorter = min(self._runner.chunk_length, longest) // 2
        if shorter < MIN_CHUNK:
            raise UserError(f"not enough memory for {advice}, even in pieces of {2 * shorter}; use more processes")
        self._runner.chunk_length = shorter
        logger.warning("Not enough memory for %s; going on in pieces of %d tokens", advice, shorter)


def _whole(run: Callable[[Sequence[Item]], Batch | None]) -> Steps:
    def steps(items: Sequence[Item]) -> Generator[None, None, Batch | None]:
        yield
        return run(items)

    return steps


def _try(run: Steps, items: Sequence[Item]) -> Generator[None, None, tuple[bool, Batch | None]]:
    """Whether memory ran out, and the result if not. The error, which holds what was computed, is gone by then."""
    try:
        return False, (yield from run(items))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()
    torch.cuda.empty_cache()
    return True, None
