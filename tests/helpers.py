# SPDX-License-Identifier: Apache-2.0
"""What several tests build."""

from __future__ import annotations

from typing import Any


def tiny_model(model_size: str = "evo2_tiny", **overrides: Any):
    """A float32 model with random weights in eval mode; needs the fixture ``one_process``."""
    import torch

    from evo2_megatron.model.provider import provider_for

    settings = {"vocab_size": 512, "params_dtype": torch.float32, "bf16": False} | overrides
    provider = provider_for(model_size, **settings)
    provider.finalize()
    return provider.provide().eval()
