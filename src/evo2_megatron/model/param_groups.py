# SPDX-License-Identifier: Apache-2.0
"""Which parameters are exempt from weight decay."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.bridge.training.config import OptimizerConfigOverrideProvider, OptimizerConfigOverrideProviderContext
from megatron.core.optimizer import ParamGroupOverride, ParamKey

NO_WEIGHT_DECAY = ("*.filter.p", "*.filter.R", "*.filter.gamma", "*.filter.h", "*.short_conv.short_conv_weight")
"""What the filters of the three operators are computed from, as Arc trained Evo 2.

Arc's trainer, Savanna, groups them so where ``hyena_filter_wd`` is 0, as in its Evo 2 configurations. NVIDIA's recipe
decays the medium operator's ``h``. Its filter is ``h`` times a fixed decay, so that the weight decay would draw the
whole filter to zero, the more so its far taps, whose gradient the factor has made small.

The input convolution and all matrices decay. Biases and norms have one dimension and are exempt by Megatron's rule.
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
        exempt = ParamKey(name=NO_WEIGHT_DECAY)
        if not self.embeddings:
            # by Megatron's mark, too: a tied table is the output layer's weight on the last of several stages
            exempt = ParamKey(name=(*NO_WEIGHT_DECAY, "*embedding*"), attr="shared_embedding")
        overrides = super().build_config_overrides(context) or {}
        return {**overrides, exempt: ParamGroupOverride(wd_mult=0.0)}
