# SPDX-License-Identifier: Apache-2.0
"""Zigzag order of a sequence under context parallelism: index arithmetic only.

The sequence is cut into ``2 * num_ranks`` equal chunks and rank r holds chunk r (early) and its mirror image, chunk
``2 * num_ranks - 1 - r`` (late), so that causal attention costs every rank the same (Megatron's load-balanced split).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def zigzag_order(num_ranks: int) -> list[int]:
    """Chunk numbers in the order they lie when the ranks' parts are concatenated: 0, 2n-1, 1, 2n-2, ..."""
    return [chunk for rank in range(num_ranks) for chunk in (rank, 2 * num_ranks - 1 - rank)]


def zigzag_inverse(num_ranks: int) -> list[int]:
    """For every chunk number, where it lies in ``zigzag_order``."""
    order = zigzag_order(num_ranks)
    return sorted(range(len(order)), key=order.__getitem__)


def from_zigzag(x: Tensor, num_ranks: int, dim: int) -> Tensor:
    """Reorder the chunks of ``dim`` from the concatenation of the ranks' parts to natural order.

    Raises:
        ValueError: the length of ``dim`` is not a multiple of ``2 * num_ranks``.
    """
    if num_ranks == 1:
        return x
    chunks = _chunks(x, 2 * num_ranks, dim)
    return torch.cat([chunks[i] for i in zigzag_inverse(num_ranks)], dim=dim)


def zigzag_split(x: Tensor, dim: int, *, num_ranks: int, rank: int) -> Tensor:
    """The part of ``x`` that ``rank`` holds: its early chunk, then its late chunk, along ``dim``.

    Raises:
        ValueError: the length of ``dim`` is not a multiple of ``2 * num_ranks``.
    """
    chunks = _chunks(x, 2 * num_ranks, dim)
    return torch.cat([chunks[rank], chunks[2 * num_ranks - 1 - rank]], dim=dim)


def zigzag_unsplit(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Join the parts of all ranks, given in rank order, back into natural order along ``dim``."""
    return from_zigzag(torch.cat(list(parts), dim=dim), len(parts), dim)


def _chunks(x: Tensor, num_chunks: int, dim: int) -> tuple[Tensor, ...]:
    length = x.shape[dim]
    if length % num_chunks:
        raise ValueError(f"sequence length {length} is not a multiple of {num_chunks} chunks; pad it")
    return x.tensor_split(num_chunks, dim=dim)
