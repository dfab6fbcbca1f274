# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from evo2_megatron.tasks.generation import cache_memory
from evo2_megatron.tasks.generation.cache_memory import CACHE_SHARE, memory_limit, tokens_like_weights
from helpers import tiny_model

BATCH = 3


@pytest.mark.parametrize("pattern, num_attention", [("SDH*", 1), ("*SD*H*", 3)])
def test_what_fits_while_a_layer_moves(one_process, monkeypatch, pattern, num_attention):
    """The largest layer counts twice: one of attention, with keys and values of 128 channels in float32."""
    model = tiny_model("evo2_tiny", hybrid_override_pattern=pattern, num_layers=len(pattern))
    per_token = 2 * 128 * 4

    def free_for(num_tokens, num_layers):
        fixed = sum(cache_memory._cache_bytes(model, 0)) + moving
        return BATCH * (fixed + num_layers * num_tokens * per_token) / CACHE_SHARE + 1

    for layers_move in (False, True):
        # the layer with the largest fixed part is not the one with keys and values, but both are counted
        moving = layers_move * max(cache_memory._cache_bytes(model, 0))
        free = free_for(1000, num_attention + layers_move)
        monkeypatch.setattr(cache_memory, "_free_bytes", lambda free=free: free)
        assert memory_limit(model, BATCH, layers_move=layers_move) == 1000
        monkeypatch.setattr(cache_memory, "_free_bytes", lambda free=free: free - 2)
        assert memory_limit(model, BATCH, layers_move=layers_move) == 999
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert tokens_like_weights(model) == weights // (num_attention * per_token)


def test_what_pytorch_holds_on_to_is_free(monkeypatch):
    held = [1000]
    monkeypatch.setattr(cache_memory.megatron, "on_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", held.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5000 - sum(held), 8000))
    assert cache_memory._free_bytes() == 5000
