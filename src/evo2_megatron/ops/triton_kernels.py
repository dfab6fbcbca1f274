# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the operators.

The gated convolution of S and D layers, a convolution without gates for pieces of a sequence, and the scan of H
layers. Values come from one kernel each, and so do the gradients of the streams of a gated convolution; the other
gradients are computed by the code of the plain operators. Without a GPU the kernels run only under Triton's
interpreter (``TRITON_INTERPRET=1`` before triton is imported), for tests.

Shape legend: B batch, D channels, E = 3D interleaved rows, L tokens, K taps, N modes, T tokens in a block, M blocks of
a program.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from evo2_megatron.ops.causal_conv import CausalConv, correlate_grad_taps, correlate_grad_x
from evo2_megatron.ops.fused_conv import GatedConv
from evo2_megatron.ops.modal import ModalConv, ModalOutput

_MAX_TAPS = 129
_SCAN_TOKENS = 128


def gated_conv(u_BEL: Tensor, input_taps_EK: Tensor, inner_taps_DK: Tensor) -> Tensor:
    """``fused_conv.gated_conv`` without a skip term.

    Args:
        u_BEL: Float32, bfloat16 or float16; sums of 16-bit input run on tensor cores in TF32, others in float32.
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
    return _TritonGatedConv.apply(u_BEL, input_taps_EK.float(), inner_taps_DK.float(), None)


def causal_conv(x_BDL: Tensor, taps_DK: Tensor, history_BDP: Tensor | None = None) -> Tensor:
    """``causal_conv.causal_conv`` of float32, bfloat16 or float16 and up to 129 taps; ValueError if there are more."""
    if taps_DK.shape[1] > _MAX_TAPS:
        raise ValueError(f"the kernel takes up to {_MAX_TAPS} taps, not {taps_DK.shape[1]}")
    if history_BDP is None:
        return _TritonCausalConv.apply(x_BDL, taps_DK.float())
    seen_BDL = torch.cat([history_BDP.to(x_BDL.dtype), x_BDL], dim=-1)
    return _TritonCausalConv.apply(seen_BDL, taps_DK.float())[..., history_BDP.shape[-1] :]


def modal_conv(
    x_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, state_BDN: Tensor | None = None
) -> ModalOutput:
    """``modal.modal_conv`` of float32, bfloat16 or float16; differentiable where no state is given."""
    modes = (log_pole_DN.float(), residue_DN.float(), skip_D.float())
    if state_BDN is None:
        return ModalOutput(*_TritonModalConv.apply(x_BDL, *modes, None, None))
    with torch.no_grad():
        return ModalOutput(*_scan(x_BDL, *modes, state_BDN.float()))


class _TritonGatedConv(GatedConv):
    @staticmethod
    def forward(
        ctx: Any, u_BEL: Tensor, input_taps_EK: Tensor, inner_taps_DK: Tensor, skip_D: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(u_BEL, input_taps_EK, inner_taps_DK, skip_D)
        return _gated(u_BEL.contiguous(), input_taps_EK.contiguous(), inner_taps_DK.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_BDL: Tensor) -> tuple[Tensor | None, ...]:
        u_BEL, input_taps_EK, inner_taps_DK, _ = ctx.saved_tensors
        need_u, need_input_taps, need_inner_taps, _ = ctx.needs_input_grad
        u_BEL = u_BEL.contiguous()
        grad_streams_BEL, z_BDL, grad_inner_BDL = _gated_backward(
            u_BEL, input_taps_EK.contiguous(), inner_taps_DK.contiguous(), grad_y_BDL.contiguous()
        )
        grad_u_BEL = correlate_grad_x(grad_streams_BEL, input_taps_EK).to(u_BEL.dtype) if need_u else None
        of_taps = [None, None]
        if need_input_taps:
            of_taps[0] = correlate_grad_taps(grad_streams_BEL, u_BEL.float(), input_taps_EK.shape[1])
        if need_inner_taps:
            of_taps[1] = correlate_grad_taps(grad_inner_BDL, z_BDL, inner_taps_DK.shape[1])
        return grad_u_BEL, *of_taps, None


class _TritonCausalConv(CausalConv):
    @staticmethod
    def forward(ctx: Any, x_BDL: Tensor, taps_DK: Tensor) -> Tensor:
        ctx.save_for_backward(x_BDL, taps_DK)
        x_BDL, y_BDL = x_BDL.contiguous(), torch.empty(x_BDL.shape, dtype=x_BDL.dtype, device=x_BDL.device)
        (B, D, L), shape = x_BDL.shape, _Shape.of(taps_DK.shape[1], x_BDL.dtype)
        grid = (triton.cdiv(L, shape.M * shape.T), D, B)
        _causal_conv_kernel[grid](x_BDL, taps_DK.contiguous(), y_BDL, L, D, **shape._asdict())
        return y_BDL


class _TritonModalConv(ModalConv):
    @staticmethod
    def forward(
        ctx: Any, x_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, left: None, echo: None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BDL, log_pole_DN, residue_DN, skip_D, None)
        ctx.set_materialize_grads(False)
        state_BDN = log_pole_DN.new_zeros(x_BDL.shape[0], *log_pole_DN.shape)
        return _scan(x_BDL, log_pole_DN, residue_DN, skip_D, state_BDN)


def _gated(u_BEL: Tensor, input_taps_EK: Tensor, inner_taps_DK: Tensor) -> Tensor:
    (B, _, L), (D, K) = u_BEL.shape, inner_taps_DK.shape
    y_BDL = torch.empty(B, D, L, dtype=u_BEL.dtype, device=u_BEL.device)
    shape = _Shape.of(K, u_BEL.dtype)
    grid = (triton.cdiv(L, shape.M * shape.T), D, B)
    _gated_conv_kernel[grid](u_BEL, input_taps_EK, inner_taps_DK, y_BDL, L, D, **shape._asdict())
    return y_BDL


def _gated_backward(
    u_BEL: Tensor, input_taps_EK: Tensor, inner_taps_DK: Tensor, grad_y_BDL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the three streams [B, E, L]; the gated values and the gradient of what the inner taps make of them.

    All in float32.
    """
    (B, E, L), (D, K) = u_BEL.shape, inner_taps_DK.shape
    grad_streams_BEL = torch.empty(B, E, L, device=u_BEL.device)
    z_BDL, grad_inner_BDL = (torch.empty(B, D, L, device=u_BEL.device) for _ in range(2))
    shape = _Shape.of(K, u_BEL.dtype)
    grid = (triton.cdiv(L, shape.M * shape.T), D, B)
    arguments = (u_BEL, input_taps_EK, inner_taps_DK, grad_y_BDL, grad_streams_BEL, z_BDL, grad_inner_BDL, L, D)
    _gated_backward_kernel[grid](*arguments, **shape._asdict())
    return grad_streams_BEL, z_BDL, grad_inner_BDL


class _Shape(NamedTuple):
    """Of a program of the convolutions."""

    K: int
    T: int
    M: int
    PRECISION: str
    num_warps: int

    @classmethod
    def of(cls, num_taps: int, dtype: torch.dtype) -> _Shape:
        # a block must hold K - 1 tokens of history; tl.dot wants sides of 16 at least
        T = max(16, triton.next_power_of_2(num_taps - 1))
        few = T <= 32
        return cls(num_taps, T, 64 if few else 16, "ieee" if dtype == torch.float32 else "tf32", 4 if few else 8)


def _scan(
    x_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and last state; the state given stays as it is."""
    x_BDL, (B, D, L) = x_BDL.contiguous(), x_BDL.shape
    y_BDL, last_BDN = torch.empty_like(x_BDL), torch.empty_like(state_BDN)
    _modal_scan_kernel[(D, B)](
        x_BDL,
        log_pole_DN.contiguous(),
        residue_DN.contiguous(),
        skip_D.contiguous(),
        state_BDN.contiguous(),
        y_BDL,
        last_BDN,
        L,
        D,
        N=log_pole_DN.shape[1],
        T=min(_SCAN_TOKENS, triton.next_power_of_2(L)),
    )
    return y_BDL, last_BDN


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
def _blocks(now, before, taps, K: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr):
    """Blocks of outputs from the same blocks of inputs and the ones before: products with two Toeplitz matrices."""
    tokens = tl.arange(0, T)
    lag = tokens[None, :] - tokens[:, None]
    table = tl.load(taps + (K - 1 - lag), mask=(lag >= 0) & (lag < K), other=0.0)
    total = tl.dot(now, table, input_precision=PRECISION)
    table = tl.load(taps + (K - 1 - lag - T), mask=lag + T < K, other=0.0)
    return total + tl.dot(before, table, input_precision=PRECISION)


@triton.jit
def _causal_conv_kernel(x, taps, y, L, D, K: tl.constexpr, T: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr):
    """M blocks of T tokens of one channel."""
    d = tl.program_id(1)
    row = (tl.program_id(2).to(tl.int64) * D + d) * L
    t = (tl.program_id(0) * M + tl.arange(0, M))[:, None] * T + tl.arange(0, T)[None, :]
    now = tl.load(x + row + t, mask=t < L, other=0.0).to(tl.float32)
    before = tl.load(x + row + t - T, mask=(t >= T) & (t < L + T), other=0.0).to(tl.float32)
    total = _blocks(now, before, taps + d * K, K, T, PRECISION)
    tl.store(y + row + t, total.to(y.dtype.element_ty), mask=t < L)


@triton.jit
def _gated_conv_kernel(
    u, input_taps, inner_taps, y, L, D, K: tl.constexpr, T: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr
):
    """M blocks of T tokens of one channel, from the projection to the second gate."""
    d = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    u += (b * D + d) * 3 * L
    input_taps += d * 9
    inner_taps += d * K
    t = (tl.program_id(0) * M + tl.arange(0, M))[:, None] * T + tl.arange(0, T)[None, :]
    z = _stream(u, input_taps, 1, t, L) * _stream(u, input_taps, 2, t, L)
    before = _stream(u, input_taps, 1, t - T, L) * _stream(u, input_taps, 2, t - T, L)
    total = _blocks(z, before, inner_taps, K, T, PRECISION) * _stream(u, input_taps, 0, t, L)
    tl.store(y + (b * D + d) * L + t, total.to(y.dtype.element_ty), mask=t < L)


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
    tokens = tl.arange(0, T)
    t = (tl.program_id(0) * M + tl.arange(0, M))[:, None] * T + tokens[None, :]
    inside = t < L
    pre = _stream(u, input_taps, 1, t, L)
    value = _stream(u, input_taps, 2, t, L)
    z = pre * value
    before = _stream(u, input_taps, 1, t - T, L) * _stream(u, input_taps, 2, t - T, L)
    grad = tl.load(grad_y + t, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_streams + t, grad * _blocks(z, before, inner_taps, K, T, PRECISION), mask=inside)
    grad_inner = grad * _stream(u, input_taps, 0, t, L)
    after = tl.load(grad_y + t + T, mask=t + T < L, other=0.0).to(tl.float32) * _stream(u, input_taps, 0, t + T, L)
    # an input meets the outputs of its own block and of the next: the transposes of the matrices of _blocks
    lag = tokens[:, None] - tokens[None, :]
    table = tl.load(inner_taps + (K - 1 - lag), mask=(lag >= 0) & (lag < K), other=0.0)
    grad_z = tl.dot(grad_inner, table, input_precision=PRECISION)
    table = tl.load(inner_taps + (K - 1 - lag - T), mask=lag + T < K, other=0.0)
    grad_z += tl.dot(after, table, input_precision=PRECISION)
    tl.store(grad_streams + L + t, grad_z * value, mask=inside)
    tl.store(grad_streams + 2 * L + t, grad_z * pre, mask=inside)
    tl.store(z_out + row * L + t, z, mask=inside)
    tl.store(grad_inner_out + row * L + t, grad_inner, mask=inside)


@triton.jit
def _join(decay, state, next_decay, next_state):
    return decay * next_decay, state * next_decay + next_state


@triton.jit
def _modal_scan_kernel(
    x, log_pole, residue, skip, first, y, last, L, D, N: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """All tokens of one channel, T at a time, by a parallel scan inside the block."""
    d = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * D + d
    modes, tokens = tl.arange(0, N), tl.arange(0, T)
    pole = tl.exp(tl.load(log_pole + d * N + modes))
    weight = tl.load(residue + d * N + modes)
    gain = tl.load(skip + d)
    state = tl.load(first + row * N + modes)
    for start in range(0, L, T):
        t = start + tokens
        value = tl.load(x + row * L + t, mask=t < L, other=0.0).to(tl.float32)
        decay = tl.zeros((N, T), tl.float32) + pole[:, None]
        decay, states = tl.associative_scan((decay, tl.zeros((N, T), tl.float32) + value[None, :]), 1, _join)
        states += decay * state[:, None]
        total = tl.sum(states * weight[:, None], 0) + gain * value
        tl.store(y + row * L + t, total.to(y.dtype.element_ty), mask=t < L)
        newest = tl.minimum(T, L - start) - 1
        state = tl.sum(tl.where(tokens[None, :] == newest, states, 0.0), 1)
    tl.store(last + row * N + modes, state)
