# SPDX-License-Identifier: Apache-2.0
"""The check behind ``--verify``: it agrees with our model in every format's names, and notices any tensor."""

from dataclasses import replace

import pytest
import torch

from checkpoint.savanna_model import savanna_state
from evo2_megatron.architectures import architecture
from evo2_megatron.checkpoint.names import unfused
from evo2_megatron.checkpoint.vortex import to_vortex
from evo2_megatron.config import UserError
from evo2_megatron.tasks.conversion import verify_logits
from evo2_megatron.tasks.conversion.verify_logits import check_memory, compare, random_dna
from evo2_megatron.tasks.reference_forward import reference_logits
from parity.our_model import our_model
from parity.vortex_model import random_weights

TINY = architecture("evo2_tiny")
MODELS = {
    "tiny": TINY,
    "any_order": replace(TINY, pattern="HD*S*H", position_scale=8.0, attention_output_bias=False, num_heads=1),
    "untied": replace(TINY, tied_embeddings=False, output_bias=True),
    "nv": architecture("striped_hyena_tiny_nv"),
}


def savanna(weights, model):
    return savanna_state({name: x for name, x in weights.items() if name != "output_layer.bias"}, model)


def by_names(weights, model):
    """The same weights in every format that can hold them."""
    yield "megatron", weights
    yield "megatron", {unfused(name): value for name, value in weights.items()}
    if not model.output_bias:
        yield "savanna", savanna(weights, model)
        if not model.short_conv_bias:
            yield "vortex", to_vortex(weights, model)


@torch.inference_mode()
@pytest.mark.parametrize("name", MODELS)
def test_reference_equals_our_model(one_process, name):
    model, weights, batches = MODELS[name], random_weights(MODELS[name]), random_dna()
    ours = our_model(model, weights)
    logits = [ours(tokens_BL) for tokens_BL in batches]
    for names, theirs in by_names(weights, model):
        difference = compare(logits, reference_logits(theirs, model, batches, names=names))
        assert difference.is_rounding and difference.relative_rms < 1e-5, (names, difference)


@pytest.mark.parametrize("names", ["megatron", "savanna", "vortex"])
def test_every_tensor_counts(names):
    weights = dict(by_names(random_weights(TINY), TINY))[names]
    batches = random_dna()[-1:]
    expected = reference_logits(weights, TINY, batches, names=names)
    unused = ("_extra_state", "inv_freq", ".filter.t", "post_attention_layernorm.weight", "outer_mlp_layernorm.weight")
    for name, value in weights.items():
        # the head of a tied model is the embedding
        if not name.endswith(unused) and name != "unembed.weight":
            changed = reference_logits(weights | {name: 1.01 * value}, TINY, batches, names=names)
            assert not compare(changed, expected).is_rounding, name


def test_what_is_more_than_rounding():
    logits = [torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))]
    assert compare(logits, logits).is_rounding
    assert compare([logits[0] + 1e-6], logits).is_rounding
    assert not compare([logits[0] + 2e-4], logits).is_rounding
    one_off, broken = logits[0].clone(), logits[0].clone()
    one_off[0, 0, 0] += 2e-3
    broken[0, 0, 0] = float("nan")
    assert not compare([one_off], logits).is_rounding
    assert not compare([broken], logits).is_rounding


def test_the_sequences_are_dna_and_always_the_same():
    first, second = random_dna(), random_dna()
    assert [tuple(x.shape) for x in first] == [(2, length) for length in (1, 2, 127, 128, 129, 400)]
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert {chr(token) for x in first for token in x.flatten().tolist()} == set("ACGT")


def test_memory_is_checked_before(monkeypatch):
    check_memory(TINY, 512)
    free = verify_logits.psutil.virtual_memory()._replace(available=40 * 10**9)
    monkeypatch.setattr(verify_logits.psutil, "virtual_memory", lambda: free)
    check_memory(architecture("evo2_7b"), 512)
    with pytest.raises(UserError, match=r"needs 170\.4 GB of memory, and 40\.0 GB are free"):
        check_memory(architecture("evo2_40b"), 512)
