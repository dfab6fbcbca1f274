# SPDX-License-Identifier: Apache-2.0
"""What each layer remembers of the tokens before, for prefill in chunks and for decoding one token at a time.

Made by ``StripedHyenaModel.new_inference_state``, reset here, and updated in place by the layers: nothing else holds
state between calls. Missing history is zeros, so a prompt may be shorter than any filter. Prompts of different lengths
are read group by group, each into its rows of the batch's caches (``rows``), and then decoded together (``begin_at``).
For sequences that come and go, see ``shared_caches``.
Shape legend: B batch, D channels, P tokens of history, M modes, N heads, S tokens, C channels per head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evo2_megatron.config import UserError

Rows = Tensor | slice
"""Numbers of sequences of a batch: copies of their caches, or for a slice the caches themselves."""


@dataclass(slots=True)
class FirState:
    """The last P inputs of a finite filter, oldest first."""

    inputs_BDP: Tensor

    def reset(self) -> None:
        self.inputs_BDP.zero_()

    def channels(self, channels: slice) -> FirState:
        """Those of some channels; bringing them up to date does so here, too."""
        return FirState(self.inputs_BDP[:, channels])

    def take(self, other: FirState, _num_seen: int) -> None:
        """Become a copy of another's."""
        self.inputs_BDP.copy_(other.inputs_BDP)

    def select(self, row_B: Rows) -> FirState:
        return FirState(self.inputs_BDP[row_B])

    def overwrite(self, rows: Rows, row_B: Tensor) -> None:
        self.inputs_BDP[rows] = self.inputs_BDP[row_B]

    def resized(self, batch_size: int, num_kept: int) -> FirState:
        """Room for so many sequences, of which the first are this state's first."""
        return FirState(_with_rows(self.inputs_BDP, batch_size, num_kept))


@dataclass(slots=True)
class ModalState:
    """The modes of a Hyena-LI filter, float32."""

    modes_BDM: Tensor

    def reset(self) -> None:
        self.modes_BDM.zero_()

    def channels(self, channels: slice) -> ModalState:
        """Those of some channels; bringing them up to date does so here, too."""
        return ModalState(self.modes_BDM[:, channels])

    def take(self, other: ModalState, _num_seen: int) -> None:
        """Become a copy of another's."""
        self.modes_BDM.copy_(other.modes_BDM)

    def select(self, row_B: Rows) -> ModalState:
        return ModalState(self.modes_BDM[row_B])

    def overwrite(self, rows: Rows, row_B: Tensor) -> None:
        self.modes_BDM[rows] = self.modes_BDM[row_B]

    def resized(self, batch_size: int, num_kept: int) -> ModalState:
        """Room for so many sequences, of which the first are this state's first."""
        return ModalState(_with_rows(self.modes_BDM, batch_size, num_kept))


@dataclass(slots=True)
class HyenaState:
    """One Hyena layer: its input convolution and its operator, and their filters as decoding uses them."""

    input_conv: FirState
    operator: FirState | ModalState
    input_taps_EK: Tensor
    """Float32 taps of the input convolution, one row per projection row."""

    operator_filter: tuple[Tensor, ...]
    """What the operator derives from its parameters once per sequence instead of once per token."""

    def reset(self) -> None:
        self.input_conv.reset()
        self.operator.reset()

    def take(self, other: HyenaState, num_seen: int) -> None:
        """Become a copy of another's."""
        self.input_conv.take(other.input_conv, num_seen)
        self.operator.take(other.operator, num_seen)

    def select(self, row_B: Rows) -> HyenaState:
        return replace(self, input_conv=self.input_conv.select(row_B), operator=self.operator.select(row_B))

    def overwrite(self, rows: Rows, row_B: Tensor) -> None:
        self.input_conv.overwrite(rows, row_B)
        self.operator.overwrite(rows, row_B)

    def resized(self, batch_size: int, num_kept: int, _max_tokens: int, _num_seen: int) -> HyenaState:
        """Room for so many sequences, of which the first are this state's first; tokens take none."""
        input_conv = self.input_conv.resized(batch_size, num_kept)
        return replace(self, input_conv=input_conv, operator=self.operator.resized(batch_size, num_kept))


@dataclass(slots=True)
class KeyValueState:
    """Keys, already rotated, and values of one attention layer; only the tokens seen so far are meaningful."""

    keys_BNSC: Tensor
    values_BNSC: Tensor

    def append(
        self, key_BNLC: Tensor, value_BNLC: Tensor, num_seen: int, seen_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store L new tokens after the old ones, of which there are ``num_seen``, or ``seen_B`` in each row and at
        most ``num_seen`` (then L is 1); return the keys and values up to the last new one."""
        end = num_seen + key_BNLC.shape[2]
        if seen_B is None:
            self.keys_BNSC[:, :, num_seen:end] = key_BNLC
            self.values_BNSC[:, :, num_seen:end] = value_BNLC
        else:
            row_B = torch.arange(len(seen_B), device=seen_B.device)
            self.keys_BNSC[row_B, :, seen_B] = key_BNLC[:, :, 0]
            self.values_BNSC[row_B, :, seen_B] = value_BNLC[:, :, 0]
        return self.keys_BNSC[:, :, :end], self.values_BNSC[:, :, :end]

    def reset(self) -> None:
        # beside a longer sequence, attention multiplies what is beyond the tokens seen by 0, and a NaN stays one
        self.keys_BNSC.zero_()
        self.values_BNSC.zero_()

    def take(self, other: KeyValueState, num_seen: int) -> None:
        """Become a copy of another's as far as seen, whose room may be of another length."""
        self.keys_BNSC[:, :, :num_seen] = other.keys_BNSC[:, :, :num_seen]
        self.values_BNSC[:, :, :num_seen] = other.values_BNSC[:, :, :num_seen]

    def select(self, row_B: Rows) -> KeyValueState:
        return KeyValueState(self.keys_BNSC[row_B], self.values_BNSC[row_B])

    def overwrite(self, rows: Rows, row_B: Tensor) -> None:
        self.keys_BNSC[rows] = self.keys_BNSC[row_B]
        self.values_BNSC[rows] = self.values_BNSC[row_B]

    def resized(self, batch_size: int, num_kept: int, max_tokens: int, num_seen: int) -> KeyValueState:
        """Room for so many sequences of ``max_tokens``, of which the first are this state's first as far as seen."""
        shape = (batch_size, self.keys_BNSC.shape[1], max_tokens, self.keys_BNSC.shape[3])
        resized = KeyValueState(self.keys_BNSC.new_zeros(shape), self.values_BNSC.new_zeros(shape))
        resized.keys_BNSC[:num_kept, :, :num_seen] = self.keys_BNSC[:num_kept, :, :num_seen]
        resized.values_BNSC[:num_kept, :, :num_seen] = self.values_BNSC[:num_kept, :, :num_seen]
        return resized


def _with_rows(x: Tensor, num_rows: int, num_kept: int) -> Tensor:
    resized = x.new_zeros(num_rows, *x.shape[1:])
    resized[:num_kept] = x[:num_kept]
    return resized


@dataclass(slots=True)
class InferenceState:
    """The caches of one batch of sequences, which advance together.

    Memory per sequence: two float tensors of ``max_tokens`` x H per attention layer, and a few hundred values per
    channel for each Hyena layer, whatever the length.
    """

    batch_size: int
    max_tokens: int
    layers: dict[int, HyenaState | KeyValueState]
    """By global layer number, counted from 1."""

    last_token_logits_only: bool = False
    """Project only the last of the new tokens to the vocabulary."""

    num_tokens_seen: int = 0
    """Of the longest sequence."""

    seen_B: Tensor | None = None
    """Tokens seen of each sequence, int64, where they differ; only single tokens can follow then."""

    fixed_shapes: bool = False
    """Attention looks at the whole room, hiding what is empty: no tensor of a step grows, as CUDA graphs want it."""

    def reset(self) -> None:
        """Forget everything seen; the same buffers serve the next batch."""
        self.num_tokens_seen, self.seen_B, self.fixed_shapes = 0, None, False
        for layer in self.layers.values():
            layer.reset()

    def advance(self, num_tokens: int) -> None:
        """Count tokens that the layers have seen."""
        self.num_tokens_seen += num_tokens
        if self.seen_B is not None:
            self.seen_B += num_tokens

    @contextlib.contextmanager
    def ahead(self, num_tokens: int) -> Iterator[None]:
        """Within the block, as if so many tokens more had been seen."""
        self.advance(num_tokens)
        try:
            yield
        finally:
            self.advance(-num_tokens)

    def fix_shapes(self, device: torch.device) -> None:
        """From now on only single tokens follow, and all steps are alike."""
        if self.seen_B is None:
            self.seen_B = torch.full((self.batch_size,), self.num_tokens_seen, device=device)
        self.fixed_shapes = True

    @property
    def num_before(self) -> int:
        """Places of keys and values before the new tokens."""
        return self.max_tokens - 1 if self.fixed_shapes else self.num_tokens_seen

    def changing(self) -> Iterator[Tensor]:
        """What a step with fixed shapes changes for good; it writes keys and values where nothing is yet."""
        yield self.seen_B
        for layer in self.layers.values():
            if isinstance(layer, HyenaState):
                yield layer.input_conv.inputs_BDP
                yield layer.operator.inputs_BDP if isinstance(layer.operator, FirState) else layer.operator.modes_BDM

    def rows(self, rows: slice) -> InferenceState:
        """Some of the sequences, with nothing seen, whose caches are this state's own: what they see, it has."""
        layers = {number: layer.select(rows) for number, layer in self.layers.items()}
        size = len(range(self.batch_size)[rows])
        return replace(self, layers=layers, batch_size=size, num_tokens_seen=0, seen_B=None)

    def overwrite(self, rows: Rows, row_B: Tensor) -> None:
        """Give the sequences ``rows`` copies of the caches of those with the numbers ``row_B``."""
        for layer in self.layers.values():
            layer.overwrite(rows, row_B)

    def begin_at(self, lengths: Sequence[int], device: torch.device) -> None:
        """Go on from caches that were filled through ``rows``; ``lengths``: tokens that each sequence has seen."""
        self.num_tokens_seen = max(lengths)
        self.seen_B = torch.tensor(lengths, device=device) if min(lengths) < max(lengths) else None

    def select(self, row_B: Tensor) -> None:
        """Replace the sequences by copies of those with the numbers ``row_B``, each as often as it is named.

        Layer by layer, so that only one layer's caches are there twice.
        """
        for number in self.layers:
            self.layers[number] = self.layers[number].select(row_B)
        self.batch_size = len(row_B)
        self.seen_B = None if self.seen_B is None else self.seen_B[row_B]

    def copies(self, row_B: Tensor) -> InferenceState:
        """As ``select``, but in a state of its own; this one stays as it is."""
        layers = {number: layer.select(row_B) for number, layer in self.layers.items()}
        seen_B = None if self.seen_B is None else self.seen_B[row_B]
        return replace(self, layers=layers, batch_size=len(row_B), seen_B=seen_B)

    def check_room(self, batch_size: int, num_tokens: int) -> None:
        """Raise UserError when ``num_tokens`` more do not fit."""
        assert batch_size == self.batch_size, f"batch of {batch_size} for a state of {self.batch_size}"
        total = self.num_tokens_seen + num_tokens
        if total > self.max_tokens:
            raise UserError(f"{total} tokens exceed the {self.max_tokens} that were allotted; raise --max-seq-length")
