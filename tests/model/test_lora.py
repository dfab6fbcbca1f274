# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from checkpoint.tiny_adapters import ALL_LINEAR
from evo2_megatron.config import UserError
from helpers import tiny_model

TOKENS_BL = torch.tensor(list(b"ACGTTGCATTAACCGGTATA"))[None]
LAYER_0 = {
    f"decoder.layers.0.{name}"
    for name in (
        "mixer.dense_projection.layer_norm_weight",
        "mixer.dense_projection.weight",
        "mixer.hyena_proj_conv.short_conv_weight",
        "mixer.mixer.short_conv.short_conv_weight",
        "mixer.dense.weight",
        "mixer.dense.bias",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    )
}


def adapted(model, **fields):
    """The model with adapters on it; none unless asked for."""
    from evo2_megatron.model.lora import Evo2LoRA

    adapters = Evo2LoRA(**({"target_modules": [], "dim": 4, "alpha": 8} | fields))
    assert adapters(model) is model
    return model


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "pattern, path, expected",
    [
        ("mixer", "decoder.layers.3.mixer", True),
        ("mixer", "decoder.layers.3.mixer.mixer", True),
        ("mixer", "decoder.layers.3.mixer.dense", False),
        ("*.layers.0.*.mixer", "decoder.layers.0.mixer.mixer", True),
        ("*.layers.0.*.mixer", "decoder.layers.10.mixer.mixer", False),
        ("*.layers.1*.dense", "decoder.layers.10.mixer.dense", True),
        ("decoder.final_norm", "decoder.final_norm", True),
        ("final_norm", "decoder.final_norm", True),
        ("norm", "decoder.final_norm", False),
        ("*norm", "decoder.final_norm", True),
        # a dot is a dot, and a bracket is no syntax
        ("decoder.layers.*.mixer.dense", "decoder.layers.0.mixerxdense", False),
        ("*(", "decoder.final_norm", False),
    ],
)
def test_matches(megatron, pattern, path, expected):
    from evo2_megatron.model.lora import matches

    assert matches(pattern, path) is expected


BOTH = ["word_embeddings", "output_layer"]
# share_embeddings_and_output_weights, --lora-target-modules, adapters or error
TARGETS_AND_TYING = [
    (False, ["word_embeddings"], "VocabParallelEmbedding does not support LoRA adapters"),
    (False, BOTH, "VocabParallelEmbedding does not support LoRA adapters"),
    (True, ["word_embeddings"], "VocabParallelEmbedding does not support LoRA adapters"),
    (True, BOTH, "VocabParallelEmbedding does not support LoRA adapters"),
    (True, ["output_layer"], "no weight of its own in a model with share_embeddings_and_output_weights=True"),
    (False, ["output_layer"], {"output_layer.adapter.linear_in.weight", "output_layer.adapter.linear_out.weight"}),
]
# share_embeddings_and_output_weights, --lora-skip-freeze-modules, trained or error
KEPT_AND_TYING = [
    (False, ["word_embeddings"], {"embedding.word_embeddings.weight"}),
    (False, ["output_layer"], {"output_layer.weight"}),
    (False, BOTH, {"embedding.word_embeddings.weight", "output_layer.weight"}),
    (True, ["word_embeddings"], "only one of .* share_embeddings_and_output_weights=True"),
    (True, ["output_layer"], "only one of .* share_embeddings_and_output_weights=True"),
    (True, BOTH, {"embedding.word_embeddings.weight"}),
]
ROWS = [("target_modules", *row) for row in TARGETS_AND_TYING] + [
    ("skip_freeze_modules", *row) for row in KEPT_AND_TYING
]


@pytest.mark.parametrize("field, tied, modules, expected", ROWS)
def test_weight_tying(one_process, field, tied, modules, expected):
    """Every row of the two tables that users were promised."""
    model = tiny_model(share_embeddings_and_output_weights=tied, hybrid_override_pattern="SD", num_layers=2)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            adapted(model, **{field: modules})
        return
    adapted(model.train(), **{field: modules})
    assert trained(model) == expected
    for parameter in model.parameters():
        parameter.grad = None
    model(TOKENS_BL, labels=TOKENS_BL).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected


@pytest.mark.parametrize(
    "patterns, expected",
    [
        ([], set()),
        (["final_norm"], {"decoder.final_norm.weight"}),
        (["decoder.final_norm"], {"decoder.final_norm.weight"}),
        (["*.layers.0.*"], LAYER_0),
        (["*.layers.0.*.dense"], {f"decoder.layers.0.mixer.dense.{name}" for name in ("weight", "bias")}),
        # only a module's own parameters, not those of modules inside it
        (["mixer"], {f"decoder.layers.{i}.mixer.mixer.conv_bias" for i in (1, 2)}),
        (["mlp"], set()),
        (["nothing_of_the_kind"], set()),
    ],
)
def test_what_stays_trainable(one_process, patterns, expected):
    assert trained(adapted(tiny_model(), skip_freeze_modules=patterns)) == expected


def test_everything_can_stay_trainable(one_process):
    model = tiny_model()
    everything = {name for name, _ in model.named_parameters()}
    assert trained(adapted(model, skip_freeze_modules=["*"])) == everything


@pytest.mark.parametrize(
    "targets, kept, message",
    [
        (
            ["dense"],
            ["dense"],
            "skip_freeze_modules and target_modules must not overlap: .*decoder.layers.0.mixer.dense",
        ),
        (["linear_fc1"], ["*.layers.1.*"], "must not overlap: .*decoder.layers.1.mlp.linear_fc1"),
        (["*.layers.0.*"], [], "decoder.layers.0.mixer.hyena_proj_conv, which is not a linear layer"),
        (["final_norm"], [], "decoder.final_norm, which is not a linear layer"),
    ],
)
def test_lists_that_cannot_work(one_process, targets, kept, message):
    with pytest.raises(UserError, match=message):
        adapted(tiny_model(), target_modules=targets, skip_freeze_modules=kept)


def test_patterns_that_match_nothing_are_told(one_process):
    from evo2_megatron.model.lora import choose

    paths = {"embedding.word_embeddings", "decoder.layers.0.mixer.dense", "output_layer"}
    choice = choose(paths, targets=["dense", "linear_qvk"], skip_freeze=["*.layers.9.*"], tied_embeddings=True)
    assert choice == ({"decoder.layers.0.mixer.dense"}, set(), ("linear_qvk", "*.layers.9.*"))


def randomised(model):
    """Give B, which is zero at the start, values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter.linear_out" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_an_adapter_adds_its_product(one_process):
    """``y = W x + alpha / dim * B A x``, where x is what W meets: behind a fused norm, the normalised input."""
    for untied in ({}, {"share_embeddings_and_output_weights": False}):
        plain = tiny_model(**untied)
        targets = [*ALL_LINEAR, *(["output_layer"] if untied else [])]
        model = tiny_model(**untied)
        model.load_state_dict(plain.state_dict())
        adapted(model, target_modules=targets).eval()
        before_BLV = model(TOKENS_BL)
        assert torch.equal(before_BLV, plain(TOKENS_BL)), "B is zero at the start"

        weights = randomised(model).state_dict()
        weights = {name: weight for name, weight in weights.items() if "_extra_state" not in name}
        merged = {name: weight.clone() for name, weight in weights.items() if ".adapter." not in name}
        ends = [name.removesuffix(".adapter.linear_in.weight") for name in weights if "linear_in.weight" in name]
        assert len(ends) == 16 + bool(untied)
        for name in ends:
            low, high = (weights[f"{name}.adapter.linear_{end}.weight"] for end in ("in", "out"))
            assert low.shape[0] == high.shape[1] == 4
            merged[f"{name}.weight"] += 8 / 4 * high @ low
        plain.load_state_dict(merged, strict=False)
        after_BLV = model(TOKENS_BL)
        torch.testing.assert_close(after_BLV, plain(TOKENS_BL), rtol=0, atol=1e-5)
        assert (after_BLV - before_BLV).abs().max() > 1e-2


def test_dropout_is_for_training(one_process):
    model = randomised(adapted(tiny_model(), target_modules=ALL_LINEAR, dropout=0.5))
    assert model.training
    assert not torch.equal(model(TOKENS_BL), model(TOKENS_BL))
    model.eval()
    assert torch.equal(model(TOKENS_BL), model(TOKENS_BL))


def test_caches_work_with_adapters(one_process):
    model = randomised(adapted(tiny_model(), target_modules=ALL_LINEAR)).eval()
    with torch.inference_mode():
        state = model.new_inference_state(1, TOKENS_BL.shape[1])
        parts = [model(part, inference_context=state) for part in TOKENS_BL.split([7, 1, 1, 11], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(TOKENS_BL), rtol=1e-4, atol=1e-4)
