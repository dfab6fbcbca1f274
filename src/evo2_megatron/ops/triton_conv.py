# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the short convolutions: a whole S or D operator with its gates, and a convolution alone.

A row of tokens is cut into blocks, and a block of outputs is a sum of products on tensor cores: its own block of
inputs, and those before it, with Toeplitz matrices of the taps. Values and gradients have kernels. Without a GPU they
run under Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported), for tests.

Shape legend: B batch, D channels, E = 3D interleaved rows, L tokens, K taps, T tokens in a block, M blocks of a
program, N blocks that a tap can reach over, P programs along a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from evo2_megatron.ops.toeplitz import diagonal_sums

_MAX_TAPS = 129
"""The kernels are unrolled over the blocks that taps reach over."""

_FEW_TAPS = 8
"""Up to here gradients are sums of shifted products, one tap at a time."""

FEW_TAPS_TOKENS = 1024


def gated_conv(u_BEL: Tensor, input_taps_EK: Tensor, inner_taps_DK: Tensor) -> Tensor:
    """``fused_conv.gated_conv`` without a skip term.

    Args:
        u_BEL: Float32, bfloat16 or float16. Products of 16-bit input run on tensor cores in TF32, those of float32 as
            three products in TF32, which is nearly float32.
        input_taps_EK: Three taps a row.
        inner_taps_DK: Up to 129 taps.

    Returns:
        y_BDL, in the dtype of ``u_BEL``. Differentiable once in every argument.

    Raises:
        ValueError: There are more taps.
    """
    if inner_taps_DK.shape[1] > _MAX_TAPS or input_taps_EK.shape[1] != 3:
        raise ValueError(
            f"the kernel takes 3 input taps and up to {_MAX_TAPS} inner ones, not {input_taps_EK.shape[1]} and "
            f"{inner_taps_DK.shape[1]}"
        )
    return _GatedConv.apply(u_BEL, input_taps_EK.float(), inner_taps_DK.float())


def causal_conv(x_BDL: Tensor, taps_DK: Tensor, history_BDP: Tensor | None = None) -> Tensor:
    """``causal_conv.causal_conv`` of float32, bfloat16 or float16 and up to 129 taps; ValueError if there are more."""
    if taps_DK.shape[1] > _MAX_TAPS:
        raise ValueError(f"the kernel takes up to {_MAX_TAPS} taps, not {taps_DK.shape[1]}")
    if history_BDP is None:
        return _CausalConv.apply(x_BDL, taps_DK.float())
    seen_BDL = torch.cat([history_BDP.to(x_BDL.dtype), x_BDL], dim=-1)
    return _CausalConv.apply(seen_BDL, taps_DK.float())[..., history_BDP.shape[-1] :]


class _GatedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u_BEL: Tensor, input_taps_EK: Tensor, inner_taps_DK: Tensor) -> Tensor:
        u_BEL, input_taps_EK, inner_taps_DK = (x.contiguous() for x in (u_BEL, input_taps_EK, inner_taps_DK))
        ctx.save_for_backward(u_BEL, input_taps_EK, inner_taps_DK)
        (B, _, L), (D, K) = u_BEL.shape, inner_taps_DK.shape
        y_BDL = torch.empty(B, D, L, dtype=u_BEL.dtype, device=u_BEL.device)
        shape = Shape.of(K, L, u_BEL.dtype, gates=True)
        _gated_conv_kernel[shape.grid(L, D, B)](u_BEL, input_taps_EK, inner_taps_DK, y_BDL, L, D, K, **shape._asdict())
        return y_BDL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_BDL: Tensor) -> tuple[Tensor | None, ...]:
        u_BEL, input_taps_EK, inner_taps_DK = ctx.saved_tensors
        need_u, need_input_taps, need_inner_taps = ctx.needs_input_grad
        (B, E, L), (D, K) = u_BEL.shape, inner_taps_DK.shape
        # the gradient of the three streams; the gated values, and the gradient of what the inner taps make of them
        grad_streams_BEL = torch.empty(B, E, L, device=u_BEL.device)
        z_BDL, grad_inner_BDL = (torch.empty(B, D, L, device=u_BEL.device) for _ in range(2))
        shape = Shape.of(K, L, u_BEL.dtype, gates=True)
        read = (u_BEL, input_taps_EK, inner_taps_DK, grad_y_BDL.contiguous())
        written = (grad_streams_BEL, z_BDL, grad_inner_BDL)
        _gated_backward_kernel[shape.grid(L, D, B)](*read, *written, L, D, K, **shape._asdict())
        grads: list[Tensor | None] = [None, None]
        if need_u or need_input_taps:
            grads = list(_few_taps_backward(grad_streams_BEL, u_BEL, input_taps_EK))
        grads.append(_grad_taps(grad_inner_BDL, z_BDL, K, shape.PRECISION) if need_inner_taps else None)
        return tuple(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad))


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BDL: Tensor, taps_DK: Tensor) -> Tensor:
        x_BDL, taps_DK = x_BDL.contiguous(), taps_DK.contiguous()
        ctx.save_for_backward(x_BDL, taps_DK)
        return _convolve(x_BDL, taps_DK, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_BDL: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_BDL, taps_DK = ctx.saved_tensors
        need_x, need_taps = ctx.needs_input_grad
        grad_y_BDL = grad_y_BDL.contiguous()
        if taps_DK.shape[1] <= _FEW_TAPS:
            grad_x_BDL, grad_taps_DK = _few_taps_backward(grad_y_BDL, x_BDL, taps_DK)
            return grad_x_BDL if need_x else None, grad_taps_DK if need_taps else None
        grad_x_BDL = _convolve(grad_y_BDL, taps_DK, backward=True) if need_x else None
        precision = precision_of(x_BDL.dtype)
        return grad_x_BDL, _grad_taps(grad_y_BDL, x_BDL, taps_DK.shape[1], precision) if need_taps else None


class Shape(NamedTuple):
    """Of a program of the convolutions: what needs the fewest instructions a token and spills no registers."""

    T: int
    M: int
    PRECISION: str
    num_warps: int
    num_stages: int = 1
    """No load ahead of its use: that would take more shared memory than a GPU has."""

    @classmethod
    def of(cls, num_taps: int, length: int, dtype: torch.dtype, *, gates: bool) -> Shape:
        if num_taps <= 17:
            T, M, num_warps = 16, 64, 4
        elif not gates:
            T, M, num_warps = 32, 128, 4
        elif dtype == torch.float32:
            T, M, num_warps = 32, 64, 4
        else:
            T, M, num_warps = 64, 64, 8
        return cls(T, blocks_at_once(length, T, M), precision_of(dtype), num_warps)

    def grid(self, length: int, num_rows: int, batch: int) -> tuple[int, int, int]:
        return triton.cdiv(length, self.M * self.T), num_rows, batch


def blocks_at_once(length: int, T: int, most: int) -> int:
    """Blocks of T tokens that a program works on: as many as there are, but a side of a product has 16 at least."""
    return min(most, max(16, triton.next_power_of_2(triton.cdiv(length, T))))


def precision_of(dtype: torch.dtype) -> str:
    """Of products: TF32 of 16-bit signals, nearly float32 of others."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _convolve(x_BDL: Tensor, taps_DK: Tensor, *, backward: bool) -> Tensor:
    """``causal_conv.correlate``, or ``correlate_grad_x``."""
    (B, D, L), K = x_BDL.shape, taps_DK.shape[1]
    y_BDL = torch.empty_like(x_BDL)
    shape = Shape.of(K, L, x_BDL.dtype, gates=False)
    _conv_kernel[shape.grid(L, D, B)](x_BDL, taps_DK, y_BDL, L, D, K, backward, **shape._asdict())
    return y_BDL


def _few_taps_backward(grad_y_BDL: Tensor, x_BDL: Tensor, taps_DK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a convolution with respect to its signal, in the dtype of that, and to its taps."""
    (B, D, L), K = x_BDL.shape, taps_DK.shape[1]
    grad_x_BDL = torch.empty_like(x_BDL)
    T = min(FEW_TAPS_TOKENS, max(128, triton.next_power_of_2(L)))
    P = triton.cdiv(L, T)
    sums_BPDK = torch.empty(B, P, D, K, device=x_BDL.device)
    _few_taps_backward_kernel[(P, D, B)](grad_y_BDL, x_BDL, taps_DK, grad_x_BDL, sums_BPDK, L, D, K, T)
    return grad_x_BDL, sums_BPDK.sum((0, 1))


def products_form(num_taps: int, length: int) -> dict[str, int]:
    """Constants of the kernel for gradients of taps."""
    T = 16 if num_taps <= 17 else 32
    return {"T": T, "M": blocks_at_once(length, T, 64)}


def _grad_taps(grad_y_BDL: Tensor, x_BDL: Tensor, num_taps: int, precision: str) -> Tensor:
    """``causal_conv.correlate_grad_taps``: products of blocks, of whose diagonals each belongs to one tap."""
    (B, D, L), form = x_BDL.shape, products_form(num_taps, x_BDL.shape[2])
    N, T = triton.cdiv(num_taps - 1, form["T"]) + 1, form["T"]
    products_DNTT = torch.empty(D, N, T, T, device=x_BDL.device)
    _tap_products_kernel[(D, N)](x_BDL, grad_y_BDL, products_DNTT, L, D, B, **form, PRECISION=precision, num_stages=1)
    # side by side the blocks of a channel are one wide Toeplitz matrix
    return diagonal_sums(products_DNTT.transpose(1, 2).flatten(2))[:, :num_taps].flip(1)


@triton.jit
def _block(T: tl.constexpr, M: tl.constexpr):
    """Numbers of the tokens of a program."""
    return (tl.program_id(0) * M + tl.arange(0, M))[:, None] * T + tl.arange(0, T)[None, :]


@triton.jit
def _toeplitz(taps, shift, K: tl.constexpr, T: tl.constexpr, BACKWARD: tl.constexpr):
    """Entry (s, w): the tap that leads from token s of a block to token w of the block ``shift`` tokens later.

    Backward: from w to s, transposed.
    """
    tokens = tl.arange(0, T)
    lag = tokens[None, :] - tokens[:, None]
    lag = shift - lag if BACKWARD else shift + lag
    return tl.load(taps + (K - 1 - lag), mask=(lag >= 0) & (lag < K), other=0.0)


@triton.jit
def _stream(u, taps, row, t, L):
    """Three-tap convolution of one row at the tokens ``t``; ``u`` and ``taps`` point to the row 0 of a channel."""
    total = tl.zeros(t.shape, tl.float32)
    for k in tl.static_range(3):
        place = t - 2 + k
        value = tl.load(u + row * L + place, mask=(place >= 0) & (place < L), other=0.0)
        total += tl.load(taps + row * 3 + k) * value.to(tl.float32)
    return total


@triton.jit
def _conv_kernel(
    x,
    taps,
    y,
    L,
    D,
    K: tl.constexpr,
    BACKWARD: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M blocks of T tokens of one channel; backward: the gradient of the input from that of the output."""
    d = tl.program_id(1)
    row = (tl.program_id(2).to(tl.int64) * D + d) * L
    t = _block(T, M)
    total = tl.zeros((M, T), tl.float32)
    for n in tl.static_range((K - 2 + T) // T + 1):
        place = t + n * T if BACKWARD else t - n * T
        value = tl.load(x + row + place, mask=(place >= 0) & (place < L), other=0.0).to(tl.float32)
        total = tl.dot(value, _toeplitz(taps + d * K, n * T, K, T, BACKWARD), total, input_precision=PRECISION)
    tl.store(y + row + t, total.to(y.dtype.element_ty), mask=t < L)


@triton.jit
def _gated_conv_kernel(
    u, input_taps, inner_taps, y, L, D, K: tl.constexpr, T: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr
):
    """M blocks of T tokens of one channel, from the projection to the second gate."""
    d = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64) * D + d
    u += row * 3 * L
    input_taps += d * 9
    t = _block(T, M)
    total = tl.zeros((M, T), tl.float32)
    for n in tl.static_range((K - 2 + T) // T + 1):
        z = _stream(u, input_taps, 1, t - n * T, L) * _stream(u, input_taps, 2, t - n * T, L)
        total = tl.dot(z, _toeplitz(inner_taps + d * K, n * T, K, T, False), total, input_precision=PRECISION)
    total *= _stream(u, input_taps, 0, t, L)
    tl.store(y + row * L + t, total.to(y.dtype.element_ty), mask=t < L)


@triton.jit
def _gated_backward_kernel(
    u,
    input_taps,
    inner_taps,
    grad_y,
    grad_streams,
    z_out,
    grad_inner_out,
    L,
    D,
    K: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """M blocks of T tokens of one channel, from the second gate back to the streams, which are computed again."""
    d = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64) * D + d
    u += row * 3 * L
    grad_y += row * L
    grad_streams += row * 3 * L
    input_taps += d * 9
    inner_taps += d * K
    t = _block(T, M)
    inside = t < L
    inner = tl.zeros((M, T), tl.float32)
    for n in tl.static_range((K - 2 + T) // T + 1):
        z = _stream(u, input_taps, 1, t - n * T, L) * _stream(u, input_taps, 2, t - n * T, L)
        if n == 0:
            tl.store(z_out + row * L + t, z, mask=inside)
        inner = tl.dot(z, _toeplitz(inner_taps, n * T, K, T, False), inner, input_precision=PRECISION)
    grad = tl.load(grad_y + t, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_streams + t, grad * inner, mask=inside)
    grad_z = tl.zeros((M, T), tl.float32)
    for n in tl.static_range((K - 2 + T) // T + 1):
        later = t + n * T
        grad = tl.load(grad_y + later, mask=later < L, other=0.0).to(tl.float32) * _stream(u, input_taps, 0, later, L)
        if n == 0:
            tl.store(grad_inner_out + row * L + t, grad, mask=inside)
        grad_z = tl.dot(grad, _toeplitz(inner_taps, n * T, K, T, True), grad_z, input_precision=PRECISION)
    tl.store(grad_streams + L + t, grad_z * _stream(u, input_taps, 2, t, L), mask=inside)
    tl.store(grad_streams + 2 * L + t, grad_z * _stream(u, input_taps, 1, t, L), mask=inside)


@triton.jit
def _few_taps_backward_kernel(grad_y, x, taps, grad_x, sums, L, D, K: tl.constexpr, T: tl.constexpr):
    """T tokens of one channel; for each tap the sum of its products over these tokens."""
    d, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (b * D + d) * L
    t = tl.program_id(0) * T + tl.arange(0, T)
    now = tl.load(grad_y + row + t, mask=t < L, other=0.0).to(tl.float32)
    total = tl.zeros((T,), tl.float32)
    sums += ((b * tl.num_programs(0) + tl.program_id(0)) * D + d) * K
    for k in tl.static_range(K):
        lag = K - 1 - k
        later = tl.load(grad_y + row + t + lag, mask=t + lag < L, other=0.0).to(tl.float32)
        total += tl.load(taps + d * K + k) * later
        seen = tl.load(x + row + t - lag, mask=(t >= lag) & (t < L), other=0.0).to(tl.float32)
        tl.store(sums + k, tl.sum(now * seen, 0))
    tl.store(grad_x + row + t, total.to(grad_x.dtype.element_ty), mask=t < L)


@triton.jit
def _tap_products_kernel(
    x, grad_y, products, L, D, B, T: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """For one channel and distance n: the sum over m of block m of the input times block m + n of the gradient."""
    d, n = tl.program_id(0), tl.program_id(1)
    tokens, blocks = tl.arange(0, T), tl.arange(0, M)
    total = tl.zeros((T, T), tl.float32)
    for b in range(0, B):
        row = (tl.cast(b, tl.int64) * D + d) * L
        for first in range(0, tl.cdiv(L, T), M):
            t = (first + blocks)[:, None] * T + tokens[None, :]
            grad = tl.load(grad_y + row + t, mask=t < L, other=0.0).to(tl.float32)
            place = t - n * T
            seen = tl.load(x + row + place, mask=(place >= 0) & (place < L), other=0.0).to(tl.float32)
            total = tl.dot(tl.trans(seen), grad, total, input_precision=PRECISION)
    place = ((d * tl.num_programs(1) + n) * T + tokens)[:, None] * T + tokens[None, :]
    tl.store(products + place, total)
