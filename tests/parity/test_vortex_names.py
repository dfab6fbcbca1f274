# SPDX-License-Identifier: Apache-2.0
"""The name table: parameter counts of every published size, and the all-or-nothing move into Vortex's names."""

import math
from dataclasses import replace

import pytest
import torch

from evo2_megatron.architectures import architecture
from evo2_megatron.checkpoint.names import check_tensors, is_trained, parameter_shapes, rows, unfused
from evo2_megatron.checkpoint.translate import FORMS
from evo2_megatron.checkpoint.vortex import to_vortex, vortex_config
from evo2_megatron.config import UserError
from helpers import PARAMETERS
from parity.vortex_model import random_weights


@pytest.mark.parametrize("key", PARAMETERS)
def test_parameter_shapes(key):
    shapes = parameter_shapes(architecture(key), vocab_size=512)
    assert sum(math.prod(shape) for name, shape in shapes.items() if is_trained(name)) == PARAMETERS[key]


def test_rows_name_every_tensor_once():
    for key in ("evo2_tiny", "striped_hyena_1b_nv_parallel"):
        table = rows(architecture(key))
        for column in ("megatron", "vortex", "savanna"):
            names = [name for row in table for name in getattr(row, column)]
            assert len(names) == len(set(names))
        assert {form for row in table for form in (row.vortex_form, row.savanna_form)} <= FORMS.keys()


def test_names_without_fused_layers():
    names = parameter_shapes(architecture("evo2_tiny"), vocab_size=512)
    changed = {name: unfused(name) for name in names if unfused(name) != name}
    assert len(changed) == 8 and len(set(changed.values()) | names.keys()) == len(names) + 8
    assert (
        changed["decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"]
        == "decoder.layers.3.input_layernorm.weight"
    )
    assert unfused("decoder.final_norm.weight") == "decoder.final_norm.weight"


@pytest.mark.parametrize(
    "found, message",
    [
        ({"a": (2, 3)}, "the file: 1 missing (b); do this"),
        ({"a": (2, 3), "b": (4,), "c": (5,)}, "the file: 1 not understood (c); do this"),
        ({"a": (3, 2), "b": (4,)}, "the file: 1 of another shape (a (3, 2) instead of (2, 3)); do this"),
        ({"c": ()}, "the file: 2 missing (a, b); 1 not understood (c); do this"),
    ],
)
def test_check_tensors(found, message):
    expected = {"a": (2, 3), "b": (4,)}
    check_tensors(expected, expected, source="the file", remedy="do this")
    with pytest.raises(UserError) as error:
        check_tensors(found, expected, source="the file", remedy="do this")
    assert str(error.value) == message


def test_to_vortex_values():
    tiny = architecture("evo2_tiny")
    ours = random_weights(tiny)

    theirs = to_vortex(ours | {"decoder.layers.0.mlp.linear_fc1._extra_state": None}, tiny)

    gate, up = theirs["blocks.0.mlp.l1.weight"], theirs["blocks.0.mlp.l2.weight"]
    assert torch.equal(torch.cat([gate, up]), ours["decoder.layers.0.mlp.linear_fc1.weight"])
    medium = "decoder.layers.1.mixer.mixer.filter"
    assert torch.equal(theirs["blocks.1.filter.h"].squeeze(1), ours[f"{medium}.h"] * ours[f"{medium}.decay"])
    long = "decoder.layers.2.mixer.mixer.filter"
    poles = -torch.exp(ours[f"{long}.p"]) * torch.exp(ours[f"{long}.gamma"])
    torch.testing.assert_close(theirs["blocks.2.filter.log_poles"].squeeze(2), poles)
    assert torch.equal(theirs["embedding_layer.weight"], theirs["unembed.weight"])
    assert theirs["blocks.3.inner_mha_cls.rotary_emb.inv_freq"].tolist() == pytest.approx(
        [10_000 ** (-2 * k / 32) for k in range(16)]
    )


def test_to_vortex_keeps_dtypes_but_of_filters():
    tiny = architecture("evo2_tiny")
    theirs = to_vortex({name: w.bfloat16() for name, w in random_weights(tiny).items()}, tiny)
    float32 = {name.rpartition(".")[2] for name, w in theirs.items() if w.dtype == torch.float32}
    assert float32 == {"h", "log_poles", "residues", "inv_freq"}
    assert {w.dtype for w in theirs.values()} == {torch.float32, torch.bfloat16}


def test_to_vortex_is_all_or_nothing():
    tiny = architecture("evo2_tiny")
    ours = random_weights(tiny)
    with pytest.raises(UserError, match=r"1 missing \(decoder.layers.1.mixer.mixer.filter.decay\)"):
        to_vortex({n: w for n, w in ours.items() if n != "decoder.layers.1.mixer.mixer.filter.decay"}, tiny)
    with pytest.raises(UserError, match="1 not understood"):
        to_vortex(ours | {"decoder.layers.0.mixer.mixer.conv_bias": torch.zeros(32)}, tiny)
    with pytest.raises(UserError, match="of another shape"):
        to_vortex(ours, replace(tiny, ffn_hidden_size=176))


def test_vortex_refuses_nvidia_variants():
    variant = architecture("striped_hyena_tiny_nv")
    with pytest.raises(UserError, match="evo2_"):
        vortex_config(variant, vocab_size=512)
    with pytest.raises(UserError, match="evo2_"):
        to_vortex(random_weights(variant), variant)
