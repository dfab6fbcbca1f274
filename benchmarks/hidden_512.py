# SPDX-License-Identifier: Apache-2.0
"""The larger of the two models that benchmarks time: 26 million parameters."""

from evo2_megatron.architectures import Architecture

ARCHITECTURE = Architecture(
    pattern="SDH*SDH*", hidden_size=512, ffn_hidden_size=1408, num_heads=4, num_groups=32, max_tokens=16_384
)
