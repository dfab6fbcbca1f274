# SPDX-License-Identifier: Apache-2.0
"""Our model beside the oracle: any architecture, in float32, with given weights."""

from __future__ import annotations

from unittest import mock

from torch import Tensor

from evo2_megatron.architectures import ARCHITECTURES, Architecture
from evo2_megatron.checkpoint.names import is_weight
from helpers import tiny_model


def our_model(architecture: Architecture, weights: dict[str, Tensor]):
    """A StripedHyenaModel in evaluation mode with float32 ``weights``; needs the fixture ``one_process``."""
    with mock.patch.dict(ARCHITECTURES, {"parity": architecture}):
        model = tiny_model("parity", vocab_size=weights["embedding.word_embeddings.weight"].shape[0])
    assert {name for name in model.state_dict() if is_weight(name)} == weights.keys()
    model.load_state_dict(weights, strict=False)
    return model
