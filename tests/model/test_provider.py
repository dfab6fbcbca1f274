# SPDX-License-Identifier: Apache-2.0
"""Parameter names, shapes and counts of every size; refusal of layouts that do not fit."""

import pytest
import torch

from evo2_megatron.architectures import ARCHITECTURES
from evo2_megatron.config import UserError
from evo2_megatron.runtime import cuda_on_cpu
from helpers import PARAMETERS, tiny_model

EVERY_LAYER = {
    "mlp.linear_fc1.layer_norm_weight": "H",
    "mlp.linear_fc1.weight": "2F H",
    "mlp.linear_fc2.weight": "H F",
}
HYENA = {
    "mixer.dense_projection.layer_norm_weight": "H",
    "mixer.dense_projection.weight": "3H H",
    "mixer.hyena_proj_conv.short_conv_weight": "3H 3",
    "mixer.dense.weight": "H H",
    "mixer.dense.bias": "H",
}
BY_SYMBOL = {
    "S": HYENA | {"mixer.mixer.short_conv.short_conv_weight": "G 1 7"},
    "D": HYENA | {"mixer.mixer.conv_bias": "H", "mixer.mixer.filter.h": "G 128", "mixer.mixer.filter.decay": "G 128"},
    "H": HYENA | {"mixer.mixer.conv_bias": "H"} | {f"mixer.mixer.filter.{x}": "H 16" for x in ("p", "gamma", "R")},
    "*": {
        "self_attention.linear_qkv.layer_norm_weight": "H",
        "self_attention.linear_qkv.weight": "3H H",
        "self_attention.linear_proj.weight": "H H",
    },
}


def expected_tensors(arch, vocab_size):
    sizes = {"H": arch.hidden_size, "F": arch.ffn_hidden_size, "G": arch.num_groups, "V": vocab_size}
    names = {"embedding.word_embeddings.weight": "V H", "decoder.final_norm.weight": "H"}
    if not arch.tied_embeddings:
        names["output_layer.weight"] = "V H"
    for i, symbol in enumerate(arch.pattern):
        layer = EVERY_LAYER | BY_SYMBOL[symbol]
        if symbol == "S" and arch.short_conv_bias:
            layer = layer | {"mixer.mixer.conv_bias": "G"}
        if symbol == "*" and arch.attention_output_bias:
            layer = layer | {"self_attention.linear_proj.bias": "H"}
        names |= {f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()}

    def size(part):
        letter = part[-1]
        return int(part) if letter.isdigit() else int(part[:-1] or 1) * sizes[letter]

    return {name: tuple(size(part) for part in shape.split()) for name, shape in names.items()}


@pytest.mark.parametrize("model_size", sorted(ARCHITECTURES))
def test_parameters_on_the_meta_device(one_process, model_size):
    with torch.device("meta"):
        model = tiny_model(model_size, perform_initialization=False, use_cpu_initialization=True)

    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[model_size]
    tensors = {k: tuple(v.shape) for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    assert tensors == expected_tensors(ARCHITECTURES[model_size], 512)


@pytest.mark.parametrize("settings", [{}, {"quantize_weights": "int8"}, {"quantize_weights": "int4"}])
def test_all_is_made_on_the_gpu_where_there_is_one(one_process, monkeypatch, settings):
    if torch.cuda.is_available():
        assert {value.device.type for value in tiny_model(**settings).state_dict().values()} == {"cuda"}
        return
    monkeypatch.setattr("evo2_megatron.model.provider.on_cuda", lambda: True)
    with cuda_on_cpu.on_device("meta"):  # stands for the GPU
        model = tiny_model(perform_initialization=False, **settings)
    assert {name for name, value in model.state_dict().items() if value is not None and not value.is_meta} == set()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tensor_model_parallel_size": 3}, "size 3 does not divide the model's 128 hidden size .*; use 2 or 4, "),
        ({"pipeline_model_parallel_size": 5}, "pipeline parallel size 5 for 4 layers; use 4 or less"),
        ({"num_layers": 5}, "has 4 symbols for 5 layers"),
        ({"hybrid_override_pattern": "SDXX"}, "may contain only"),
        ({"loss_normalization": "batch"}, "choose sequence or micro_batch"),
        ({"to_upper": "none"}, "choose normalized_weighted or weighted"),
        ({"lowercase_loss_weight": -0.1}, "--lowercase-loss-weight is -0.1; give a number from 0 on"),
    ],
)
def test_what_does_not_fit_is_refused(one_process, settings, message):
    with pytest.raises(UserError, match=message):
        tiny_model(**settings)


def test_unknown_size_names_the_known_ones(one_process):
    with pytest.raises(UserError, match="Unknown model size '7b'; choose one of evo2_1b_base, evo2_20b"):
        tiny_model("7b")


def test_the_vocabulary_is_padded_to_a_multiple_of_eight(one_process):
    assert tiny_model(vocab_size=500, should_pad_vocab=True).vocab_size == 504
    assert tiny_model(vocab_size=500).vocab_size == 500


def test_compiled_kernels_need_a_gpu_or_the_interpreter(one_process, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        tiny_model(use_subquadratic_ops=True)


def test_weights_start_as_published(one_process):
    torch.manual_seed(0)
    model = tiny_model("evo2_mini")
    H, N = 384, 8
    layers = model.decoder.layers
    want_std = {
        model.embedding.word_embeddings.weight: 0.02,
        layers[0].mixer.dense_projection.weight: (2 / (5 * H)) ** 0.5,
        layers[3].self_attention.linear_qkv.weight: (2 / (5 * H)) ** 0.5,
        layers[0].mixer.dense.weight: 2 / (N * H**0.5),
        layers[0].mlp.linear_fc2.weight: 2 / (N * H**0.5),
        layers[2].mixer.mixer.filter.R: 0.025,
        layers[1].mixer.mixer.filter.h: 1e-5 / 128**0.5,
        layers[0].mixer.hyena_proj_conv.short_conv_weight: 3**-0.5 / 3**0.5,
    }
    for weight, std in want_std.items():
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    pole = layers[2].mixer.mixer.filter()[0].exp()
    assert pole.min() > 0.96388 and pole.max() < 0.99633
    assert not layers[0].mixer.dense.bias.any() and layers[0].mlp.linear_fc1.layer_norm_weight.eq(1).all()


def test_decay_of_the_medium_filter(one_process):
    # 256 groups: the last of the first group, and points of the middle and last group
    decay = tiny_model(hidden_size=256, num_groups_hyena=256, num_groups_hyena_medium=256).decoder.layers[1]
    decay = decay.mixer.mixer.filter.decay
    picked = [decay[0, 127], decay[128, 64], decay[128, 127], decay[255, 1], decay[255, 10]]
    torch.testing.assert_close(
        torch.stack(picked), torch.tensor([0.99005, 0.59863, 0.36124, 0.45503, 3.805e-4]), rtol=2e-4, atol=0
    )
