# SPDX-License-Identifier: Apache-2.0
"""Arc's Vortex as an oracle: its own StripedHyena on a CPU in float32, with our weights.

See `run_vortex` for what stands in for a GPU. What differs from us by design: Vortex normalises by `rms + eps`, we by
`sqrt(mean square + eps)`. At an rms of 1 the two differ by eps / 2 = 5e-7, relatively; at 0.02 by 1e-3. Hence the unit
scale of the embeddings in `random_weights`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from evo2_megatron.architectures import Architecture
from evo2_megatron.checkpoint.names import parameter_shapes
from evo2_megatron.checkpoint.vortex import to_vortex, vortex_config
from parity.run_vortex import build, without_gpu


def random_weights(architecture: Architecture, *, vocab_size: int = 512, seed: int = 0) -> dict[str, Tensor]:
    """Weights under our names, float32, scaled so that every operator contributes and activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(architecture, vocab_size=vocab_size).items():
        noise = torch.randn(shape, generator=generator)
        leaf = name.rpartition(".")[2]
        if leaf == "layer_norm_weight" or name == "decoder.final_norm.weight":
            weights[name] = 1 + 0.1 * noise
        elif leaf == "decay":
            # slow to fast over the groups, as trained models have it
            rate = torch.logspace(-2, 1, shape[0])[:, None]
            weights[name] = torch.exp(-rate * torch.linspace(0, 1, shape[1]))
        elif leaf == "p":
            weights[name] = -1 + 0.3 * noise
        elif leaf == "gamma":
            # from memories of a few bases to memories longer than any test sequence
            weights[name] = math.log(0.03) + 1.5 * noise
        elif leaf == "R":
            weights[name] = 0.1 * noise
        elif leaf in ("bias", "conv_bias"):
            weights[name] = 0.3 * noise
        elif name == "embedding.word_embeddings.weight":
            weights[name] = noise
        else:
            weights[name] = noise / math.sqrt(shape[-1])
    return weights


class Vortex:
    """Vortex's model and its two ways to run.

    Args:
        architecture: Sizes; NVIDIA's variants are refused, Vortex has no place for them.
        weights: Our names, float32.
    """

    def __init__(self, architecture: Architecture, weights: dict[str, Tensor]) -> None:
        state = to_vortex(weights, architecture)
        self.tokens_seen = 0
        self._caches: Any = None
        self.model = build(vortex_config(architecture, vocab_size=state["embedding_layer.weight"].shape[0]))
        with without_gpu():
            if architecture.tied_embeddings:
                del state["unembed.weight"]  # its tied head is the table itself
            self.model.custom_load_state_dict(state, strict=True)

    @torch.inference_mode()
    def score(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of a whole sequence, no cache."""
        with without_gpu():
            return self.model(tokens_BL)[0]

    @torch.inference_mode()
    def prefill(self, tokens_BL: Tensor, *, max_tokens: int) -> Tensor:
        """Logits [B, L, V] of a prompt; fills fresh caches for up to ``max_tokens``."""
        with without_gpu():
            self._caches = self.model.initialize_inference_params(max_seqlen=max_tokens)
            self._caches["mha"].max_batch_size = tokens_BL.shape[0]
            logits_BLV, self._caches = self.model(tokens_BL, inference_params_dict=self._caches)
        self.tokens_seen = tokens_BL.shape[1]
        return logits_BLV

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token per sequence."""
        for cache in self._caches.values():
            cache.seqlen_offset = self.tokens_seen
        with without_gpu():
            logits_BLV, self._caches = self.model(tokens_B[:, None], inference_params_dict=self._caches)
        self.tokens_seen += 1
        return logits_BLV[:, -1]
