# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of the H layers' convolution: poles and residues, with the state that enters and leaves.

As in ``modal``, a block of tokens is convolved with the first taps of the filter, and a scan carries the state from
block to block; both are small products on tensor cores. The gradients are those of the plain operator. Without a GPU
the kernel runs under Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported), for tests.

Shape legend: B batch, D channels, N modes, W modes with padding, L tokens, T tokens in a block, M blocks at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from evo2_megatron.ops.modal import ModalConv, ModalOutput

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
        return ModalOutput(*_scan(x_BDL, *modes, state_BDN.float()))


class _ModalConv(ModalConv):
    @staticmethod
    def forward(
        ctx: Any, x_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, left: None, echo: None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_BDL, log_pole_DN, residue_DN, skip_D, None)
        ctx.set_materialize_grads(False)
        state_BDN = log_pole_DN.new_zeros(x_BDL.shape[0], *log_pole_DN.shape)
        return _scan(x_BDL, log_pole_DN, residue_DN, skip_D, state_BDN)


def _scan(
    x_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and last state; the state given stays as it is."""
    x_BDL, log_pole_DN, residue_DN = x_BDL.contiguous(), log_pole_DN.contiguous(), residue_DN.contiguous()
    (B, D, L), N, T = x_BDL.shape, log_pole_DN.shape[1], _BLOCK_TOKENS
    powers_DNT = torch.exp(log_pole_DN[..., None] * torch.arange(T, device=x_BDL.device))
    filter_DT = torch.bmm(residue_DN[:, None], powers_DNT)[:, 0]
    filter_DT[:, 0] += skip_D
    y_BDL, last_BDN = torch.empty_like(x_BDL), torch.empty_like(state_BDN)
    arguments = (x_BDL, filter_DT, log_pole_DN, residue_DN, state_BDN.contiguous(), y_BDL, last_BDN, L, D)
    _modal_kernel[(D, B)](*arguments, **form(N, L, x_BDL.dtype))
    return y_BDL, last_BDN


def form(num_modes: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Constants of the kernel: what needs the fewest instructions a token and spills no registers."""
    return {
        "N": num_modes,
        # sides of a product on tensor cores are powers of two, 16 at least
        "W": max(16, triton.next_power_of_2(num_modes)),
        "T": _BLOCK_TOKENS,
        "M": min(_MAX_BLOCKS, max(16, triton.next_power_of_2(triton.cdiv(length, _BLOCK_TOKENS)))),
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
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
    W: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All tokens of one channel, M blocks at a time. States are summed in nearly float32 (three products in TF32)."""
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
