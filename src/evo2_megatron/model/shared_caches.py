# SPDX-License-Identifier: Apache-2.0
"""Caches of one batch whose sequences come and go at any time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from evo2_megatron.model.inference_state import InferenceState

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel


class SharedCaches:
    """The sequences present are the first rows of one room, and who comes is read into the rows behind them.

    So nothing is copied where there is room. When one leaves, the last takes its place: nobody is computed in vain,
    and one row is copied. The room grows to what is needed and no further. That copies all of it, which takes about as
    long as two steps read it, and is seldom: it keeps its size as sequences come and go. Layer by layer, so that only
    one layer's caches are there twice; if memory runs out then, the sequences present are as they were.
    """

    def __init__(self, model: StripedHyenaModel) -> None:
        """Allot nothing yet."""
        self._model = model
        self._device = next(model.parameters()).device
        self.clear()

    def clear(self) -> None:
        """Free everything."""
        self._room: InferenceState | None = None
        self._state: InferenceState | None = None
        self._lengths: list[int] = []  # at the time when the last came or left

    @property
    def state(self) -> InferenceState:
        """Of the sequences present, for the model to read and bring up to date."""
        assert self._state is not None
        return self._state

    @property
    def num_present(self) -> int:
        return len(self._lengths)

    @property
    def num_rows(self) -> int:
        """Sequences that there is room for."""
        return 0 if self._room is None else self._room.batch_size

    @property
    def max_tokens(self) -> int:
        """Tokens of each that there is room for."""
        return 0 if self._room is None else self._room.max_tokens

    def reserve(self, num_more: int, max_tokens: int) -> None:
        """Have room for so many more sequences of up to ``max_tokens`` tokens."""
        num_rows = max(self.num_present + num_more, self.num_rows)
        max_tokens = max(max_tokens, self.max_tokens)
        if self._room is None:
            self._room = self._model.new_inference_state(num_rows, max_tokens, last_token_logits_only=True)
        elif (num_rows, max_tokens) != (self.num_rows, self.max_tokens):
            self.resize(num_rows, max_tokens)

    def resize(self, num_rows: int, max_tokens: int) -> None:
        """Copy the sequences present into a room of another size."""
        room, num_kept = self._room, self.num_present
        num_seen = self._state.num_tokens_seen if self._state is not None else 0
        assert num_kept <= num_rows and num_seen <= max_tokens
        # where memory runs out on the way, both are what every layer has
        room.batch_size, room.max_tokens = min(room.batch_size, num_rows), min(room.max_tokens, max_tokens)
        for number in room.layers:
            room.layers[number] = room.layers[number].resized(num_rows, num_kept, max_tokens, num_seen)
            if self._state is not None:
                self._state.layers[number] = room.layers[number].select(slice(num_kept))
        room.batch_size, room.max_tokens = num_rows, max_tokens
        if self._state is not None:
            self._state.max_tokens = max_tokens

    def behind(self, first: int, count: int) -> InferenceState:
        """Empty caches of ``count`` sequences that may ``arrive``, from the number ``first`` of those on."""
        first += self.num_present
        part = self._room.rows(slice(first, first + count))
        part.reset()
        return part

    def arrive(self, lengths: Sequence[int]) -> None:
        """The next sequences behind, which have seen so many tokens, are present from now on."""
        self._show([*self._current_lengths(), *lengths])

    def take(self, other: SharedCaches) -> None:
        """Copy the sequences present in another's caches behind those here, after ``reserve``; the other stays."""
        lengths, num_seen = other._current_lengths(), other.state.num_tokens_seen
        room = self.behind(0, len(lengths))
        for number, layer in room.layers.items():
            layer.take(other.state.layers[number], num_seen)
        self.arrive(lengths)

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Drop the sequences with these numbers, not all.

        Returns:
            The former numbers of those that stay, in their new order.
        """
        leaving, lengths = set(rows), self._current_lengths()
        stay = [row for row in range(self.num_present) if row not in leaving]
        order = list(range(len(stay)))
        holes = [row for row in order if row in leaving]
        movers = stay[len(stay) - len(holes) :]
        for hole, mover in zip(holes, movers):
            order[hole] = mover
        if holes:
            self._room.overwrite(*(torch.tensor(rows, device=self._device) for rows in (holes, movers)))
        self._show([lengths[row] for row in order])
        return order

    def _current_lengths(self) -> list[int]:
        if not self._lengths:
            return []
        num_steps = self.state.num_tokens_seen - max(self._lengths)
        return [length + num_steps for length in self._lengths]

    def _show(self, lengths: list[int]) -> None:
        self._state, self._lengths = self._room.rows(slice(len(lengths))), lengths
        self._state.begin_at(lengths, self._device)
