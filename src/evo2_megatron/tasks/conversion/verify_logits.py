# SPDX-License-Identifier: Apache-2.0
"""``--verify`` of the converters: the same sequences through a file's weights and through our model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from evo2_megatron.architectures import Architecture
from evo2_megatron.checkpoint.load import load_model
from evo2_megatron.checkpoint.names import parameter_shapes
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.runtime.distributed import process_groups
from evo2_megatron.tasks.reference_forward import Names, reference_logits

logger = logging.getLogger(__name__)

LENGTHS = (1, 2, 127, 128, 129, 400)
MAX_ABS, MAX_RELATIVE_RMS = 1e-3, 1e-4
_SEED = 20250219
_LETTERS = torch.tensor(list(b"ACGT"))


class LogitsDifference(NamedTuple):
    """Of two sets of logits of the same tokens, float32."""

    max_abs: float
    relative_rms: float
    """Root mean square of the difference, over that of the logits."""

    scale: float
    """Standard deviation of the logits."""

    @property
    def is_rounding(self) -> bool:
        """Whether the difference is within ``MAX_ABS`` (times the scale, where that is over 1) and
        ``MAX_RELATIVE_RMS``, and everything is finite."""
        return self.max_abs <= MAX_ABS * max(1.0, self.scale) and self.relative_rms <= MAX_RELATIVE_RMS


def compare(first: list[Tensor], second: list[Tensor]) -> LogitsDifference:
    """Differences over all batches; each pair has the same shape."""
    a, b = (torch.cat([x.double().flatten() for x in logits]) for logits in (first, second))
    difference = a - b
    return LogitsDifference(
        difference.abs().max().item(),
        (difference.pow(2).mean() / b.pow(2).mean()).sqrt().item(),
        b.std().item(),
    )


def random_dna() -> list[Tensor]:
    """Two sequences of each of ``LENGTHS``, always the same; tokens [2, L]."""
    generator = torch.Generator().manual_seed(_SEED)
    return [_LETTERS[torch.randint(4, (2, length), generator=generator)] for length in LENGTHS]


def check_memory(architecture: Architecture, vocab_size: int) -> None:
    """Raise UserError unless the model fits into free memory in float32, beside one layer of the reference."""
    sizes = [math.prod(shape) for shape in parameter_shapes(architecture, vocab_size=vocab_size).values()]
    needed, free = 4 * sum(sizes) + 16 * max(sizes), psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--verify runs the model in float32, which needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} "
            "GB are free; use a larger machine, or leave --verify out"
        )


def verify_checkpoint(
    checkpoint: Path,
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    *,
    names: Names,
    unrounded: Mapping[str, Tensor] | None = None,
) -> None:
    """Compare the model that a Megatron Bridge checkpoint loads as with the reference on other weights.

    The largest difference is logged.

    Args:
        checkpoint: Folder of the iteration.
        weights: By the names of another format; may read from disk each time one is looked up.
        architecture: Describes the other weights.
        names: The other format.
        unrounded: The weights before they were rounded to what the checkpoint stores, if they were; how far that
            moves the logits is logged too.

    Raises:
        UserError: The logits differ by more than rounding.
    """
    batches = random_dna()
    ours, expected = _our_logits(checkpoint, batches), reference_logits(weights, architecture, batches, names=names)
    if not all(logits.isfinite().all() for logits in expected):
        raise UserError(
            "verification failed: the source itself computes NaN or infinity, so its weights hold such values or are "
            "damaged; copy it or download it again; nothing was written"
        )
    difference = compare(ours, expected)
    text = f"largest difference of the logits {difference.max_abs:.2g}, relative rms {difference.relative_rms:.2g}"
    if not difference.is_rounding:
        raise UserError(
            f"verification failed: {text}; the weights were not converted faithfully, please report this; nothing was "
            "written"
        )
    if names == "vortex":
        # a property of the two programs, not of the weights
        theirs = reference_logits(weights, architecture, batches, names=names, norm="vortex")
        text += f"; with Vortex's own form of the norm, x / (rms + epsilon), {compare(ours, theirs).max_abs:.2g}"
    if unrounded is not None:
        exact = reference_logits(unrounded, architecture, batches, names=names)
        text += f"; rounding the weights moved the logits by up to {compare(expected, exact).max_abs:.2g}"
    logger.info("verified on %d sequences of up to %d bases: %s", 2 * len(LENGTHS), max(LENGTHS), text)


def _our_logits(checkpoint: Path, batches: list[Tensor]) -> list[Tensor]:
    one = ParallelConfig()
    with process_groups(one), torch.inference_mode():
        # how a model is meant to be run is not what is being checked
        overrides = {"vortex_style_fp8": False}
        model = load_model(checkpoint, parallel=one, precision="fp32", provider_overrides=overrides).model
        device = next(model.parameters()).device
        return [model(tokens_BL.to(device)).float().cpu() for tokens_BL in batches]
