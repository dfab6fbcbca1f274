# SPDX-License-Identifier: Apache-2.0
"""Input convolution, gate, inner convolution, gate: the whole operator of an S or D layer.

Shape legend: B batch, D channels, E = 3D interleaved rows, L tokens, K taps, P = K - 1 tokens of history.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evo2_megatron.ops.causal_conv import correlate, correlate_grad_taps, correlate_grad_x
from evo2_megatron.ops.toeplitz import by_channel, channel_slices

_COPIES = 4
"""Intermediates of the size of a slice of y: the three input streams and their product."""


def gated_conv(u_BEL: Tensor, input_taps_EK: Tensor, inner_taps_DK: Tensor, skip_D: Tensor | None = None) -> Tensor:
    """``y = post_gate * (corr(z, inner_taps) + skip * z)`` with ``z = pre_gate * value``, no history.

    The three streams are rows of ``corr(u, input_taps)``: 3c is post_gate, 3c + 1 pre_gate, 3c + 2 value of channel c.
    Slices of channels go through all steps while they are in cache; nothing but the arguments is kept for the backward
    pass, which computes the streams again.

    Args:
        u_BEL: Projected input in any float dtype; everything in between is float32 (float64 if u is).
        input_taps_EK: Correlation order, last tap on the current token.
        inner_taps_DK: Correlation order.
        skip_D: Gain of the direct path; None means none.

    Returns:
        y_BDL, in the dtype of ``u_BEL``. Differentiable once in every argument.
    """
    dtype = torch.promote_types(u_BEL.dtype, torch.float32)
    skip_D = None if skip_D is None else skip_D.to(dtype)
    return _GatedConv.apply(u_BEL, input_taps_EK.to(dtype), inner_taps_DK.to(dtype), skip_D)


def gated_operator(
    u_BEL: Tensor,
    input_taps_EK: Tensor,
    operator: Callable[[Tensor, slice], Tensor],
    history_BEP: Tensor | None = None,
) -> Tensor:
    """``y = post_gate * operator(pre_gate * value)`` for any operator and with what came before; without gradients.

    Slices of channels go through all steps while they are in cache.

    Args:
        u_BEL: As for ``gated_conv``, like ``input_taps_EK``.
        operator: From the gated values of some channels, in float32 or float64, and the numbers of these channels to
            their outputs.
        history_BEP: The K - 1 tokens before ``u``, oldest first, brought up to date in place; None means zeros.

    Returns:
        y_BDL, in the dtype of ``u_BEL``.
    """
    B, E, L = u_BEL.shape
    dtype = torch.promote_types(u_BEL.dtype, torch.float32)
    num_back = 0 if history_BEP is None else history_BEP.shape[-1]
    y_BDL = torch.empty(B, E // 3, L, dtype=u_BEL.dtype, device=u_BEL.device)
    for part in channel_slices(y_BDL, copies=_COPIES):
        rows = slice(3 * part.start, 3 * part.stop)
        u = u_BEL[:, rows].to(dtype)
        # a copy either way
        seen = by_channel(u, dtype) if history_BEP is None else torch.cat([history_BEP[:, rows].to(dtype), u], dim=-1)
        if history_BEP is not None:
            history_BEP[:, rows] = seen[..., L:]
        post_gate, pre_gate, value = _streams(correlate(seen, input_taps_EK[rows].to(dtype))[..., num_back:])
        torch.mul(operator(pre_gate * value, part), post_gate, out=y_BDL[:, part])
    return y_BDL


class _GatedConv(torch.autograd.Function):
    """``gated_conv``, the taps in the dtype of the sums."""

    @staticmethod
    def forward(
        ctx: Any, u_BEL: Tensor, input_taps_EK: Tensor, inner_taps_DK: Tensor, skip_D: Tensor | None
    ) -> Tensor:
        B, _, L = u_BEL.shape
        y_BDL = torch.empty(B, inner_taps_DK.shape[0], L, dtype=u_BEL.dtype, device=u_BEL.device)
        for part in channel_slices(y_BDL, copies=_COPIES):
            rows = slice(3 * part.start, 3 * part.stop)
            streams_BEL = correlate(by_channel(u_BEL[:, rows], input_taps_EK.dtype), input_taps_EK[rows])
            post_gate, pre_gate, value = _streams(streams_BEL)
            inner = _inner(pre_gate * value, inner_taps_DK[part], None if skip_D is None else skip_D[part])
            y_BDL[:, part] = inner.mul_(post_gate)
        ctx.save_for_backward(u_BEL, input_taps_EK, inner_taps_DK, skip_D)
        return y_BDL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_BDL: Tensor) -> tuple[Tensor | None, ...]:
        u_BEL, input_taps_EK, inner_taps_DK, skip_D = ctx.saved_tensors
        grads = [x.new_empty(x.shape) if need else None for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad)]
        grad_u_BEL, grad_input_taps_EK, grad_inner_taps_DK, grad_skip_D = grads
        for part in channel_slices(grad_y_BDL, copies=2 * _COPIES):
            rows = slice(3 * part.start, 3 * part.stop)
            skip = None if skip_D is None else skip_D[part]
            u = by_channel(u_BEL[:, rows], input_taps_EK.dtype)
            streams_BEL = correlate(u, input_taps_EK[rows])
            post_gate, pre_gate, value = _streams(streams_BEL)
            z = pre_gate * value
            grad_y = by_channel(grad_y_BDL[:, part], z.dtype)
            grad_inner = grad_y * post_gate
            if grad_inner_taps_DK is not None:
                grad_inner_taps_DK[part] = correlate_grad_taps(grad_inner, z, inner_taps_DK.shape[1])
            if grad_skip_D is not None:
                grad_skip_D[part] = (grad_inner * z).sum((0, 2))
            if grad_u_BEL is None and grad_input_taps_EK is None:
                continue
            grad_z = correlate_grad_x(grad_inner, inner_taps_DK[part])
            if skip is not None:
                grad_z.addcmul_(grad_inner, skip[:, None])
            grad_streams = [grad_y * _inner(z, inner_taps_DK[part], skip), grad_z * value, grad_z * pre_gate]
            grad_streams_BEL = torch.stack(grad_streams, dim=2).flatten(1, 2)
            if grad_u_BEL is not None:
                grad_u_BEL[:, rows] = correlate_grad_x(grad_streams_BEL, input_taps_EK[rows])
            if grad_input_taps_EK is not None:
                grad_input_taps_EK[rows] = correlate_grad_taps(grad_streams_BEL, u, input_taps_EK.shape[1])
        return tuple(grads)


def _streams(streams_BEL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """post_gate, pre_gate and value: views of every third row."""
    return streams_BEL[:, 0::3], streams_BEL[:, 1::3], streams_BEL[:, 2::3]


def _inner(z_BDL: Tensor, taps_DK: Tensor, skip_D: Tensor | None) -> Tensor:
    inner_BDL = correlate(z_BDL, taps_DK)
    return inner_BDL if skip_D is None else inner_BDL.addcmul_(z_BDL, skip_D[:, None])
