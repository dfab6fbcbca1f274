# SPDX-License-Identifier: Apache-2.0
"""The 8-bit floating-point format e4m3, in tensors of any other float dtype and on any device.

e4m3 (torch.float8_e4m3fn) has 4 bits of exponent with bias 7 and 3 of mantissa: multiples of 2^-9 up to 2^-6, then 8
values per power of two, up to 448; no infinity. A product "in 8 bits" rounds both operands to it and sums in a wider
format: ``y = round(x * s_x) round(w * s_w)^T / (s_x * s_w)``, with one scale s for each tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0

_MANTISSA_BITS, _SMALLEST_NORMAL = 3, -6
_FLOAT32_BIAS, _FLOAT32_MANTISSA_BITS, _FLOAT32_EXPONENT = 127, 23, 0x7F800000


class _RoundToE4M3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x32 = x.float()
        # an exponent's bits alone, read as a float32, are the power of two below x
        exponent = (x32.view(torch.int32) & _FLOAT32_EXPONENT).clamp_(
            min=(_FLOAT32_BIAS + _SMALLEST_NORMAL) << _FLOAT32_MANTISSA_BITS
        )
        step = (exponent - (_MANTISSA_BITS << _FLOAT32_MANTISSA_BITS)).view(torch.float32)
        return torch.round(x32 / step).mul_(step).clamp_(-E4M3_MAX, E4M3_MAX).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def round_to_e4m3(x: Tensor) -> Tensor:
    """Round every element to the nearest e4m3 value, ties to even.

    What is larger than 448, infinity included, becomes 448 with its sign, as in Transformer Engine's casts; NaN stays.
    The gradient passes straight through.

    Args:
        x: Any float dtype; converted through float32.

    Returns:
        The same shape and dtype; bfloat16, float16 and float32 hold every e4m3 value exactly.
    """
    return _RoundToE4M3.apply(x)


def round_scaled(x: Tensor, scale: float) -> Tensor:
    """``round_to_e4m3(x * scale)`` brought back to the magnitude of x by a power of two, which loses no digit.

    Times ``remaining_factor(scale)`` it is x as 8 bits with this scale hold it. The two are kept apart because 16 bits
    hold their product with another rounding only; it belongs behind the sum over a matrix product.

    Args:
        x: Any float dtype.
        scale: Above 0. Takes x into the range of e4m3: 448 over the largest magnitude, if everything is to fit.
    """
    if scale == 1.0:
        return round_to_e4m3(x)
    return (round_to_e4m3(x.float() * scale) * 2.0 ** -_power(scale)).to(x.dtype)


def remaining_factor(scale: float) -> float:
    """See ``round_scaled``: in (1/2, 1]."""
    return 2.0 ** _power(scale) / scale


def _power(scale: float) -> int:
    return math.frexp(scale)[1] - 1


def to_e4m3(x: Tensor, scale: float | Tensor) -> Tensor:
    """``x * scale`` as torch.float8_e4m3fn, rounded as ``round_to_e4m3`` does."""
    # some of torch's casts make NaN of what is too large
    return (x.float() * scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def e4m3_matmul(x_TH: Tensor, weight_DH: Tensor, x_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """``round(x * s_x) w^T / (s_x * s_w)`` by the device's 8-bit units; no gradients.

    Args:
        x_TH: Any float dtype but float8; any number of rows.
        weight_DH: torch.float8_e4m3fn, of ``to_e4m3``; on CUDA both sides a multiple of 16.
        x_scale: Above 0, float32 without dimensions, like ``weight_scale``, with which the weight was made.

    Returns:
        y_TD, in the dtype of x. On CUDA with the fast sums that Transformer Engine uses forwards.
    """
    per_tensor = F.ScalingType.TensorWise
    return F.scaled_mm(
        to_e4m3(x_TH, x_scale),
        weight_DH.t(),
        x_scale.reciprocal(),
        per_tensor,
        weight_scale.reciprocal(),
        per_tensor,
        output_dtype=x_TH.dtype,
        use_fast_accum=x_TH.is_cuda,
    )
