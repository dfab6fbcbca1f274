# SPDX-License-Identifier: Apache-2.0
"""What each layer remembers of the tokens before, for prefill in chunks and for decoding one token at a time.

Made by ``StripedHyenaModel.new_inference_state``, reset here, and updated in place by the layers: nothing else holds
state between calls. Missing history is zeros, so a prompt may be shorter than any filter.
Shape legend: B batch, D channels, P tokens of history, M modes, N heads, S tokens, C channels per head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from evo2_megatron.config import UserError


@dataclass(slots=True)
class FirState:
    """The last P inputs of a finite filter, oldest first."""

    inputs_BDP: Tensor

    def reset(self) -> None:
        self.inputs_BDP.zero_()

    def select(self, row_B: Tensor) -> FirState:
        return FirState(self.inputs_BDP[row_B])


@dataclass(slots=True)
class ModalState:
    """The modes of a Hyena-LI filter, float32."""

    modes_BDM: Tensor

    def reset(self) -> None:
        self.modes_BDM.zero_()

    def select(self, row_B: Tensor) -> ModalState:
        return ModalState(self.modes_BDM[row_B])


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

    def select(self, row_B: Tensor) -> HyenaState:
        return HyenaState(
            self.input_conv.select(row_B), self.operator.select(row_B), self.input_taps_EK, self.operator_filter
        )


@dataclass(slots=True)
class KeyValueState:
    """Keys, already rotated, and values of one attention layer; only the tokens seen so far are meaningful."""

    keys_BNSC: Tensor
    values_BNSC: Tensor

    def append(self, key_BNLC: Tensor, value_BNLC: Tensor, num_seen: int) -> tuple[Tensor, Tensor]:
        """Store L new tokens after the ``num_seen`` old ones; return the keys and values of all of them."""
        end = num_seen + key_BNLC.shape[2]
        self.keys_BNSC[:, :, num_seen:end] = key_BNLC
        self.values_BNSC[:, :, num_seen:end] = value_BNLC
        return self.keys_BNSC[:, :, :end], self.values_BNSC[:, :, :end]

    def reset(self) -> None:
        """Nothing to clear: tokens beyond those seen are never read."""

    def select(self, row_B: Tensor) -> KeyValueState:
        return KeyValueState(self.keys_BNSC[row_B], self.values_BNSC[row_B])


@dataclass(slots=True)
class InferenceState:
    """The caches of one batch of sequences of equal length so far.

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

    def reset(self) -> None:
        """Forget everything seen; the same buffers serve the next batch."""
        self.num_tokens_seen = 0
        for layer in self.layers.values():
            layer.reset()

    def select(self, row_B: Tensor) -> None:
        """Replace the sequences by copies of those with the numbers ``row_B``, each as often as it is named.

        Layer by layer, so that only one layer's caches are there twice.
        """
        for number in self.layers:
            self.layers[number] = self.layers[number].select(row_B)
        self.batch_size = len(row_B)

    def copies(self, row_B: Tensor) -> InferenceState:
        """As ``select``, but in a state of its own; this one stays as it is."""
        layers = {number: layer.select(row_B) for number, layer in self.layers.items()}
        return replace(self, layers=layers, batch_size=len(row_B))

    def check_room(self, batch_size: int, num_tokens: int) -> None:
        """Raise UserError when ``num_tokens`` more do not fit."""
        assert batch_size == self.batch_size, f"batch of {batch_size} for a state of {self.batch_size}"
        total = self.num_tokens_seen + num_tokens
        if total > self.max_tokens:
            raise UserError(f"{total} tokens exceed the {self.max_tokens} that were allotted; raise --max-seq-length")
