# SPDX-License-Identifier: Apache-2.0
"""Megatron Bridge's settings for the precision recipes that commands accept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evo2_megatron.runtime import megatron

if TYPE_CHECKING:
    from megatron.bridge.training.mixed_precision import MixedPrecisionConfig


def precision_settings(name: str) -> MixedPrecisionConfig:
    """Megatron Bridge's settings for a recipe of ``config.PRECISION_RECIPES``; ``fp32`` is ours."""
    megatron.enter()
    import torch
    from megatron.bridge.training.mixed_precision import MixedPrecisionConfig, get_mixed_precision_config

    if name == "fp32":
        return MixedPrecisionConfig(fp32=True, params_dtype=torch.float32, pipeline_dtype=torch.float32)
    return get_mixed_precision_config(name)
