# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of the H layers' convolution: poles and residues, with the state that enters and leaves.

As in ``modal``, a block of tokens is convolved with the first taps of the filter, and a scan carries the state from
block to block; both are small products on tensor cores. The backward pass walks from the end, and sums up what the
gradients of poles and residues are made of. Without a GPU the kernels run under Triton's interpreter
(``TRITON_INTERPRET=1`` before triton is imported), for tests.

Shape legend: B batch, D channels, N modes, W modes with padding, L tokens, T tokens in a block, M blocks at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from evo2_megatron.ops.modal import ModalConv, ModalOutput, ModalTables
from evo2_megatron.ops.triton_conv import blocks_at_once, precision_of

_BLOCK_TOKENS = 32
_MAX_BLOCKS = 32


def modal_conv(
    x_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, state_BDN: Tensor | None = None
) -> ModalOutput:
    """``modal.modal_conv`` of float32, bfloat16 or float16; differentiable where no state is given."""
    modes = (log_pole_DN.float(), residue_DN.float(), skip_D.float())
    if state_BDN is None:
        return ModalOutput(*_ModalConv.apply(x_BDL, *modes, None, None))
    with torch.no_grad():
        return ModalOutput(*_convolve(x_BDL.contiguous(), *modes, state_BDN.float()))


class _ModalConv(ModalConv):
    @staticmethod
    def forward(
        ctx: Any, x_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, left: None, echo: None
    ) -> tuple[Tensor, Tensor]:
        x_BDL = x_BDL.contiguous()
        ctx.save_for_backward(x_BDL, log_pole_DN, residue_DN, skip_D, None)
        ctx.set_materialize_grads(False)
        state_BDN = log_pole_DN.new_zeros(x_BDL.shape[0], *log_pole_DN.shape)
        return _convolve(x_BDL, log_pole_DN, residue_DN, skip_D, state_BDN)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_BDL: Tensor | None, grad_state_BDN: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_y_BDL is None or grad_state_BDN is not None:  # which no layer wants in training
            return ModalConv.backward(ctx, grad_y_BDL, grad_state_BDN)
        x_BDL, log_pole_DN, residue_DN, skip_D, _ = ctx.saved_tensors
        grads = _backward(x_BDL, grad_y_BDL.contiguous(), log_pole_DN, residue_DN, skip_D)
        return *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad)), None, None


def _convolve(
    x_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and last state; the state given stays as it is."""
    log_pole_DN, residue_DN, state_BDN = (x.contiguous() for x in (log_pole_DN, residue_DN, state_BDN))
    filter_DT = _filter(log_pole_DN, residue_DN, skip_D)
    y_BDL, last_BDN = torch.empty_like(x_BDL), torch.empty_like(state_BDN)
    (B, D, L), constants = x_BDL.shape, form(log_pole_DN.shape[1], x_BDL.shape[2], x_BDL.dtype)
    arguments = (x_BDL, filter_DT, log_pole_DN, residue_DN, state_BDN, y_BDL, last_BDN, L, D)
    _modal_kernel[(D, B)](*arguments, KEEP_STATES=False, **constants)
    return y_BDL, last_BDN


def _backward(
    x_BDL: Tensor, grad_y_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all four, from zeros as the state before."""
    log_pole_DN, residue_DN = log_pole_DN.contiguous(), residue_DN.contiguous()
    (B, D, L), N, T = x_BDL.shape, log_pole_DN.shape[1], _BLOCK_TOKENS
    constants = form(N, L, x_BDL.dtype)
    filter_DT = _filter(log_pole_DN, residue_DN, skip_D)
    state_BDN = log_pole_DN.new_zeros(B, D, N)
    entering_BDMN = log_pole_DN.new_empty(B, D, triton.cdiv(L, T), N)
    last_BDN = torch.empty_like(state_BDN)  # not wanted
    arguments = (x_BDL, filter_DT, log_pole_DN, residue_DN, state_BDN, entering_BDMN, last_BDN, L, D)
    _modal_kernel[(D, B)](*arguments, KEEP_STATES=True, **constants)
    grad_x_BDL = torch.empty_like(x_BDL)
    sums = [log_pole_DN.new_empty(B, D, *shape) for shape in ((T, T), (N, T), (N, T), (N,))]
    arguments = (x_BDL, grad_y_BDL, filter_DT, log_pole_DN, residue_DN, entering_BDMN, grad_x_BDL, *sums, L, D)
    _modal_backward_kernel[(D, B)](*arguments, **constants)
    tables = ModalTables(log_pole_DN, residue_DN, skip_D, T)
    return grad_x_BDL, *tables.gradients_from(*(of_each.sum(0) for of_each in sums))


def _filter(log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor) -> Tensor:
    """The first taps, [D, T], with the direct path."""
    powers_DNT = torch.exp(log_pole_DN[..., None] * torch.arange(_BLOCK_TOKENS, device=log_pole_DN.device))
    filter_DT = torch.bmm(residue_DN[:, None], powers_DNT)[:, 0]
    filter_DT[:, 0] += skip_D
    return filter_DT


def form(num_modes: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of the kernel: what needs the fewest instructions a token and spills no registers."""
    return {
        "N": num_modes,
        # sides of a product on tensor cores are powers of two, 16 at least
        "W": max(16, triton.next_power_of_2(num_modes)),
        "T": _BLOCK_TOKENS,
        "M": blocks_at_once(length, _BLOCK_TOKENS, _MAX_BLOCKS),
        "PRECISION": precision_of(dtype),
        "num_warps": 2,
        "num_stages": 1,
    }


@triton.jit
def _join(decay, state, next_decay, next_state):
    return decay * next_decay, state * next_decay + next_state


@triton.jit
def _modal_kernel(
    x,
    filter,
    log_pole,
    residue,
    first,
    y,
    last,
    L,
    D,
    N: tl.constexpr,
    KEEP_STATES: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All tokens of one channel, M blocks at a time. States are summed in nearly float32 (three products in TF32).

    KEEP_STATES: instead of the output, ``y`` gets the state before each block.
    """
    d = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * D + d
    modes, tokens, blocks = tl.arange(0, W), tl.arange(0, T), tl.arange(0, M)
    log_poles = tl.load(log_pole + d * N + modes, mask=modes < N, other=0.0)
    residues = tl.load(residue + d * N + modes, mask=modes < N, other=0.0)
    state = tl.load(first + row * N + modes, mask=modes < N, other=0.0)
    lag = tokens[None, :] - tokens[:, None]
    table = tl.load(filter + d * T + lag, mask=lag >= 0, other=0.0)
    write = tl.exp(log_poles[None, :] * (T - 1 - tokens)[:, None])
    read = residues[:, None] * tl.exp(log_poles[:, None] * (tokens + 1)[None, :])
    step = tl.exp(log_poles * T)
    decay = tl.zeros((M, W), tl.float32) + step[None, :]
    num_blocks = tl.cdiv(L, T)
    for start in range(0, num_blocks, M):
        t = (start + blocks)[:, None] * T + tokens[None, :]
        # the state that enters a block: what the block before wrote, and what entered that one, a step older
        before = tl.load(x + row * L + t - T, mask=(t >= T) & (t < L + T), other=0.0).to(tl.float32)
        written = tl.dot(before, write, input_precision="tf32x3")
        written = tl.where(blocks[:, None] == 0, written + state[None, :], written)
        _, entering = tl.associative_scan((decay, written), 0, _join)
        if KEEP_STATES:
            place = (row * num_blocks + start + blocks)[:, None] * N + modes[None, :]
            tl.store(y + place, entering, mask=((start + blocks)[:, None] < num_blocks) & (modes[None, :] < N))
        else:
            now = tl.load(x + row * L + t, mask=t < L, other=0.0).to(tl.float32)
            total = tl.dot(now, table, input_precision=PRECISION)
            total = tl.dot(entering, read, total, input_precision="tf32x3")
            tl.store(y + row * L + t, total.to(y.dtype.element_ty), mask=t < L)
        newest = tl.minimum(M, num_blocks - start) - 1
        state = tl.sum(tl.where(blocks[:, None] == newest, entering, 0.0), 0)
        if start + M < num_blocks:
            state *= step
    num_left = L - (num_blocks - 1) * T
    value = tl.load(x + row * L + (num_blocks - 1) * T + tokens, mask=tokens < num_left, other=0.0).to(tl.float32)
    age = tl.maximum(num_left - 1 - tokens, 0)
    weights = tl.exp(log_poles[None, :] * age[:, None])
    state = state * tl.exp(log_poles * num_left) + tl.sum(value[:, None] * weights, 0)
    tl.store(last + row * N + modes, state, mask=modes < N)


@triton.jit
def _modal_backward_kernel(
    x, grad_y, filter, log_pole, residue, states, grad_x, inside, read_out, written_out, stepped, L, D,
    N: tl.constexpr, W: tl.constexpr, T: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """All tokens of one channel from the end: the gradient of the input, and the sums for ``gradients_from``."""
    d = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * D + d
    modes, tokens, blocks = tl.arange(0, W), tl.arange(0, T), tl.arange(0, M)
    log_poles = tl.load(log_pole + d * N + modes, mask=modes < N, other=0.0)
    residues = tl.load(residue + d * N + modes, mask=modes < N, other=0.0)
    lag = tokens[:, None] - tokens[None, :]
    table = tl.load(filter + d * T + lag, mask=lag >= 0, other=0.0)  # transposed
    read = residues[None, :] * tl.exp(log_poles[None, :] * (tokens + 1)[:, None])
    write = tl.exp(log_poles[:, None] * (T - 1 - tokens)[None, :])
    step = tl.exp(log_poles * T)
    decay = tl.zeros((M, W), tl.float32) + step[None, :]
    state = tl.zeros((W,), tl.float32)
    inside_sum = tl.zeros((T, T), tl.float32)
    read_sum = tl.zeros((W, T), tl.float32)
    written_sum = tl.zeros((W, T), tl.float32)
    stepped_sum = tl.zeros((W,), tl.float32)
    num_blocks = tl.cdiv(L, T)
    for done in range(0, num_blocks, M):
        # the last block first; in front of the first one there is nothing
        block = num_blocks - 1 - done - blocks
        t = block[:, None] * T + tokens[None, :]
        is_here = (t >= 0) & (t < L)
        # the gradient of the state that leaves a block: of what the block after it reads, and of what leaves that one
        after = tl.load(grad_y + row * L + t + T, mask=(t >= -T) & (t < L - T), other=0.0).to(tl.float32)
        grad_read = tl.dot(after, read, input_precision="tf32x3")
        grad_read = tl.where(blocks[:, None] == 0, grad_read + state[None, :], grad_read)
        _, leaving = tl.associative_scan((decay, grad_read), 0, _join)
        leaving = tl.where(block[:, None] >= 0, leaving, 0.0)
        grad = tl.load(grad_y + row * L + t, mask=is_here, other=0.0).to(tl.float32)
        total = tl.dot(grad, table, input_precision=PRECISION)
        total = tl.dot(leaving, write, total, input_precision="tf32x3")
        tl.store(grad_x + row * L + t, total.to(grad_x.dtype.element_ty), mask=is_here)
        place = (row * num_blocks + block)[:, None] * N + modes[None, :]
        entering = tl.load(states + place, mask=(block[:, None] >= 0) & (modes[None, :] < N), other=0.0)
        value = tl.load(x + row * L + t, mask=is_here, other=0.0).to(tl.float32)
        inside_sum = tl.dot(tl.trans(value), grad, inside_sum, input_precision=PRECISION)
        read_sum = tl.dot(tl.trans(entering), grad, read_sum, input_precision="tf32x3")
        written_sum = tl.dot(tl.trans(leaving), value, written_sum, input_precision="tf32x3")
        stepped_sum += tl.sum(entering * leaving, 0)
        state = tl.sum(tl.where(blocks[:, None] == M - 1, leaving, 0.0), 0) * step
    tl.store(inside + (row * T + tokens)[:, None] * T + tokens[None, :], inside_sum)
    place = (row * N + modes)[:, None] * T + tokens[None, :]
    tl.store(read_out + place, read_sum, mask=modes[:, None] < N)
    tl.store(written_out + place, written_sum, mask=modes[:, None] < N)
    tl.store(stepped + row * N + modes, stepped_sum, mask=modes < N)
