# SPDX-License-Identifier: Apache-2.0
"""Matrix products with weights in 8 bits: one scale for each output, inputs and results in bfloat16.

``y = bf16(s * sum(bf16(x) * q))`` with sums in float32 and ``q = round(W / s)`` in -127..127 (symmetric weight-only
quantisation by channel, as in LLM.int8() without its outliers, arXiv 2208.07339). Only weights are rounded to 8 bits,
so a result does not depend on what else is in a batch. Gradients go to inputs, straight through their rounding, and
not to weights (Dettmers et al., QLoRA, arXiv 2305.14314).
Shape legend: T tokens, H input channels, D output channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST = 127

_FEW_TOKENS = 24
"""Tokens up to which a CPU is faster with torch's own kernel than with weights made wide again."""

_KERNEL_STEP = 64
"""Input channels must be a multiple of this for that kernel, which reads past the end of others."""

_BLOCK_NUMBERS = 1 << 20
"""Weights that are wide at the same time on a CPU: 4 MiB, which stay in its cache."""

_BLOCK_NUMBERS_CUDA = 1 << 26
"""The same on a GPU, where a product should be large: 128 MiB."""


def quantize_rows(weight_DH: Tensor, largest_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to 8 bits.

    Args:
        weight_DH: Of any floating dtype.
        largest_D: Largest magnitude of each row; of a matrix whose columns are divided over processes, that of the
            whole row. None: as in ``weight_DH``.

    Returns:
        int8 q_DH and bfloat16 s_D, such that ``q * s`` is off by half of s at most. A row of zeros has a scale of 1; a
        row with a number that is not finite has a scale that is not, so that it shows in every result.
    """
    if largest_D is None:
        largest_D = largest_of_rows(weight_DH)
    scale_D = (largest_D.float() / _LARGEST).bfloat16()
    scale_D = torch.where(scale_D == 0, torch.ones_like(scale_D), scale_D)
    q_DH = torch.empty_like(weight_DH, dtype=torch.int8)
    for rows in row_blocks(weight_DH):
        part_RH = weight_DH[rows].float() / scale_D[rows, None].float()
        q_DH[rows] = part_RH.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return q_DH, scale_D


def largest_of_rows(weight_DH: Tensor) -> Tensor:
    """Largest magnitude of each row, float32 [D]."""
    return torch.linalg.vector_norm(weight_DH, ord=torch.inf, dim=1, dtype=torch.float32)


def int8_product(x_TH: Tensor, q_DH: Tensor, scale_D: Tensor) -> Tensor:
    """``x W^T`` with W as ``quantize_rows`` gives it, in the dtype of x, rounded to bfloat16; with a gradient for x.

    On a CPU few tokens take a kernel of torch's that reads the 8 bits themselves; else a block of rows at a time is
    made wide, and thrown away.
    """
    return _Int8Product.apply(x_TH, q_DH, scale_D)


class _Int8Product(torch.autograd.Function):
    """The product, which keeps nothing but the 8 bits for its gradient."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, q_DH: Tensor, scale_D: Tensor) -> Tensor:
        ctx.save_for_backward(q_DH, scale_D)
        return _product(x_TH, q_DH, scale_D)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        """``grad W``, summed up in float32 over blocks of rows that are made wide, in the dtype of the gradient."""
        q_DH, scale_D = ctx.saved_tensors
        wide = wide_dtype(grad_TD.device, of_gradient=grad_TD.dtype)
        grad_TH = grad_TD.new_zeros(len(grad_TD), q_DH.shape[1], dtype=torch.float32)
        for rows in row_blocks(q_DH):
            grad_TH += (grad_TD[:, rows] * scale_D[rows]).to(wide) @ q_DH[rows].to(wide)
        return grad_TH.to(grad_TD.dtype), None, None


def _product(x_TH: Tensor, q_DH: Tensor, scale_D: Tensor) -> Tensor:
    x16_TH = x_TH.bfloat16()
    is_few = len(x_TH) <= _FEW_TOKENS and q_DH.shape[1] % _KERNEL_STEP == 0
    if is_few and x_TH.device.type == "cpu":
        return torch._weight_int8pack_mm(x16_TH.contiguous(), q_DH, scale_D).to(x_TH.dtype)
    wide = wide_dtype(x_TH.device)
    wide_TH = x16_TH.to(wide)
    y_TD = x_TH.new_empty(len(x_TH), len(q_DH))
    for rows in row_blocks(q_DH):
        y_TR = F.linear(wide_TH, q_DH[rows].to(wide)) * scale_D[rows]
        y_TD[:, rows] = y_TR.bfloat16()
    return y_TD


def row_blocks(weight_DH: Tensor) -> list[slice]:
    """Rows of a weight matrix that may be made wide at a time: few enough for a CPU's cache."""
    num_rows = max(1, wide_numbers(weight_DH.device) // weight_DH.shape[1])
    return [slice(start, start + num_rows) for start in range(0, len(weight_DH), num_rows)]


def wide_numbers(device: torch.device) -> int:
    """Weights that may be wide at the same time."""
    return _BLOCK_NUMBERS if device.type == "cpu" else _BLOCK_NUMBERS_CUDA


def wide_dtype(device: torch.device, *, of_gradient: torch.dtype = torch.bfloat16) -> torch.dtype:
    """In what weights are multiplied when they are wide; gradients in float32 stay so on a CPU.

    A CPU without arithmetic for bfloat16 multiplies float32 faster. Sums are of float32 either way.
    """
    if device.type == "cpu" and (of_gradient == torch.float32 or not torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    return torch.bfloat16
