# SPDX-License-Identifier: Apache-2.0
"""How many tokens of long sequences go through a model at a time: activations then stop growing with length."""

from __future__ import annotations

import math

from evo2_megatron.runtime import megatron

CHUNK_LENGTH_CUDA = 65_536

CHUNK_LENGTH_CPU = 4_096
"""Larger tensors than these make, mapped and unmapped every time, cost 6 %."""

LOW_PRECISION_TOKENS = 32
"""What a process's number of tokens must be divisible by for products of 8 or 4 bits: rows of a block of MXFP8, the
largest of all formats."""


def chunk_length() -> int:
    """Tokens of a piece that suit the device."""
    return CHUNK_LENGTH_CUDA if megatron.on_cuda() else CHUNK_LENGTH_CPU


def of_each(tokens: int, batch_size: int, *, multiple: int = 1) -> int:
    """Tokens of a piece of each of several sequences that go through together, a multiple of ``multiple``."""
    return math.ceil(tokens / batch_size / multiple) * multiple
