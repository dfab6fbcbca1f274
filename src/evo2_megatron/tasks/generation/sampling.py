# SPDX-License-Identifier: Apache-2.0
"""Choose the next token from a model's logits, each sequence in its own way: greedy, temperature, top-k, top-p, seeds.

The limits are those of transformers, in its order: temperature, top-k, top-p. Its classes know one limit for a batch.
Shape legend: B sequences, V vocabulary, K most probable tokens, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evo2_megatron.config import UserError

NOT_FINITE = -1
"""What ``BatchSampling.draw`` returns for a sequence whose logits are not finite numbers."""


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


class BatchSampling:
    """How each sequence of a batch is drawn. What one draws does not depend on how the others do."""

    def __init__(self, samplings: Sequence[Sampling], blocked_BV: Tensor) -> None:
        """Bring the settings to the device of ``blocked_BV``.

        Args:
            samplings: Of each sequence; or one for all.
            blocked_BV: True for tokens that are never drawn, a row for each of ``samplings``.
        """
        limits = [Sampling() if sampling.greedy else sampling for sampling in samplings]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=blocked_BV.device)[:, None]

        self._blocked_BV = blocked_BV
        self._greedy_B = column([sampling.greedy for sampling in samplings]).bool().squeeze(-1)
        self._any_greedy = any(sampling.greedy for sampling in samplings)
        self._all_greedy = all(sampling.greedy for sampling in samplings)
        self._temperature_B1 = column([limit.temperature for limit in limits])
        self._most_k = min(max(limit.top_k for limit in limits), blocked_BV.shape[-1])
        self._top_k_B1 = column([limit.top_k for limit in limits]).long()
        self._any_top_p = any(limit.top_p for limit in limits)
        # mass that may be left out; no mass is that small
        self._outside_B1 = column([1 - limit.top_p if limit.top_p else -1.0 for limit in limits])

    def draw(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """Pick one token for each sequence by inverting the cumulative distribution, in float64.

        Args:
            logits_BV: The model's logits, any float dtype.
            uniform_B: One random number of ``uniforms`` for each sequence; greedy ignores them.

        Returns:
            token_B, int64; NOT_FINITE where the logits hold a NaN or no finite value.
        """
        logits_BV = logits_BV.double().masked_fill(self._blocked_BV, -math.inf)
        if not self._any_greedy:
            return self._draw_within_limits(logits_BV, uniform_B)
        peak_B, best_B = logits_BV.max(dim=-1)
        best_B = best_B.masked_fill(~peak_B.isfinite(), NOT_FINITE)
        if self._all_greedy:
            return best_B
        return torch.where(self._greedy_B, best_B, self._draw_within_limits(logits_BV, uniform_B))

    def _draw_within_limits(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        mass_BV = self.limit(logits_BV).exp().cumsum(dim=-1)
        last = mass_BV.shape[-1] - 1
        token_B1 = torch.searchsorted(mass_BV, uniform_B[:, None] * mass_BV[:, -1:], right=True)
        # NaN sorts above every number, so only a distribution that is not one points past the end
        finite_B1, token_B1 = token_B1 <= last, token_B1.clamp(max=last)
        return token_B1.masked_fill(~finite_B1, NOT_FINITE).squeeze(-1)

    def limit(self, logits_BV: Tensor) -> Tensor:
        """Logits after temperature, top-k and top-p: the peak is 0, and tokens outside the limits are -inf.

        Greedy sequences have no limits here.
        """
        # subtract the peak first: a temperature near 0 must not overflow
        logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / self._temperature_B1
        if self._most_k:
            best_BK = logits_BV.topk(self._most_k, dim=-1).values
            place_B1 = (self._top_k_B1 - 1).clamp(0, self._most_k - 1).expand(len(logits_BV), 1)
            least_B1 = best_BK.gather(-1, place_B1).masked_fill(self._top_k_B1 == 0, -math.inf)
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -math.inf)
        if self._any_top_p:
            sorted_BV, token_BV = logits_BV.sort(dim=-1)
            outside_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1) <= self._outside_B1
            outside_BV[:, -1] = False  # one stays, whatever rounding makes of the sum
            logits_BV = logits_BV.masked_fill(outside_BV.scatter(-1, token_BV, outside_BV), -math.inf)
        return logits_BV


def log_probability(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    """Log-probability of each token in nat, float32, under the model itself: no temperature, no limit."""
    return logits_BV.float().log_softmax(dim=-1).gather(-1, token_B[:, None]).squeeze(-1)
