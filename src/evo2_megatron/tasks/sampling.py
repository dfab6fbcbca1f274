# SPDX-License-Identifier: Apache-2.0
"""Choose the next token from a model's logits: greedy, temperature, top-k, top-p, seeded per sequence.

Shape legend: B sequences, V vocabulary, N new tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evo2_megatron.config import UserError

NOT_FINITE = -1
"""What ``draw`` returns for a sequence whose logits are not finite numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is drawn from the model's distribution.

    Raises:
        UserError: A value lies outside its range, or both top_k and top_p are given.
    """

    temperature: float = 1.0
    """Logits are divided by this; 0 takes the most probable token (greedy)."""

    top_k: int = 0
    """Draw among this many most probable tokens; 0: no such limit, 1: greedy."""

    top_p: float = 0.0
    """Draw among the fewest most probable tokens whose mass exceeds this; 0: no such limit."""

    seed: int = 1234
    """Together with a sequence's number, decides its random numbers."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (off) or a positive number of tokens")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie between 0 (off) and 1")
        if self.top_k and self.top_p:
            raise UserError(f"top_k is {self.top_k} and top_p is {self.top_p}; give only one of them")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be 0 or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError unless top_k is below the number of tokens."""
        if self.top_k >= vocab_size:
            raise UserError(f"top_k is {self.top_k}; it must be below the vocabulary's {vocab_size} tokens")


def uniforms(seed: int, sequence: int, num_new_tokens: int) -> Tensor:
    """The random numbers of one sequence, float64 in [0, 1), on the CPU; one for each token that it may draw.

    They depend on the seed and on the sequence's number only: not on the batch, the device or the number of processes.
    More tokens extend the same stream.
    """
    return torch.from_numpy(np.random.default_rng([seed, sequence]).random(num_new_tokens))


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling, *, blocked_V: Tensor) -> Tensor:
    """Pick one token for each sequence by inverting the cumulative distribution, in float64.

    Args:
        logits_BV: The model's logits, any float dtype.
        uniform_B: One random number of ``uniforms`` for each sequence; greedy ignores them.
        sampling: Temperature and limits.
        blocked_V: True for tokens that are never drawn.

    Returns:
        token_B, int64; NOT_FINITE where the logits hold a NaN or no finite value.
    """
    logits_BV = logits_BV.double().masked_fill(blocked_V, -math.inf)
    if sampling.greedy:
        peak_B, token_B = logits_BV.max(dim=-1)
        return token_B.masked_fill(~peak_B.isfinite(), NOT_FINITE)
    token_BK = None
    if sampling.top_k:
        logits_BV, token_BK = logits_BV.topk(sampling.top_k, dim=-1)
    elif sampling.top_p:
        logits_BV, token_BK = logits_BV.sort(dim=-1, descending=True, stable=True)
    # subtract the peak first: a temperature near 0 must not overflow
    weight_BV = ((logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / sampling.temperature).exp()
    mass_BV = weight_BV.cumsum(dim=-1)
    total_B1 = mass_BV[:, -1:]
    last = mass_BV.shape[-1] - 1
    if sampling.top_p:
        crossing_B1 = torch.searchsorted(mass_BV, sampling.top_p * total_B1, right=True).clamp(max=last)
        total_B1 = mass_BV.gather(-1, crossing_B1)
    index_B1 = torch.searchsorted(mass_BV, uniform_B[:, None] * total_B1, right=True)
    # NaN sorts above every number, so only a distribution that is not one points past the end
    finite_B1, index_B1 = index_B1 <= last, index_B1.clamp(max=last)
    token_B1 = index_B1 if token_BK is None else token_BK.gather(-1, index_B1)
    return token_B1.masked_fill(~finite_B1, NOT_FINITE).squeeze(-1)


def log_probability(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    """Log-probability of each token in nat, float32, under the model itself: no temperature, no limit."""
    return logits_BV.float().log_softmax(dim=-1).gather(-1, token_B[:, None]).squeeze(-1)
