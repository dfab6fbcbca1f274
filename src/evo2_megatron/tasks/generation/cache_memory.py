# SPDX-License-Identifier: Apache-2.0
"""How long a sequence may be, for its caches to fit into the memory that is free."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from evo2_megatron.runtime import job_limits, megatron

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

CACHE_SHARE = 0.8
"""Part of the free memory that the caches may fill; the rest is for the activations of a chunk of prompt."""


def memory_limit(model: StripedHyenaModel, batch_size: int, *, layers_move: bool = False) -> int:
    """Most tokens per sequence for which the caches of a batch fit into the free memory, on every process.

    Computed from the bytes of the caches that the model declares, so no size is written down twice.

    Args:
        model: Whose caches they are.
        batch_size: Sequences of the batch.
        layers_move: The caches of each layer may be there twice for a moment, as when ``SharedCaches`` grow.
    """
    # of each layer, with room for one token and for two
    sizes = list(zip(_cache_bytes(model, 1), _cache_bytes(model, 2), strict=True))
    per_token, fixed = [two - one for one, two in sizes], [2 * one - two for one, two in sizes]
    if layers_move and sizes:
        per_token.append(max(per_token))
        fixed.append(max(fixed))
    tokens = int((CACHE_SHARE * _free_bytes() / batch_size - sum(fixed)) / max(sum(per_token), 1))
    fewest = torch.tensor([max(tokens, 0)], device=megatron.device())
    torch.distributed.all_reduce(fewest, torch.distributed.ReduceOp.MIN)
    return int(fewest.item())


def tokens_like_weights(model: StripedHyenaModel) -> int:
    """Tokens whose caches are as large as the weights, so that a step takes as long to read the ones as the others."""
    per_token = sum(_cache_bytes(model, 2)) - sum(_cache_bytes(model, 1))
    weights = itertools.chain(model.parameters(), model.buffers())  # quantized ones are buffers
    return sum(tensor.untyped_storage().nbytes() for tensor in weights) // max(per_token, 1)


def _free_bytes() -> int:
    if megatron.on_cuda():
        torch.cuda.empty_cache()  # what loading and a self-test took, and PyTorch holds on to
        return torch.cuda.mem_get_info()[0]
    return job_limits.free_bytes()


def _cache_bytes(model: StripedHyenaModel, max_tokens: int) -> list[int]:
    """Of one sequence, by layer."""
    layers = model.new_inference_state(1, max_tokens).layers.values()
    return [sum(tensor.nbytes for tensor in _tensors(layer)) for layer in layers]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors inside declared caches, however nested."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
