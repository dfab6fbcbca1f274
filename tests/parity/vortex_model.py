# SPDX-License-Identifier: Apache-2.0
"""Arc's Vortex (`vtx` on PyPI) as an oracle: its own StripedHyena on a CPU in float32, with our weights.

What stands in for what Vortex takes for granted on a GPU; its mathematics is untouched:

* `vortex.logging` (opens a file in the working folder and takes over the root logger) is an ordinary silent logger.
* `vortex.ops` (imports compiled flash-attn at once) is an empty package. Vortex then takes its own path without
  kernels: `F.scaled_dot_product_attention` for a whole sequence, its `CrossAttention` when there is a cache.
* `vortex.ops.embedding.rotary.apply_rotary` (a Triton kernel) is the same rotation, in place, in torch.
* `torch.cuda.device(...)`, a guard that refuses a CPU, does nothing while Vortex runs.

What differs from us by design: Vortex normalises by `rms + eps`, we by `sqrt(mean square + eps)`. At an rms of 1 the
two differ by eps / 2 = 5e-7, relatively; at 0.02 by 1e-3. Hence embeddings of unit scale in `random_weights`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from evo2_megatron.architectures import Architecture
from evo2_megatron.checkpoint.names import parameter_shapes
from evo2_megatron.checkpoint.vortex import to_vortex, vortex_config


def _apply_rotary(x, cos, sin, seqlen_offsets=0, interleaved=False, inplace=False, **unused) -> Tensor:
    """Rotate x [B, L, heads, C] by cos and sin [positions, C/2], as Vortex's kernel does for CPU-able arguments."""
    assert inplace and not interleaved and not any(unused.values())
    positions = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
    cos, sin = cos[positions, None], sin[positions, None]
    first, second = x.chunk(2, dim=-1)
    rotated = first * cos - second * sin
    second.copy_(first * sin + second * cos)
    first.copy_(rotated)
    return x


def _import_vortex() -> tuple[type, type]:
    """Vortex's model class and its configuration class."""
    if "vortex.ops" not in sys.modules:
        log, ops, rotary = (ModuleType(f"vortex.{name}") for name in ("logging", "ops", "ops.embedding.rotary"))
        log.activations_logger = logging.getLogger("vortex.activations")
        log.enable_activations_logging = None  # would be called for print_activations, which is off
        ops.__path__ = []
        rotary.apply_rotary = _apply_rotary
        for module in (log, ops, rotary):
            sys.modules[module.__name__] = module
    from vortex.model.model import StripedHyena
    from vortex.model.utils import dotdict

    return StripedHyena, dotdict


@contextlib.contextmanager
def _without_gpu() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        # about torch.autocast("cuda") around its medium convolution, and the imaginary part of its modal state
        warnings.simplefilter("ignore", UserWarning)
        yield


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
        model_class, config_class = _import_vortex()
        state = to_vortex(weights, architecture)
        self.tokens_seen = 0
        self._caches: Any = None
        config = vortex_config(architecture, vocab_size=state["embedding_layer.weight"].shape[0])
        dtypes = ("params_dtype", "attn_block_dtype", "hyena_block_dtype", "mlp_dtype")
        config |= dict.fromkeys(dtypes, torch.float32)
        with _without_gpu():
            # its input projection is made in bfloat16 whatever the configuration says
            self.model = model_class(config_class(config)).float().eval()
            if architecture.tied_embeddings:
                del state["unembed.weight"]  # its tied head is the table itself
            self.model.custom_load_state_dict(state, strict=True)

    @torch.inference_mode()
    def score(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of a whole sequence, no cache."""
        with _without_gpu():
            return self.model(tokens_BL)[0]

    @torch.inference_mode()
    def prefill(self, tokens_BL: Tensor, *, max_tokens: int) -> Tensor:
        """Logits [B, L, V] of a prompt; fills fresh caches for up to ``max_tokens``."""
        with _without_gpu():
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
        with _without_gpu():
            logits_BLV, self._caches = self.model(tokens_B[:, None], inference_params_dict=self._caches)
        self.tokens_seen += 1
        return logits_BLV[:, -1]
