# SPDX-License-Identifier: Apache-2.0
"""Which parameters are exempt from weight decay."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.bridge.training.config import OptimizerConfigOverrideProvider, OptimizerConfigOverrideProviderContext
from megatron.core.optimizer import ParamGroupOverride, ParamKey

NO_WEIGHT_DECAY = ("*.filter.p", "*.filter.R", "*.filter.gamma", "*.short_conv.short_conv_weight")
"""Poles, residues and scales of the long filter, and the taps of the short operator, as Evo 2 was trained.

The medium operator's ``filter.h``, the input convolution and all matrices decay. Biases and norms have one dimension
and are exempt by Megatron's own rule.
"""


@dataclass
class HyenaWeightDecay(OptimizerConfigOverrideProvider):
    """Exemptions from weight decay, as Megatron Bridge asks for them; stored in ``run_config.yaml``."""

    embeddings: bool = True
    """Whether the embedding table decays (an untied output layer always does)."""

    def build_config_overrides(
        self, context: OptimizerConfigOverrideProviderContext
    ) -> dict[ParamKey, ParamGroupOverride]:
        """Bridge's exemptions (biases, one-dimensional parameters) and ours."""
        names = NO_WEIGHT_DECAY if self.embeddings else (*NO_WEIGHT_DECAY, "*embedding*")
        overrides = super().build_config_overrides(context) or {}
        return {**overrides, ParamKey(name=names): ParamGroupOverride(wd_mult=0.0)}
