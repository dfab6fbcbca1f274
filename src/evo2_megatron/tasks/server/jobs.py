# SPDX-License-Identifier: Apache-2.0
"""What requests become for the engine, and how its answers reach the event loop.

Shape legend: L tokens of a sequence, V vocabulary, H channels of a layer's output, X what a result has per sequence.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from evo2_megatron.tasks.generation.completion import Generation
from evo2_megatron.tasks.generation.generate import GenerationSettings
from evo2_megatron.tasks.scoring.batching import Item
from evo2_megatron.tasks.scoring.prediction_settings import Output
from evo2_megatron.tasks.scoring.variant_windows import Group


class Refused(Exception):
    """Why a request gets no result."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        """``status``: of HTTP. ``retry_after``: seconds after which it is worth asking again."""
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class Generated(NamedTuple):
    """The end of a generation."""

    generation: Generation
    logits: list[list[float]]
    """Of each new token, if asked for."""

    step_ms: list[float]
    """Milliseconds until each new token, since the one before; of the first, since the prompt began to be read."""


class Vectors(NamedTuple):
    """Results of whole sequences: for each a dictionary of arrays, trimmed to its tokens."""

    rows: list[dict[str, np.ndarray]]


class Reply:
    """Brings events from the engine's thread to the coroutine that waits for them; make it inside the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Generation | Generated | Vectors | Refused] = asyncio.Queue()
        self.cancelled = False
        """Nobody waits any more."""

    def put(self, event: Generation | Generated | Vectors | Refused) -> None:
        """Called by the engine."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def get(self) -> Generation | Generated | Vectors:
        """The next event; raises it if it is ``Refused``."""
        event = await self._events.get()
        if isinstance(event, Refused):
            raise event
        return event


class _SilentReply(Reply):
    """Of a process that no client hears."""

    def __init__(self) -> None:
        self.cancelled = False

    def put(self, event: Generation | Generated | Vectors | Refused) -> None:
        pass


SILENT = _SilentReply()


@dataclass(kw_only=True, eq=False, slots=True)
class _Job:
    reply: Reply = field(default_factory=Reply)
    number: int = 0
    """Given by the engine."""

    dropped: bool = False
    """Set by the engine when it has seen that the reply is cancelled, on all processes in the same turn."""


@dataclass(kw_only=True, eq=False, slots=True)
class GenerateJob(_Job):
    """One sequence to continue; the reply gets pieces as ``Generation`` if they are wanted, then ``Generated``."""

    ids: list[int]
    seed: int
    settings: GenerationSettings
    wants_pieces: bool = False
    wants_logits: bool = False

    @property
    def most_tokens(self) -> int:
        """Of prompt and completion."""
        return len(self.ids) + self.settings.max_new_tokens

    @property
    def is_long(self) -> bool:
        """Whether its prompt goes through the model in several pieces."""
        return 0 < self.settings.prefill_chunk < len(self.ids)


@dataclass(kw_only=True, eq=False, slots=True)
class PassJob(_Job):
    """Whole sequences to score or embed; the reply gets ``Vectors`` with what a ``Runner`` gives for ``output``."""

    items: list[Item]
    output: Output
    rows: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(item["tokens"]) for item in self.items)


@dataclass(kw_only=True, eq=False, slots=True)
class LayersJob(_Job):
    """One sequence of which the outputs of modules are wanted; the reply gets ``Vectors`` of one row, [L, 1, X]."""

    item: Item
    modules: list[str]


@dataclass(kw_only=True, eq=False, slots=True)
class VariantsJob(_Job):
    """Windows of variants beside those of the reference; the reply gets ``Vectors`` with a row for each comparison of
    the groups: ``reference``, ``alternative`` and ``num_scored``, scalars."""

    groups: list[Group]
    items: list[Item]
    """Of ``allele_scoring.make_item`` for each group."""


Job = GenerateJob | PassJob | LayersJob | VariantsJob
