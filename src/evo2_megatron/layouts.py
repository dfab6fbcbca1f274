# SPDX-License-Identifier: Apache-2.0
"""Which parallel layouts a model and a sequence can have, and the nearest ones that work where one cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping

from evo2_megatron.config import ParallelConfig, UserError

MIN_CHUNK_TOKENS = 129
"""Tokens of a chunk under context parallelism, at least: what a medium filter and the input convolution look back."""


def check_tensor_parallel(sizes: Mapping[str, int], tensor: int) -> None:
    """Raise UserError unless ``tensor`` divides every size.

    Args:
        sizes: What tensor parallelism divides, by name.
        tensor: Tensor parallel size.
    """
    misfits = [f"{size} {name}" for name, size in sizes.items() if size % tensor]
    if misfits:
        common = math.gcd(*sizes.values())
        usable = [n for n in range(1, common + 1) if common % n == 0]
        raise UserError(
            f"tensor parallel size {tensor} does not divide the model's {' and '.join(misfits)}; use "
            f"{_nearest(usable, tensor)}, and split layers (pipeline) or sequences (context) over the other processes"
        )


def check_pipeline_parallel(num_layers: int, pipeline: int) -> None:
    """Raise UserError unless every one of ``pipeline`` stages gets a layer."""
    if pipeline > num_layers:
        raise UserError(f"pipeline parallel size {pipeline} for {num_layers} layers; use {num_layers} or less")


def sequence_multiple(parallel: ParallelConfig) -> int:
    """What the number of tokens of a sequence must be a multiple of."""
    split = parallel.tensor if parallel.splits_activations else 1
    if parallel.context == 1:
        return split
    return math.lcm(2 * parallel.context, parallel.context * split)


def min_sequence_length(parallel: ParallelConfig) -> int:
    """Tokens of the shortest sequence that a layout can hold."""
    multiple = sequence_multiple(parallel)
    least = 1 if parallel.context == 1 else 2 * parallel.context * MIN_CHUNK_TOKENS
    return math.ceil(least / multiple) * multiple


def check_sequence_length(num_tokens: int, parallel: ParallelConfig) -> None:
    """Raise UserError unless sequences of ``num_tokens`` (``--seq-length``) can be split as the layout wants."""
    multiple, least = sequence_multiple(parallel), min_sequence_length(parallel)
    if num_tokens % multiple == 0 and num_tokens >= least:
        return
    below, above = num_tokens // multiple * multiple, math.ceil(num_tokens / multiple) * multiple
    usable = sorted({length for length in (below, above) if length >= least} or {least})
    raise UserError(
        f"--seq-length {num_tokens} cannot be split over context parallel size {parallel.context}"
        + (
            f" and tensor parallel size {parallel.tensor} (sequence parallelism)"
            if parallel.splits_activations
            else ""
        )
        + f": it must be a multiple of {multiple}"
        + (f", and {least} or more" if parallel.context > 1 else "")
        + f"; use {' or '.join(map(str, usable))}"
    )


def _nearest(usable: list[int], asked: int) -> str:
    below = [n for n in usable if n < asked][-1:]
    above = [n for n in usable if n > asked][:1]
    return " or ".join(map(str, below + above))
