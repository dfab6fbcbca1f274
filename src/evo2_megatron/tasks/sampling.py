# SPDX-License-Identifier: Apache-2.0
"""Choose the next token from a model's logits: greedy, temperature, top-k, top-p, seeded per sequence.

The limits are transformers' own, in its order: temperature, top-k, top-p.
Shape legend: B sequences, V vocabulary, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from evo2_megatron.config import UserError

NOT_FINITE = -1
"""What ``draw`` returns for a sequence whose logits are not finite numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is drawn from the model's distribution.

    Raises:
        UserError: A value lies outside its range.
    """

    temperature: float = 1.0
    """Logits are divided by this; 0 takes the most probable token (greedy)."""

    top_k: int = 0
    """Draw among this many most probable tokens, and those as probable as the last of them; 0: no such limit, 1: the
    most probable (greedy)."""

    top_p: float = 0.0
    """Draw among the fewest most probable tokens whose mass reaches this, after top_k; 0: no such limit."""

    seed: int = 1234
    """Of the first sequence; the others' are made from it by ``derive_seed``."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (off) or a positive number of tokens")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie between 0 (off) and 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be 0 or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError unless top_k is below the number of tokens."""
        if self.top_k >= vocab_size:
            raise UserError(f"top_k is {self.top_k}; it must be below the vocabulary's {vocab_size} tokens")


def derive_seed(seed: int, *, prompt: int = 0, sample: int = 0) -> int:
    """Seed of one sequence of a run, below 2**53 so that every JSON reader takes it exactly.

    The first sample of the first prompt has the run's seed itself. So a sequence's seed, given to a run of its prompt
    alone, gives the same sequence.

    Args:
        seed: Of the run, or a prompt's own; 0 or more.
        prompt: Number of the prompt in the run, from 0.
        sample: Number of the continuation of this prompt, from 0.
    """
    if prompt == sample == 0:
        return seed
    return int(np.random.SeedSequence(seed, spawn_key=(prompt, sample)).generate_state(1, np.uint64)[0] >> 11)


def uniforms(seed: int, start: int, num_tokens: int) -> Tensor:
    """The random numbers of one sequence at places ``start`` and on, float64 in [0, 1), on the CPU; one each.

    They depend on the seed and on the place in the whole sequence, counted from 0 and with the prompt: not on where
    the prompt ends, the batch, the device or the number of processes.
    """
    bits = np.random.PCG64(seed)
    bits.advance(start)  # one step of this generator makes one float64
    return torch.from_numpy(np.random.Generator(bits).random(num_tokens))


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
    mass_BV = limit(logits_BV, sampling).exp().cumsum(dim=-1)
    last = mass_BV.shape[-1] - 1
    token_B1 = torch.searchsorted(mass_BV, uniform_B[:, None] * mass_BV[:, -1:], right=True)
    # NaN sorts above every number, so only a distribution that is not one points past the end
    finite_B1, token_B1 = token_B1 <= last, token_B1.clamp(max=last)
    return token_B1.masked_fill(~finite_B1, NOT_FINITE).squeeze(-1)


def limit(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Logits after temperature, top-k and top-p: the peak is 0, and tokens outside the limits are -inf."""
    # subtract the peak first: a temperature near 0 must not overflow
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / sampling.temperature
    # transformers' classes ignore their first argument, the tokens so far
    if sampling.top_k:
        logits_BV = TopKLogitsWarper(sampling.top_k)(None, logits_BV)
    if sampling.top_p:
        logits_BV = TopPLogitsWarper(sampling.top_p)(None, logits_BV)
    return logits_BV


def log_probability(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    """Log-probability of each token in nat, float32, under the model itself: no temperature, no limit."""
    return logits_BV.float().log_softmax(dim=-1).gather(-1, token_B[:, None]).squeeze(-1)
