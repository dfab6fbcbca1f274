# SPDX-License-Identifier: Apache-2.0
"""Short depthwise causal convolution, and its one-step form.

Shape legend: B batch, D channels, L tokens, K taps, P = K - 1 tokens of history, T tokens in a block, M blocks.
Taps are in correlation order: the last tap meets the current token.

Why not only ``F.conv1d``: on a CPU its gradient of 128 taps costs 15 to 20 forward passes, and it slows down threefold
where few channels are very long. Which way is faster depends on the number of taps and channels: see ``correlate``.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from evo2_megatron.ops.toeplitz import by_channel, channel_slices, diagonal_sums, toeplitz

FEW_TAPS = 8
"""Up to here shifted multiply-adds are the fastest way."""

MIN_CONV1D_CHANNELS = 16
"""From here ``F.conv1d`` beats products with Toeplitz blocks; with one channel it is 15 times slower."""

BLOCK_TOKENS = 32
"""Block of the Toeplitz products; 64 and 128 multiply more zeros and were slower."""


def causal_conv(x_BDL: Tensor, taps_DK: Tensor, history_BDP: Tensor | None = None) -> Tensor:
    """Correlate every channel with its own taps.

    ``y[b,d,t] = sum_k taps[d,k] * x[b,d,t-(K-1)+k]``

    Args:
        x_BDL: Signal in any float dtype, L >= 1; the sum runs in float32 (float64 if x is).
        taps_DK: One filter a channel, last tap on the current token.
        history_BDP: The K - 1 tokens before ``x``, oldest first; None means zeros.

    Returns:
        y_BDL, in the dtype of ``x_BDL``. Differentiable once in every argument.
    """
    taps_DK = taps_DK.to(torch.promote_types(x_BDL.dtype, torch.float32))
    if history_BDP is None:
        return _CausalConv.apply(x_BDL, taps_DK)
    seen_BDL = torch.cat([history_BDP.to(x_BDL.dtype), x_BDL], dim=-1)
    return _CausalConv.apply(seen_BDL, taps_DK)[..., history_BDP.shape[-1] :]


def causal_conv_step(x_BD: Tensor, taps_DK: Tensor, state_BDP: Tensor) -> Tensor:
    """Convolve one token; the state is updated in place.

    Args:
        x_BD: The current token; the sum runs in float32 (float64 if x is).
        taps_DK: As in ``causal_conv``.
        state_BDP: The K - 1 tokens before, oldest first; all zero when nothing was seen yet.

    Returns:
        y_BD, in the dtype of ``x_BD``.
    """
    dtype = torch.promote_types(x_BD.dtype, torch.float32)
    taps_DK = taps_DK.to(dtype)
    y_BD = torch.addcmul((state_BDP.to(dtype) * taps_DK[:, :-1]).sum(-1), x_BD.to(dtype), taps_DK[:, -1])
    # torch.roll makes the copy that an overlapping shift needs
    state_BDP.copy_(torch.roll(state_BDP, -1, dims=-1))
    if state_BDP.shape[-1]:
        state_BDP[..., -1] = x_BD
    return y_BD.to(x_BD.dtype)


def last_inputs(x_BDL: Tensor, num: int, history_BDP: Tensor | None = None) -> Tensor:
    """The last ``num`` tokens seen, oldest first: [B, D, num], zero on the left where fewer exist.

    This is the state to continue a convolution of ``num + 1`` taps, by ``causal_conv`` or ``causal_conv_step``.
    """
    seen = x_BDL if history_BDP is None else torch.cat([history_BDP.to(x_BDL.dtype), x_BDL[..., -num:]], dim=-1)
    missing = max(0, num - seen.shape[-1])
    return F.pad(seen[..., seen.shape[-1] - (num - missing) :], (missing, 0))


class _CausalConv(torch.autograd.Function):
    """``causal_conv`` without history, the taps in the dtype of the sums."""

    @staticmethod
    def forward(ctx: Any, x_BDL: Tensor, taps_DK: Tensor) -> Tensor:
        ctx.save_for_backward(x_BDL, taps_DK)
        return _in_slices(correlate, x_BDL, taps_DK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_BDL: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_BDL, taps_DK = ctx.saved_tensors
        need_x, need_taps = ctx.needs_input_grad
        grad_x_BDL = _in_slices(correlate_grad_x, grad_y_BDL, taps_DK) if need_x else None
        if not need_taps:
            return grad_x_BDL, None
        grad_taps_DK = torch.empty_like(taps_DK)
        for part in channel_slices(x_BDL):
            grad_y, x = (by_channel(signal[:, part], taps_DK.dtype) for signal in (grad_y_BDL, x_BDL))
            grad_taps_DK[part] = correlate_grad_taps(grad_y, x, taps_DK.shape[1])
        return grad_x_BDL, grad_taps_DK


def _in_slices(function: Callable[[Tensor, Tensor], Tensor], x_BDL: Tensor, taps_DK: Tensor) -> Tensor:
    """Apply ``function`` to one slice of channels after the other, in the dtype of the taps."""
    parts = list(channel_slices(x_BDL))
    if len(parts) == 1:
        return function(by_channel(x_BDL, taps_DK.dtype), taps_DK).to(x_BDL.dtype)
    y_BDL = torch.empty(x_BDL.shape, dtype=x_BDL.dtype, device=x_BDL.device)
    for part in parts:
        y_BDL[:, part] = function(by_channel(x_BDL[:, part], taps_DK.dtype), taps_DK[part])
    return y_BDL


def correlate(x_BDL: Tensor, taps_DK: Tensor) -> Tensor:
    """``causal_conv`` of a slice of channels in one dtype, without history and without autograd."""
    (D, K), L = taps_DK.shape, x_BDL.shape[-1]
    if K > FEW_TAPS:
        if D < MIN_CONV1D_CHANNELS:
            return _block_products(x_BDL, taps_DK, backward=False)
        return F.conv1d(F.pad(x_BDL, (K - 1, 0)), taps_DK[:, None], groups=D)
    y_BDL = x_BDL * taps_DK[:, -1:]
    for lag in range(1, min(K, L)):
        y_BDL[..., lag:].addcmul_(x_BDL[..., : L - lag], taps_DK[:, K - 1 - lag, None])
    return y_BDL


def correlate_grad_x(grad_y_BDL: Tensor, taps_DK: Tensor) -> Tensor:
    """Gradient of ``correlate`` with respect to its signal."""
    (D, K), L = taps_DK.shape, grad_y_BDL.shape[-1]
    if K > FEW_TAPS:
        if D < MIN_CONV1D_CHANNELS:
            return _block_products(grad_y_BDL, taps_DK, backward=True)
        return F.conv1d(F.pad(grad_y_BDL, (0, K - 1)), taps_DK.flip(1)[:, None], groups=D)
    grad_x_BDL = grad_y_BDL * taps_DK[:, -1:]
    for lag in range(1, min(K, L)):
        grad_x_BDL[..., : L - lag].addcmul_(grad_y_BDL[..., lag:], taps_DK[:, K - 1 - lag, None])
    return grad_x_BDL


def correlate_grad_taps(grad_y_BDL: Tensor, x_BDL: Tensor, num_taps: int) -> Tensor:
    """Gradient of ``correlate`` with respect to its taps, [D, K], summed over the batch."""
    L = x_BDL.shape[-1]
    if num_taps <= FEW_TAPS:
        grad_taps_DK = x_BDL.new_zeros(x_BDL.shape[1], num_taps)
        for lag in range(min(num_taps, L)):
            product = grad_y_BDL[..., lag:] * x_BDL[..., : L - lag]
            grad_taps_DK[:, num_taps - 1 - lag] = product.sum((0, 2))
        return grad_taps_DK
    num_back = _num_blocks(num_taps - 1)
    x_DGT, grad_y_DGT = _blocks(x_BDL, num_back), _blocks(grad_y_BDL, num_back)
    num_rows = x_DGT.shape[1] - num_back
    # block m of the input meets blocks m, m + 1, ... of the output: side by side they are one wide Toeplitz matrix
    products = [torch.bmm(x_DGT[:, :num_rows].mT, grad_y_DGT[:, n : n + num_rows]) for n in range(num_back + 1)]
    return diagonal_sums(torch.cat(products, dim=-1))[:, :num_taps].flip(1)


def _block_products(x_BDL: Tensor, taps_DK: Tensor, *, backward: bool) -> Tensor:
    """A block of outputs is a sum of products: this block of inputs, the one before it (backward: after it), ..."""
    B, D, L = x_BDL.shape
    num_back = _num_blocks(taps_DK.shape[1] - 1)
    x_DGT = _blocks(x_BDL, num_back, in_front=not backward)
    num_rows = x_DGT.shape[1] - num_back
    table_DTW = toeplitz(taps_DK.flip(1), BLOCK_TOKENS, (num_back + 1) * BLOCK_TOKENS)
    y_DGT = x_DGT.new_empty(D, num_rows, BLOCK_TOKENS)
    for n, table_DTT in enumerate(table_DTW.split(BLOCK_TOKENS, dim=-1)):
        start = n if backward else num_back - n
        table_DTT = table_DTT.mT if backward else table_DTT
        y_DGT.baddbmm_(x_DGT[:, start : start + num_rows], table_DTT, beta=1 if n else 0)
    # no view: autograd lets nobody write into a view that a custom function returned
    return y_DGT.view(D, B, -1)[..., :L].transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _blocks(x_BDL: Tensor, num_empty: int, *, in_front: bool = False) -> Tensor:
    """[D, G, T]: the blocks of every sequence, ``num_empty`` zero blocks between two of them and at both or one end.

    The zero blocks keep batch mates apart when rows are shifted; at the front they are the missing history.
    """
    B, D, L = x_BDL.shape
    num_rows = B * (_num_blocks(L) + num_empty)
    start = num_empty if in_front else 0
    blocks_DGT = x_BDL.new_zeros(D, num_rows + num_empty, BLOCK_TOKENS)
    rows_DBL = blocks_DGT[:, start : start + num_rows].unflatten(1, (B, -1)).flatten(2)
    rows_DBL[..., :L] = x_BDL.transpose(0, 1)
    return blocks_DGT


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)
