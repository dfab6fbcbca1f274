# SPDX-License-Identifier: Apache-2.0
"""What one sequence has drawn so far: when it ends, and how much of it is certain to stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from evo2_megatron.data.tokenizer import decode

FinishReason = Literal["length", "stop"]


class Generation(NamedTuple):
    """The continuation of one prompt."""

    token_ids: list[int]
    """New tokens, without the one that ended the document and, unless asked for, without the stop string."""

    finish_reason: FinishReason
    """``stop``: the document ended or a stop string appeared before the number of tokens asked for."""

    log_probs: list[float] | None
    """Natural logarithm of each new token's probability under the model's own distribution, if asked for."""

    stop_string: str | None = None
    """The stop string that ended it, if one did."""

    @property
    def text(self) -> str:
        """The new tokens' characters; special tokens have none."""
        return decode(self.token_ids, skip_special_tokens=True)


class Completion:
    """Takes tokens one by one until the sequence ends; ``release`` hands out what no stop string can take back."""

    def __init__(
        self,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        include_stop_string: bool = False,
    ) -> None:
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self._max_new_tokens = max_new_tokens
        self._stop_ids = stop_ids
        # a token is a character; of two that end at the same place, the longer began first
        self._matches = [
            _Match(text) for text in sorted(stop_strings, key=len, reverse=True) if len(text) <= max_new_tokens
        ]
        self._include_stop_string = include_stop_string
        self._num_released = 0

    def add(self, token: int, log_prob: float | None = None) -> None:
        """Take the next token; ``log_prob`` each time or never."""
        assert self.finish_reason is None
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return
        self.token_ids.append(token)
        if log_prob is not None:
            self.log_probs.append(log_prob)
        for match in self._matches:
            match.add(token)
        for match in self._matches:
            if match.is_whole:
                self.finish_reason, self.stop_string = "stop", match.text
                if not self._include_stop_string:
                    del self.token_ids[-match.length :], self.log_probs[-match.length :]
                return
        if len(self.token_ids) == self._max_new_tokens:
            self.finish_reason = "length"

    def go_on_from(self, token_ids: Sequence[int], log_probs: Sequence[float]) -> None:
        """Take the tokens of an earlier continuation that had not ended, as if they had been added here."""
        self.token_ids += token_ids
        self.log_probs += log_probs
        for match in self._matches:
            match.go_on_from(token_ids)

    def release(self) -> tuple[list[int], list[float]]:
        """Tokens that will stay, and their log-probabilities; each is handed out once."""
        end = len(self.token_ids) - (0 if self.finish_reason or self._include_stop_string else self._num_uncertain())
        new = slice(self._num_released, end)
        self._num_released = max(end, self._num_released)
        return self.token_ids[new], self.log_probs[new]

    def _num_uncertain(self) -> int:
        """Length of the longest end that begins a stop string."""
        return max((match.length for match in self._matches), default=0)

    def generation(self, *, log_probs: bool) -> Generation:
        """What a finished sequence gave."""
        assert self.finish_reason is not None
        return Generation(self.token_ids, self.finish_reason, self.log_probs if log_probs else None, self.stop_string)


class _Match:
    """How much of a text, from its start, the newest tokens are; by Knuth, Morris and Pratt, so that a token takes the
    same time however long the text is."""

    def __init__(self, text: str) -> None:
        self.text, self.length = text, 0
        self._ids = [ord(character) for character in text]  # a token is a character
        self._shorter = [0] * len(text)  # of each start, the next shorter one that is also its end
        for place in range(1, len(text)):
            self._shorter[place] = self._longer(self._shorter[place - 1], self._ids[place])

    @property
    def is_whole(self) -> bool:
        return self.length == len(self._ids)

    def add(self, token: int) -> None:
        """Take the next token."""
        self.length = self._longer(self.length, token)

    def go_on_from(self, tokens: Sequence[int]) -> None:
        """Take tokens that do not hold the whole text: only the last ones can begin it."""
        for token in tokens[max(len(tokens) - len(self._ids) + 1, 0) :]:
            self.add(token)

    def _longer(self, length: int, token: int) -> int:
        while length and (length == len(self._ids) or self._ids[length] != token):
            length = self._shorter[length - 1]
        return length + (self._ids[length] == token)
