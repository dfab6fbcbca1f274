# SPDX-License-Identifier: Apache-2.0
"""Rounding to e4m3 against torch's own 8-bit dtype, and against the format's definition."""

import math

import pytest
import torch

from evo2_megatron.ops.fp8 import E4M3_MAX, remaining_factor, round_scaled, round_to_e4m3, to_e4m3
from evo2_megatron.ops.reference import e4m3_values, round_to_e4m3_ref

FLOAT8 = torch.float8_e4m3fn


def same_bits(a, b):
    return torch.equal(a.float().nan_to_num(7e7).view(torch.int32), b.float().nan_to_num(7e7).view(torch.int32))


def as_torch(x):
    """Torch's cast makes NaN of what is too large; Transformer Engine's stops at the largest value, as ours."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(FLOAT8).to(x.dtype)


def test_the_256_patterns_stay():
    values = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
    assert same_bits(round_to_e4m3(values), values)
    positive = values[:127].tolist()  # 127 is NaN
    assert positive == e4m3_values() and positive[-1] == E4M3_MAX == torch.finfo(FLOAT8).max


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = round_to_e4m3(numbers)
    assert got.dtype == dtype and same_bits(got, as_torch(numbers))


def test_float32_of_every_exponent():
    # a prime step meets all exponents, signs, infinities' neighbours and NaN
    numbers = torch.arange(0, 2**32, 9973, dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert same_bits(round_to_e4m3(numbers), as_torch(numbers))


def test_ties_zeros_and_neighbours():
    values = torch.tensor(e4m3_values(), dtype=torch.float64)
    middles = ((values[1:] + values[:-1]) / 2).float()  # exact
    around = [middles, torch.nextafter(middles, torch.tensor(0.0)), torch.nextafter(middles, torch.tensor(1e9))]
    numbers = torch.cat([*around, torch.tensor([0.0, 2.0**-10, 2.0**-11, 1e-45, 463.9, 464.0, 480.0, 3e38])])
    numbers = torch.cat([numbers, -numbers])
    got = round_to_e4m3(numbers)
    assert same_bits(got, as_torch(numbers))
    assert same_bits(got, round_to_e4m3_ref(numbers))
    assert math.copysign(1, round_to_e4m3(torch.tensor(-0.0)).item()) == -1


def test_too_large_and_not_a_number():
    numbers = torch.tensor([449.0, 1e30, math.inf, -math.inf, math.nan])
    got = round_to_e4m3(numbers)
    assert got[:4].tolist() == [448.0, 448.0, 448.0, -448.0] and got[4].isnan()
    for scale in (1.0, 0.25, 3.0):
        assert same_bits(to_e4m3(numbers, scale), round_to_e4m3(numbers * scale))


def test_gradient_passes_straight_through():
    x = torch.tensor([0.3, -1000.0, 2.0**-12, 17.3], requires_grad=True)
    weights = torch.randn(4)
    (round_to_e4m3(x) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 2.0, 448 / 0.37, 0.013, 7.9999995])
def test_scaled_operands_give_the_scaled_product(dtype, scale):
    torch.manual_seed(0)
    x = (torch.randn(5, 64) * 3 / scale).to(dtype)
    got = round_scaled(x, scale)
    assert got.dtype == dtype
    expected = (x.float() * scale).clamp(-448, 448).to(FLOAT8).double() / scale
    torch.testing.assert_close(got.double() * remaining_factor(scale), expected, rtol=1e-7, atol=0)
    assert 0.5 < remaining_factor(scale) <= 1
