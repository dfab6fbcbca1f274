# SPDX-License-Identifier: Apache-2.0
"""What is asked of Transformer Engine; whether it then gives the same is in test_transformer_engine.py."""

import contextlib

import pytest
import torch

from helpers import tiny_model

OVERLAPPED = {"qkv", "proj", "fc1", "fc2"}
"""Names of layers for which Transformer Engine overlaps communication; any other fails in the first forward pass."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_transformer_engine_computes_in_16_bits_only(one_process, monkeypatch, dtype):
    from megatron.core.transformer.enums import AttnBackend

    from evo2_megatron.model.layer_specs import layer_modules
    from evo2_megatron.model.provider import provider_for
    from evo2_megatron.model.torch_modules import TorchCoreAttention

    monkeypatch.setattr("evo2_megatron.model.layer_specs.have_transformer_engine", lambda: True)
    provider = provider_for("evo2_tiny", vocab_size=512, params_dtype=dtype, bf16=False)
    provider._fit_to_machine()
    fused = dtype != torch.float32
    assert (layer_modules(provider).core_attention is not TorchCoreAttention) == fused
    assert provider.apply_rope_fusion == fused
    # it ends up in environment variables, which Megatron does not let a second model of a process change
    assert provider.attention_backend is AttnBackend.auto


def test_communication_is_overlapped_under_names_that_exist(one_process, monkeypatch):
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    names = set()
    for layer in (ColumnParallelLinear, RowParallelLinear):
        build = layer.__init__

        def record(self, *args, build=build, tp_comm_buffer_name=None, **kwargs):
            names.add(tp_comm_buffer_name)
            build(self, *args, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)

        monkeypatch.setattr(layer, "__init__", record)
    tiny_model()
    assert names - {None} == OVERLAPPED


def test_recomputation_enters_the_context_of_8_bits_again(one_process, monkeypatch):
    recomputed = []

    def te_checkpoint(run, distribute_saved_activations, get_rng_state_tracker, tp_group, *arguments):
        recomputed.append(run)
        return run(*arguments)

    monkeypatch.setattr("megatron.core.extensions.transformer_engine.te_checkpoint", te_checkpoint)
    model = tiny_model().train()
    model.config.fp8 = "hybrid"
    model(torch.zeros(1, 32, dtype=torch.int64))
    assert len(recomputed) == 4


def test_every_layer_has_the_context_of_4_bits(one_process, monkeypatch):
    layers = []

    def get_fp4_context(config, layer, is_init):
        layers.append(layer)
        return contextlib.nullcontext()

    monkeypatch.setattr("evo2_megatron.model.stack.get_fp4_context", get_fp4_context)
    model = tiny_model()
    model.config.fp4 = "e2m1"
    model(torch.zeros(1, 32, dtype=torch.int64))
    assert layers == [0, 1, 2, 3]
