# SPDX-License-Identifier: Apache-2.0
"""Matrix products with weights in 4 bits: a scale and a zero point for every 64 inputs of an output.

``y = bf16(sum(bf16(x) * w))`` with sums in float32 and ``w = s * (q - 8) + z``, q in 0..15, s and z in bfloat16: the
range of 64 (or 32) weights in 15 equal steps, rounded to the nearest (the baseline of GPTQ, arXiv 2210.17323, in the
form of torch's own 4-bit products). Gradients go to inputs, straight through their rounding, and not to weights.

Weights lie in blocks of R rows: a byte holds row r of a block in its low and row r + R/2 in its high half, for one
column, and a block is [H, R/2]. With R from ``_KERNEL_ROWS`` that is what torch's kernel for this processor reads.
Shape legend: T tokens, H input channels, D output channels, N blocks, R rows of a block, G groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evo2_megatron.ops.int8 import wide_dtype, wide_numbers

_LEVELS = 15
_MIDDLE = 8

_GROUPS = (64, 32)
"""Inputs that share a scale: the first of these that divides their number."""

BYTES_PER_WEIGHT = 0.5 + 4 / _GROUPS[0]
"""With s and z, in the usual groups."""

_KERNEL_ROWS = {"AVX512": 64, "AVX2": 32}
"""Rows of a block in torch's kernel for few tokens, by what the processor can; others have none in this layout."""

_FEW_TOKENS = 96
"""Tokens up to which a CPU is faster with that kernel than with weights made wide again."""


class Int4Weights(NamedTuple):
    """A matrix of D rows and H columns; rows of zeros fill up the last block."""

    packed_NHR: Tensor
    """uint8 [N, H, R/2]."""

    scale_zero_GD2: Tensor
    """bfloat16 [G, N * R, 2]: s and z of each group of columns of a row."""

    num_rows: int
    """D."""


def group_size(num_columns: int) -> int | None:
    """Inputs that share a scale where an output has so many; None: they cannot be divided."""
    return next((size for size in _GROUPS if num_columns % size == 0), None)


def empty_weights(num_rows: int, num_columns: int, group: int, device: torch.device) -> Int4Weights:
    """Weights to be filled, in the layout for a device; zeros until then."""
    rows = _rows_of_block(num_rows, num_columns, device)
    num_blocks = -(-num_rows // rows)
    return Int4Weights(
        torch.empty(num_blocks, num_columns, rows // 2, dtype=torch.uint8, device=device),
        torch.zeros(num_columns // group, num_blocks * rows, 2, dtype=torch.bfloat16, device=device),
        num_rows,
    )


def quantize_groups(weight_DH: Tensor, group: int) -> Int4Weights:
    """Round a weight matrix to 4 bits.

    Args:
        weight_DH: Of any floating dtype.
        group: Columns that share a scale; divides H.

    Returns:
        Weights, none of which is off by more than half of its s and the rounding of s and z. A group with a number
        that is not finite has s and z that are not, so that it shows in every result.
    """
    num_rows, num_columns = weight_DH.shape
    weights = empty_weights(num_rows, num_columns, group, weight_DH.device)
    rows = 2 * weights.packed_NHR.shape[2]
    for number, packed_HR in enumerate(weights.packed_NHR):
        here = slice(number * rows, (number + 1) * rows)
        part_RH = weight_DH[here].float()
        part_RGK = F.pad(part_RH, (0, 0, 0, rows - len(part_RH))).unflatten(1, (-1, group))
        low_RG, high_RG = part_RGK.aminmax(dim=2)
        scale_RG = ((high_RG - low_RG) / _LEVELS).bfloat16()
        zero_RG = (low_RG + _MIDDLE * scale_RG.float()).bfloat16()
        scale_RG = torch.where(scale_RG == 0, torch.ones_like(scale_RG), scale_RG)
        steps_RGK = (part_RGK - zero_RG.float()[..., None]) / scale_RG.float()[..., None]
        q_RH = steps_RGK.round_().add_(_MIDDLE).clamp_(0, _LEVELS).to(torch.uint8).flatten(1)
        packed_HR.copy_((q_RH[: rows // 2] | q_RH[rows // 2 :] << 4).mT)
        weights.scale_zero_GD2[:, here] = torch.stack((scale_RG, zero_RG), dim=2).transpose(0, 1)
    return weights


def int4_product(x_TH: Tensor, weights: Int4Weights) -> Tensor:
    """``x W^T`` in the dtype of x, rounded to bfloat16; with a gradient for x.

    On a CPU few tokens take a kernel of torch's that reads the 4 bits themselves; else some blocks of rows at a time
    are made wide, and thrown away.
    """
    return _Int4Product.apply(x_TH, *weights)


class _Int4Product(torch.autograd.Function):
    """The product, which keeps nothing but the 4 bits for its gradient."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, packed_NHR: Tensor, scale_zero_GD2: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(packed_NHR, scale_zero_GD2)
        ctx.num_rows = num_rows
        return _product(x_TH, Int4Weights(packed_NHR, scale_zero_GD2, num_rows))

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        """``grad W``, summed up in float32 over blocks of rows that are made wide, in the dtype of the gradient."""
        weights = Int4Weights(*ctx.saved_tensors, ctx.num_rows)
        wide = wide_dtype(grad_TD.device, of_gradient=grad_TD.dtype)
        num_columns = weights.packed_NHR.shape[1]
        grad_TH = grad_TD.new_zeros(len(grad_TD), num_columns, dtype=torch.float32)
        for rows, wide_HD in _wide_blocks(weights, wide):
            grad_TH += grad_TD[:, rows].to(wide) @ wide_HD.mT
        return grad_TH.to(grad_TD.dtype), None, None, None


def _product(x_TH: Tensor, weights: Int4Weights) -> Tensor:
    x16_TH = x_TH.bfloat16()
    if len(x_TH) <= _FEW_TOKENS and _has_kernel(weights):
        return _product_of_few(x16_TH, weights).to(x_TH.dtype)
    wide = wide_dtype(x_TH.device)
    wide_TH = x16_TH.to(wide)
    y_TD = x_TH.new_empty(len(x_TH), weights.num_rows)
    for rows, wide_HD in _wide_blocks(weights, wide):
        y_TD[:, rows] = (wide_TH @ wide_HD).bfloat16()
    return y_TD


def _has_kernel(weights: Int4Weights) -> bool:
    packed_NHR = weights.packed_NHR
    return packed_NHR.device.type == "cpu" and 2 * packed_NHR.shape[2] == _kernel_rows()


def _product_of_few(x16_TH: Tensor, weights: Int4Weights) -> Tensor:
    num_groups, num_rows, _ = weights.scale_zero_GD2.shape
    num_columns = x16_TH.shape[1]
    packed = weights.packed_NHR.view(num_rows, num_columns // 2)
    group = num_columns // num_groups
    y_TD = torch._weight_int4pack_mm_for_cpu(x16_TH.contiguous(), packed, group, weights.scale_zero_GD2)
    return y_TD[:, : weights.num_rows]


def _wide_blocks(weights: Int4Weights, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Which rows, and W^T of them, [H, number of rows]; some blocks at a time."""
    num_blocks, num_columns, half = weights.packed_NHR.shape
    at_a_time = max(1, wide_numbers(weights.packed_NHR.device) // (2 * half * num_columns))
    for start in range(0, num_blocks, at_a_time):
        wide_HD = _wide(weights, slice(start, min(start + at_a_time, num_blocks)), dtype)
        rows = slice(start * 2 * half, min((start + at_a_time) * 2 * half, weights.num_rows))
        yield rows, wide_HD[:, : rows.stop - rows.start]


def _wide(weights: Int4Weights, blocks: slice, dtype: torch.dtype) -> Tensor:
    """W^T of some blocks, [H, R * number of blocks]; in bfloat16 rounded once, as sums of a product are of float32."""
    packed_HNR = weights.packed_NHR[blocks].transpose(0, 1)
    half = packed_HNR.shape[2]
    wide_HNR = packed_HNR.new_empty(*packed_HNR.shape[:2], 2 * half, dtype=dtype)
    # in 8 bits 0 - 8 is 248, which are the bits of -8
    wide_HNR[..., :half] = ((packed_HNR & _LEVELS) - _MIDDLE).view(torch.int8)
    wide_HNR[..., half:] = ((packed_HNR >> 4) - _MIDDLE).view(torch.int8)
    rows = slice(blocks.start * 2 * half, blocks.stop * 2 * half)
    scale_G1D, zero_G1D = weights.scale_zero_GD2[:, None, rows].to(dtype).unbind(3)
    wide_GKD = wide_HNR.view(len(scale_G1D), -1, rows.stop - rows.start)
    return torch.addcmul(zero_G1D, wide_GKD, scale_G1D, out=wide_GKD).flatten(0, 1)


def _kernel_rows() -> int | None:
    return _KERNEL_ROWS.get(torch.backends.cpu.get_cpu_capability())


def _rows_of_block(num_rows: int, num_columns: int, device: torch.device) -> int:
    """As torch's kernel has it on a CPU; elsewhere what is made wide at a time."""
    rows = _kernel_rows()
    if device.type == "cpu" and rows is not None:
        return rows
    most = max(2, wide_numbers(device) // num_columns)
    return 2 * math.ceil(num_rows / math.ceil(num_rows / most) / 2)  # blocks of the same size
