# SPDX-License-Identifier: Apache-2.0
"""The arithmetic that a checkpoint was trained with, beside the one it is about to be run in.

``model.vortex_style_fp8`` in ``run_config.yaml`` is the contract: the input projections of the Hyena layers were
computed in 8 bits, and the weights give worse predictions without (see ``architectures.FP8_SENSITIVE``).
``fp8_scales`` beside it holds the scales of Transformer Engine, if the source of a conversion had them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from evo2_megatron.checkpoint.run_config import RunConfig
from evo2_megatron.config import Fp8Choice, UserError
from evo2_megatron.runtime import megatron

if TYPE_CHECKING:
    from megatron.bridge.training.mixed_precision import MixedPrecisionConfig

    from evo2_megatron.model.provider import StripedHyenaProvider

logger = logging.getLogger(__name__)

Fp8Projections = Literal["not_asked", "recipe", "hardware", "emulated", "mismatch"]
"""How a model's input projections run: 8 bits were not asked for; in 8 bits like all its layers, by the precision
recipe; alone in 8 bits; rounded to 8 bits by ``--fp8-emulation``; or without, though the checkpoint asks for it."""

_FP8_CAPABILITY = (8, 9)
_HOPPER = 9
_SHORT_SUMS_FROM = 8192


def settle(
    provider: StripedHyenaProvider,
    precision: str,
    settings: MixedPrecisionConfig,
    choice: Fp8Choice,
    run_config: RunConfig,
) -> Fp8Projections:
    """Decide how the input projections run, and set the provider's fields accordingly.

    Args:
        provider: As the checkpoint describes it, with the caller's changes; its ``vortex_style_fp8`` is the contract.
        precision: Name of the precision recipe.
        settings: Its values; what they ask of the machine has been checked.
        choice: The user's.
        run_config: The checkpoint's.

    Raises:
        UserError: The contract cannot be kept here, and the choice is to keep it; or two ways were chosen at once.
    """
    checkpoint = run_config.path.parent
    is_asked, provider.vortex_style_fp8 = provider.vortex_style_fp8, False
    _check_rounded_once(provider, precision, settings)
    if choice == "emulate":
        if settings.fp8 or settings.fp4:
            raise UserError(
                f"--fp8-emulation rounds what precision {precision} computes in 8 bits anyway; leave it out, or "
                "choose --mixed-precision-recipe bf16_mixed or fp32"
            )
        provider.fp8_emulation = True
        _tell_of_emulation(provider, is_asked, checkpoint)
        return "emulated"
    if not is_asked:
        if run_config.fp8_was_not_said and not settings.fp8:
            logger.warning(
                "%s was converted without saying whether its weights need FP8 input projections, as Arc's of this "
                "size do; if they do, give --vortex-style-fp8 --fp8-emulation",
                checkpoint,
            )
        return "not_asked"
    if settings.fp8:
        logger.info("%s asks for FP8 input projections; precision %s computes all layers so", checkpoint, precision)
        return "recipe"
    if choice == "allow_mismatch":
        logger.warning(
            "%s was trained with FP8 input projections and runs in %s without them (--allow-precision-mismatch): its "
            "predictions are worse than those it was published with",
            checkpoint,
            precision,
        )
        return "mismatch"
    if megatron.on_cuda() and torch.cuda.get_device_capability() >= _FP8_CAPABILITY:
        provider.fp8_projections = True
        _tell_of_hardware(provider, checkpoint)
        return "hardware"
    raise UserError(
        f"{checkpoint} is to run with FP8 input projections, and this machine has no FP8 hardware; choose "
        f"--fp8-emulation, which rounds as they do, or --allow-precision-mismatch, which computes in {precision} and "
        "predicts worse"
    )


def _check_rounded_once(provider: StripedHyenaProvider, precision: str, settings: MixedPrecisionConfig) -> None:
    if provider.quantize_weights != "none" and (settings.fp8 or settings.fp4):
        raise UserError(
            f"precision {precision} rounds weights in its own way; leave out --quantize-weights, or choose "
            "--mixed-precision-recipe bf16_mixed or fp32"
        )


def _tell_of_hardware(provider: StripedHyenaProvider, checkpoint: Path) -> None:
    logger.info("%s asks for FP8 input projections, and this GPU computes them", checkpoint)
    if provider.hidden_size >= _SHORT_SUMS_FROM and torch.cuda.get_device_capability()[0] != _HOPPER:
        logger.warning(
            "The published 40B model had a loss of 0.92 with the FP8 units of Hopper GPUs and of 1.79 with those of "
            "others: it needs their short sums"
        )


def _tell_of_emulation(provider: StripedHyenaProvider, is_asked: bool, checkpoint: Path) -> None:
    logger.info("The input projections of the Hyena layers are rounded to FP8 (--fp8-emulation)")
    if not is_asked:
        logger.warning("%s does not ask for FP8 input projections; rounding them changes its predictions", checkpoint)
    if provider.hidden_size >= _SHORT_SUMS_FROM:
        logger.warning(
            "Rounding alone did not restore the published 40B model, whose loss was 0.92 on Hopper GPUs and 1.79 on "
            "others with FP8: it also needs the short sums of Hopper's FP8 units, which --fp8-emulation does not have"
        )
