# SPDX-License-Identifier: Apache-2.0
"""Time and price of planned work, at a speed that whoever plans has measured or expects."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Of a step of training, or of a batch of sequences."""

    seconds: float
    num_tokens: int
    num_gpus: int

    @property
    def tokens_per_second(self) -> float:
        """Of one GPU."""
        return self.num_tokens / self.seconds / self.num_gpus

    def gpu_hours(self, num_tokens: float) -> float:
        """For so many tokens."""
        return num_tokens / self.tokens_per_second / 3600


def cost(flops: float, num_tokens: int, num_gpus: int, tflops: float) -> Cost:
    """What work costs.

    Args:
        flops: Operations of one GPU, one after the other.
        num_tokens: Of all sequences.
        num_gpus: That do it together.
        tflops: 10^12 operations per second that a GPU gets done.
    """
    return Cost(flops / (tflops * 1e12), num_tokens, num_gpus)
