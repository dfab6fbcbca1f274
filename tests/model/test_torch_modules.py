# SPDX-License-Identifier: Apache-2.0
"""Plain-torch stand-ins for Transformer Engine's modules against their formulas."""

import pytest
import torch

from evo2_megatron.config import UserError
from helpers import tiny_model


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(
    "num_queries, num_keys", [(1, 1), (1, 9), (7, 7), (3, 8), (63, 70), (64, 65), (600, 1300), (1025, 1030)]
)
def test_causal_attention(megatron, num_queries, num_keys, gradients):
    from evo2_megatron.model.torch_modules import causal_attention

    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8).double() for n in (num_queries, num_keys, num_keys))
    future = torch.arange(num_keys) > torch.arange(num_queries)[:, None] + num_keys - num_queries
    score = (query @ key.mT / 8**0.5).masked_fill(future, float("-inf"))

    with torch.set_grad_enabled(gradients):
        got = causal_attention(query, key, value)
    torch.testing.assert_close(got, score.softmax(-1) @ value)


def test_causal_attention_in_16_bits(megatron):
    from evo2_megatron.model.torch_modules import causal_attention

    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 16, dtype=torch.bfloat16) for n in (100, 300, 300))
    with torch.no_grad():
        got = causal_attention(query, key, value)
    wide = causal_attention(query.double(), key.double(), value.double())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), wide, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_few_tokens(one_process, num_tokens, dtype, bias):
    model = tiny_model(add_bias_output=bias)
    layer = model.output_layer
    weight = model.embedding.word_embeddings.weight.detach().to(dtype).requires_grad_()
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(512, dtype=dtype))
    x_LBH = torch.randn(1, num_tokens, 128, dtype=dtype, requires_grad=True)
    inputs = [x_LBH, weight, *([layer.bias] if bias else [])]

    got, kept_bias = layer(x_LBH, weight)

    want = x_LBH @ weight.mT + (layer.bias if bias else 0)
    assert kept_bias is None and got.shape == want.shape and got.is_contiguous()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(got, want, **tolerance)
    for mine, theirs in zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs)):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 127, 128, 129])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_without_arithmetic_for_it_is_rounded_once(one_process, monkeypatch, num_tokens, bias):
    from evo2_megatron.model import torch_modules
    from evo2_megatron.ops import int8

    monkeypatch.setattr(torch_modules, "_wants_float32", lambda x_TH, weight_DH: True)
    monkeypatch.setattr(int8, "_BLOCK_NUMBERS", 100 * 128)
    layer = tiny_model(add_bias_output=bias).output_layer
    weight = torch.randn(512, 128, dtype=torch.bfloat16)
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(512, dtype=torch.bfloat16))
    x_LBH = torch.randn(1, num_tokens, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        got, _ = layer(x_LBH, weight)
    want = x_LBH.double() @ weight.double().mT + (layer.bias.detach().double() if bias else 0)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("wants_float32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens, num_sequences", [(1, 2), (2, 1), (7, 3), (129, 1), (128, 2)])
def test_what_feeds_a_convolution(one_process, monkeypatch, num_tokens, num_sequences, dtype, wants_float32):
    """The same numbers, the tokens of each channel next to each other, as every Hyena layer asks for them."""
    from evo2_megatron.model import torch_modules
    from evo2_megatron.ops import int8

    monkeypatch.setattr(torch_modules, "_wants_float32", lambda x_TH, weight: wants_float32 and dtype != torch.float32)
    monkeypatch.setattr(int8, "_BLOCK_NUMBERS", 100 * 128)
    layers = tiny_model().decoder.layers
    assert [layer.mixer.dense_projection.feeds_convolution for layer in layers[:3]] == [True] * 3
    layer = layers[0].mixer.dense_projection
    weight, x_LBH = torch.randn(384, 128, dtype=dtype), torch.randn(num_tokens, num_sequences, 128, dtype=dtype)
    with torch.no_grad():
        got, bias = layer.product(x_LBH, weight)
        layer.feeds_convolution = False
        usual, _ = layer.product(x_LBH, weight)
    assert got.shape == usual.shape and got.dtype == usual.dtype and bias is None
    torch.testing.assert_close(got.double(), x_LBH.double() @ weight.double().mT, rtol=2**-8, atol=1e-4)
    if num_tokens > 1:
        assert got.stride(0) == 1 and usual.is_contiguous()


def test_gradients_of_what_feeds_a_convolution(one_process):
    layer = tiny_model().decoder.layers[0].mixer.dense_projection
    x_LBH = torch.randn(13, 2, 128, requires_grad=True)
    got, _ = layer.product(x_LBH)
    layer.feeds_convolution = False
    want, _ = layer.product(x_LBH)
    grad_LBE = torch.randn(want.shape)
    pairs = zip(*(torch.autograd.grad(y_LBE, (x_LBH, layer.weight), grad_LBE) for y_LBE in (got, want)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_who_multiplies_bfloat16_in_float32(megatron, monkeypatch):
    from evo2_megatron.model.torch_modules import _wants_float32

    narrow, wide = torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2)
    for has_arithmetic in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda known=has_arithmetic: known)
        with torch.no_grad():
            assert _wants_float32(narrow, narrow) is not has_arithmetic and not _wants_float32(wide, wide)
        assert not _wants_float32(narrow, narrow), "gradients are those of torch's own product"


@pytest.mark.parametrize("batch_size", [1, 2])
def test_linear_layers_give_the_same_without_megatrons_autograd_functions(one_process, monkeypatch, batch_size):
    from evo2_megatron.model import torch_modules

    model = tiny_model("evo2_tiny", add_bias_output=True)
    ids = torch.randint(0, 512, (batch_size, 20))

    def results() -> list[torch.Tensor]:
        loss = model(ids, labels=ids)
        return [loss.detach(), *torch.autograd.grad(loss.mean(), list(model.parameters()))]

    short_cut, calls = results(), []
    monkeypatch.setattr(torch_modules, "_takes_just_the_product", lambda layer, x: calls.append(layer))
    for got, want in zip(short_cut, results(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert len(calls) == 4 * 4 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(megatron, dtype):
    from evo2_megatron.model.torch_modules import rms_norm

    torch.manual_seed(0)
    x, weight, grad = torch.randn(5, 2, 64).to(dtype), torch.rand(64).to(dtype), torch.randn(5, 2, 64).to(dtype)
    x[0, 0] = 0
    wide = [tensor.double().requires_grad_() for tensor in (x, weight)]
    narrow = [tensor.clone().requires_grad_() for tensor in (x, weight)]

    got = rms_norm(*narrow, 1e-6)
    want = torch.nn.functional.rms_norm(wide[0], (64,), wide[1], 1e-6)

    assert got.dtype == dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(got.double(), want, **tolerance)
    # where x is 0 its gradient is w * 1000 * grad: compare relatively
    for mine, theirs in zip(torch.autograd.grad(got, narrow, grad), torch.autograd.grad(want, wide, grad.double())):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance["rtol"], atol=10 * tolerance["atol"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 1, 64), (40, 1, 1)])
def test_norms_part_by_part(megatron, monkeypatch, dtype, shape):
    from evo2_megatron.model import torch_modules

    x_LBH, weight_H = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    want = torch_modules.rms_norm(x_LBH, weight_H, 1e-6)
    monkeypatch.setattr(torch_modules, "_NORM_NUMBERS", 1)
    monkeypatch.setattr(torch_modules, "_NORM_PART", 29)
    with torch.no_grad():
        calls = []
        steps = torch_modules._rms_norm_in_steps
        monkeypatch.setattr(torch_modules, "_rms_norm_in_steps", lambda *a: calls.append(a) or steps(*a))
        assert torch.equal(torch_modules.rms_norm(x_LBH, weight_H, 1e-6), want)
    assert len(calls) == -(-(shape[0] * shape[1]) // max(1, 29 // shape[2]))


@pytest.mark.parametrize("in_pieces", [False, True])
def test_more_tokens_than_a_fused_rotation_counts(one_process, monkeypatch, in_pieces):
    from evo2_megatron.model import attention

    model = tiny_model().eval()
    model.config.apply_rope_fusion = True
    monkeypatch.setattr(attention, "_MOST_NUMBERS", 2 * 10 * 128 - 1)
    state = model.new_inference_state(2, 10) if in_pieces else None
    with torch.no_grad(), pytest.raises(UserError, match="^10 tokens of 2 sequence.* lower --chunk-length, or use"):
        model(torch.full((2, 10), 65), inference_context=state)


def test_queries_and_keys_to_be_counted_by_themselves(one_process, monkeypatch):
    """As views of the projection they would be more than a fused rotation counts."""
    from evo2_megatron.model import attention

    layer = tiny_model().decoder.layers[3].self_attention
    hidden_LBH = torch.randn(10, 2, 128)
    views = layer.get_query_key_value_tensors(hidden_LBH)
    monkeypatch.setattr(attention, "_MOST_NUMBERS", 2 * 10 * 128)
    assert not layer.get_query_key_value_tensors(hidden_LBH)[0].is_contiguous()  # without fusion
    monkeypatch.setattr(layer.config, "apply_rope_fusion", True)
    copies = layer.get_query_key_value_tensors(hidden_LBH)
    assert [part.is_contiguous() for part in copies] == [True, True, False]
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))
