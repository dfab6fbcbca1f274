# SPDX-License-Identifier: Apache-2.0
"""What the engine does next, the same on all processes that share a copy of the model."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple

import torch

from evo2_megatron.runtime import distributed
from evo2_megatron.tasks.server.jobs import SILENT, GenerateJob, LayersJob, PassJob, VariantsJob

_FOREVER = timedelta(days=3650)  # that nobody asks anything for


class Turn(NamedTuple):
    """What is new when the engine looks."""

    generate: Sequence[GenerateJob]
    """Who begins to be generated."""

    other: Sequence[PassJob] | Sequence[LayersJob] | Sequence[VariantsJob]
    """What begins to be computed beside; nothing while something is."""

    dropped: frozenset[int]
    """Numbers of jobs under way for which nobody waits any more."""


class Turns:
    """Brings each turn of the first process, which hears clients, to the others, which do the same without a word."""

    def __init__(self) -> None:
        """Call it on all processes, inside their process groups; on others than the first, in the main thread."""
        processes, copies = distributed.world_size(), distributed.data_parallel_size()
        size = processes // copies
        self._first = distributed.rank() // size * size
        self._group = self._all = None
        if size > 1:
            # every process must make the groups of all copies, in the same order
            groups = [_new_group(range(first, first + size)) for first in range(0, processes, size)]
            self._group = groups[self._first // size]
        if processes > 1:
            self._all = _new_group(range(processes))

    @property
    def is_first(self) -> bool:
        """Whether this process decides."""
        return distributed.rank() == self._first

    def all_are_ready(self) -> None:
        """Return when all processes have come so far; signals are for the first of each copy from then on."""
        if self._all is None:
            return
        torch.distributed.barrier(self._all)
        if not self.is_first:
            # the first hears them too, finishes what was taken, and then sends the end
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        torch.distributed.barrier(self._all)

    def send(self, turn: Turn | None) -> None:
        """On the first process: have the others do the same; None: end."""
        if self._group is not None:
            silent = turn and Turn(*([replace(job, reply=SILENT) for job in jobs] for jobs in turn[:2]), turn.dropped)
            torch.distributed.broadcast_object_list([silent], src=self._first, group=self._group)

    def receive(self) -> Turn | None:
        """On another process: wait for the next."""
        received: list[Turn | None] = [None]
        torch.distributed.broadcast_object_list(received, src=self._first, group=self._group)
        return received[0]


def _new_group(ranks: range) -> torch.distributed.ProcessGroup:
    return torch.distributed.new_group(list(ranks), backend="gloo", timeout=_FOREVER)
