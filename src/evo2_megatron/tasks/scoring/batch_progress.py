# SPDX-License-Identifier: Apache-2.0
"""What a run over batches of sequences shows of how far it is, and its figures at the end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
from tqdm import tqdm

from evo2_megatron.runtime import distributed, megatron

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class Words(NamedTuple):
    """What a run does, in log lines."""

    doing: str
    """In front of the bar: "Predicting"."""

    done: str
    """In front of a number: "Predicted"."""

    unit: str
    """What is counted: "sequences"."""


class BatchProgress:
    """On rank 0: a bar on a terminal, elsewhere a log line every few seconds: how far, how fast, how long still.

    Copies of the model have batches of about the same sizes, so that one stands for all.
    """

    def __init__(self, tokens: Sequence[int], words: Words) -> None:
        """``tokens``: of each batch that is to be run here."""
        self._words = words
        self._tokens, self._copies = list(tokens), distributed.data_parallel_size()
        self._batches = self._units = self._done = 0
        self._start = self._last_shown = time.perf_counter()
        self._bar = None
        if distributed.rank() == 0 and sys.stderr.isatty():
            total = self._copies * sum(tokens)
            self._bar = tqdm(total=total, unit="base", unit_scale=True, desc=words.doing, dynamic_ncols=True)

    def advance(self, num_units: int) -> None:
        """One more batch is done, with so many of what ``words.unit`` names."""
        tokens = self._tokens[self._batches] * self._copies
        self._batches += 1
        self._units += num_units * self._copies
        self._done += tokens
        if self._bar is not None:
            self._bar.update(tokens)
        now = time.perf_counter()
        if self._bar is not None or distributed.rank() != 0 or now - self._last_shown < _SECONDS_BETWEEN_LINES:
            return
        self._last_shown = now
        seconds, total = now - self._start, self._copies * sum(self._tokens)
        left = timedelta(seconds=round(seconds * (total - self._done) / self._done))
        logger.info(
            "%s %d %s, %.0f %% of the bases, %.1f %s/s, %.0f bases/s, time left %s",
            self._words.done, self._units, self._words.unit, 100 * self._done / total,
            self._units / seconds, self._words.unit, self._done / seconds, left,
        )  # fmt: skip

    def finish(self) -> None:
        """Figures of the whole run; writing is part of the time, loading is not."""
        if self._bar is not None:
            self._bar.close()
        # of all copies, one process each
        counts = torch.tensor([self._units, self._done], device=megatron.device()) // self._copies
        if not distributed.is_model_parallel_writer():
            counts.zero_()
        torch.distributed.all_reduce(counts)
        if distributed.rank() == 0:
            seconds, (num_units, num_tokens) = time.perf_counter() - self._start, counts.tolist()
            logger.info(
                "%s %d %s, %d tokens in %.2f s: %.1f %s/s, %.0f tokens/s",
                self._words.done, num_units, self._words.unit, num_tokens, seconds,
                num_units / seconds, self._words.unit, num_tokens / seconds,
            )  # fmt: skip
