# SPDX-License-Identifier: Apache-2.0
"""Weights in 8 bits: the rounding, and products on both sides of the number of tokens where the way changes."""

import pytest
import torch

from evo2_megatron.ops import int8
from evo2_megatron.ops.int8 import int8_product, quantize_rows
from evo2_megatron.ops.reference import int8_product_ref

LAST_DIGIT = 2**-8
"""Half a unit in the last place of bfloat16, relative, and a little more."""


@pytest.fixture(params=[False, True], ids=["wide in float32", "wide in bfloat16"])
def wide_in_bfloat16(request, monkeypatch):
    """Processors without and with arithmetic for bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param)
    return request.param


def weights(rows, columns, dtype=torch.float32):
    torch.manual_seed(0)
    # rows of very different size
    return (torch.randn(rows, columns) * torch.logspace(-6, 6, rows)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 5), (129, 127), (64, 128)])
def test_no_weight_is_off_by_more_than_half_a_step(monkeypatch, rows, columns, dtype):
    monkeypatch.setattr(int8, "_BLOCK_NUMBERS", 3 * columns)
    weight_DH = torch.randn(rows, columns).to(dtype)
    q_DH, scale_D = quantize_rows(weight_DH)
    assert q_DH.dtype == torch.int8 and scale_D.dtype == torch.bfloat16 and int(q_DH.min()) >= -127
    error_DH = (q_DH.double() * scale_D.double()[:, None] - weight_DH.double()).abs()
    # the scale, rounded down, may leave a quarter of a step of the largest
    assert (error_DH <= 0.5001 * scale_D.double()[:, None]).all()
    largest_D = weight_DH.double().abs().amax(1)
    torch.testing.assert_close(scale_D.double(), largest_D / 127, rtol=2**-8, atol=0)


def test_rows_of_zeros_and_of_what_is_not_finite():
    weight_DH = torch.ones(4, 64)
    weight_DH[0], weight_DH[1, 3], weight_DH[2, 3] = 0, torch.nan, torch.inf
    assert quantize_rows(weight_DH)[1][0] == 1  # what 0 / 0 is as an integer is up to the processor
    for num_tokens in (1, 100):
        y_TD = int8_product(torch.ones(num_tokens, 64), *quantize_rows(weight_DH))
        assert (y_TD[:, 0] == 0).all() and y_TD[:, 1:3].isnan().all()
        torch.testing.assert_close(y_TD[:, 3], torch.full((num_tokens,), 64.0), rtol=LAST_DIGIT, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns", [(1, 64), (127, 128), (131, 127), (256, 192)])
@pytest.mark.parametrize("num_tokens", [1, 2, 24, 25, 129])
def test_products(monkeypatch, wide_in_bfloat16, rows, columns, num_tokens, dtype):
    monkeypatch.setattr(int8, "_BLOCK_NUMBERS", 50 * columns)
    weight_DH = weights(rows, columns)
    x_TH = torch.randn(num_tokens, columns).to(dtype)
    got = int8_product(x_TH, *quantize_rows(weight_DH))
    want = int8_product_ref(x_TH, weight_DH)
    assert got.dtype == dtype
    # a rounding to bfloat16, or one before the scale and one after, and float32 sums of terms that cancel
    size_TD = x_TH.double().abs() @ weight_DH.double().abs().T
    allowed_TD = LAST_DIGIT * (1 + wide_in_bfloat16) * want.abs() + 1e-5 * size_TD
    assert ((got.double() - want).abs() <= allowed_TD).all()
    assert torch.equal(got, got.bfloat16().to(dtype))
    if rows > 1:  # weights that are not rounded are told apart
        plain = x_TH.double() @ weight_DH.double().T
        assert ((plain - want).abs() > allowed_TD).any()


def test_a_token_does_not_depend_on_the_others(wide_in_bfloat16):
    pair = quantize_rows(torch.randn(96, 128))
    x_TH = torch.randn(60, 128)
    whole = int8_product(x_TH, *pair)
    for tokens in (slice(0, 1), slice(7, 31), slice(20, 60)):
        torch.testing.assert_close(
            int8_product(x_TH[tokens], *pair), whole[tokens], rtol=(2 + wide_in_bfloat16) * LAST_DIGIT, atol=1e-5
        )


def test_channels_that_lie_apart():
    pair = quantize_rows(torch.randn(96, 128))
    x_TH = torch.randn(128, 5).T
    assert torch.equal(int8_product(x_TH, *pair), int8_product(x_TH.contiguous(), *pair))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns", [(1, 64), (127, 128), (131, 127)])
@pytest.mark.parametrize("num_tokens", [1, 129])
def test_gradients(monkeypatch, wide_in_bfloat16, rows, columns, num_tokens, dtype):
    """Of the inputs: straight through the roundings, those of the rounded weights."""
    monkeypatch.setattr(int8, "_BLOCK_NUMBERS", 50 * columns)
    q_DH, scale_D = quantize_rows(torch.randn(rows, columns))
    x_TH = torch.randn(num_tokens, columns).to(dtype).requires_grad_()
    grad_TD = torch.randn(num_tokens, rows).to(dtype)
    int8_product(x_TH, q_DH, scale_D).backward(grad_TD)
    want = grad_TD.double() @ (q_DH.double() * scale_D.double()[:, None])
    # in bfloat16 what goes into the sums is rounded, too
    tolerance = 1e-5 if dtype == torch.float32 else 2 * LAST_DIGIT
    assert x_TH.grad.dtype == dtype
    assert (x_TH.grad.double() - want).norm() <= tolerance * want.norm()
    with torch.no_grad():
        assert not int8_product(x_TH, q_DH, scale_D).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 24, 25, 129])
def test_products_on_a_gpu(num_tokens):
    weight_DH, x_TH = weights(131, 192), torch.randn(num_tokens, 192)
    got = int8_product(x_TH.cuda(), *quantize_rows(weight_DH.cuda())).cpu().double()
    want = int8_product_ref(x_TH, weight_DH)
    size_TD = x_TH.double().abs() @ weight_DH.double().abs().T
    # the product is rounded to bfloat16 before it is scaled, and again after
    assert ((got - want).abs() <= 2 * LAST_DIGIT * want.abs() + 1e-5 * size_TD).all()
