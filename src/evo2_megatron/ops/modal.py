# SPDX-License-Identifier: Apache-2.0
"""Poles and residues: the filter, the whole convolution, the state after a prompt, one step.

``filter[t] = sum_n residue[n] * exp(log_pole[n] * t)`` is the impulse response of N first-order recurrences, so the
convolution is a scan and its state is N numbers a channel (modal form: Laughing Hyena, arXiv:2310.18780).

Shape legend: B batch, D channels, N modes, L tokens, T tokens in a block, M blocks, G = B * M, R = D * N scan rows,
K = T + 1 powers. Log-poles are <= 0 and finite; everything runs in float32, or float64 where the input is.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from evo2_megatron.ops.toeplitz import by_channel, channel_slices, diagonal_sums, toeplitz

BLOCK_TOKENS = 32
"""Tokens convolved directly; what came before is seen through the state. 128 costs 1.3 times as much on a CPU."""

SCAN_RADIX = 16
"""Blocks joined by one product in the scan over blocks."""

CPU_BLOCKS_ONE_BY_ONE = 64
"""Up to here a CPU is done with one block after the other before it has built the tables of the products."""

STATE_BLOCK_TOKENS = 512
"""Tokens summed by one product where only the state is wanted."""

_NEGLIGIBLE = 1e-30


class ModalOutput(NamedTuple):
    """What ``modal_conv`` returns."""

    y_BDL: Tensor
    """Output, in the dtype of the input."""

    state_BDN: Tensor
    """State after the last token, float32 (float64 if the input is)."""


def modal_conv(
    x_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, state_BDN: Tensor | None = None
) -> ModalOutput:
    """Convolve every channel with its modal filter, add the scaled input, and return the state to continue from.

    ``s[t] = exp(log_pole) * s[t-1] + x[t]``; ``y[t] = sum_n residue[n] * s_n[t] + skip * x[t]``

    Blocks of tokens are convolved by a small Toeplitz product, and a scan carries the state across blocks. Slices of
    channels go one after the other, so beyond inputs and outputs memory does not grow with D, and the states are
    computed again for the backward pass. Differentiable once in every argument.

    Args:
        x_BDL: Signal in any float dtype, L >= 1.
        log_pole_DN: Logarithm of the poles, <= 0.
        residue_DN: Weight of each mode.
        skip_D: Gain of the direct path.
        state_BDN: State before the first token (not changed); None means zeros.

    Returns:
        y_BDL in the dtype of ``x_BDL``, and the state after the last token.
    """
    L = x_BDL.shape[-1]
    dtype = torch.promote_types(x_BDL.dtype, torch.float32)
    log_pole_DN, residue_DN, skip_D = log_pole_DN.to(dtype), residue_DN.to(dtype), skip_D.to(dtype)
    if state_BDN is None:
        return ModalOutput(*ModalConv.apply(x_BDL, log_pole_DN, residue_DN, skip_D, None, None))
    # the old state shows in the outputs of the first block (echo); what is left of it after that block joins the scan
    state_BDN = state_BDN.to(dtype)
    powers_DNK = _powers(log_pole_DN, _layout(L).num_first + 1)
    left_BDN = state_BDN * powers_DNK[..., -1]
    echo_BDT = torch.einsum("bdn,dnt->bdt", state_BDN * residue_DN, powers_DNK[..., 1:])
    return ModalOutput(*ModalConv.apply(x_BDL, log_pole_DN, residue_DN, skip_D, left_BDN, echo_BDT))


def modal_state(x_BDL: Tensor, log_pole_DN: Tensor, state_BDN: Tensor | None = None) -> Tensor:
    """State after the last token, without the output: ``s[t] = exp(log_pole) * s[t-1] + x[t]``.

    Args:
        x_BDL: Signal in any float dtype, L >= 1.
        log_pole_DN: Logarithm of the poles, <= 0.
        state_BDN: State before the first token (not changed); None means zeros.

    Returns:
        state_BDN, float32 (float64 if the input is). Differentiable once in every argument; for the backward pass only
        the arguments are kept.
    """
    dtype = torch.promote_types(x_BDL.dtype, torch.float32)
    log_pole_DN = log_pole_DN.to(dtype)
    written_BDN = _ModalState.apply(x_BDL, log_pole_DN)
    if state_BDN is None:
        return written_BDN
    return written_BDN + state_BDN.to(dtype) * torch.exp(log_pole_DN * x_BDL.shape[-1])


def modal_step(x_BD: Tensor, pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, state_BDN: Tensor) -> Tensor:
    """Advance one token: ``s = pole * s + x`` in place; return ``y = sum_n residue[n] * s_n + skip * x``.

    Args:
        x_BD: The current token in any float dtype; the sum runs in the dtype of the state.
        pole_DN: ``exp(log_pole)``, in the dtype of the state.
        residue_DN: Weight of each mode, in the dtype of the state.
        skip_D: Gain of the direct path.
        state_BDN: Updated in place; zeros before the first token.

    Returns:
        y_BD in the dtype of ``x_BD``.
    """
    x_wide_BD = x_BD.to(state_BDN.dtype)
    state_BDN.mul_(pole_DN).add_(x_wide_BD[..., None])
    y_BD = (state_BDN * residue_DN).sum(-1) + skip_D.to(state_BDN.dtype) * x_wide_BD
    return y_BD.to(x_BD.dtype)


class ModalConv(torch.autograd.Function):
    """The backward pass is the same walk from the end of the sequence, with the read and write tables swapped.

    ``left_BDN`` is added to the state after the first block and ``echo_BDT`` to the outputs of the first block.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BDL: Tensor,
        log_pole_DN: Tensor,
        residue_DN: Tensor,
        skip_D: Tensor,
        left_BDN: Tensor | None,
        echo_BDT: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        B, _, L = x_BDL.shape
        layout = _layout(L)
        y_BDL = torch.empty(x_BDL.shape, dtype=x_BDL.dtype, device=x_BDL.device)
        state_BDN = log_pole_DN.new_empty(B, *log_pole_DN.shape)
        for part in channel_slices(x_BDL):
            tables = ModalTables(log_pole_DN[part], residue_DN[part], skip_D[part], layout.block)
            x_DGT = _to_blocks(x_BDL[:, part], layout, log_pole_DN.dtype)
            first = None if left_BDN is None else left_BDN[:, part].permute(1, 2, 0)
            entering_DNBM, last_DNB = tables.states_before(x_DGT, B, layout.first_block, first)
            state_BDN[:, part] = last_DNB.permute(2, 0, 1)
            y_DGT = torch.bmm(x_DGT, tables.toeplitz_DTT)
            y_DBL = _to_tokens(y_DGT.baddbmm_(entering_DNBM.flatten(2).mT, tables.read_DNT), layout, B)
            if echo_BDT is not None:
                y_DBL[..., : layout.num_first] += echo_BDT[:, part].transpose(0, 1)
            y_BDL[:, part] = y_DBL.transpose(0, 1)
        ctx.save_for_backward(x_BDL, log_pole_DN, residue_DN, skip_D, left_BDN)
        ctx.set_materialize_grads(False)
        return y_BDL, state_BDN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_BDL: Tensor | None, grad_state_BDN: Tensor | None) -> tuple[Tensor | None, ...]:
        x_BDL, log_pole_DN, residue_DN, skip_D, left_BDN = ctx.saved_tensors
        need_x, *need_modes, need_left, need_echo = ctx.needs_input_grad
        B, _, L = x_BDL.shape
        layout = _layout(L)
        if grad_y_BDL is None:
            grad_y_BDL = torch.zeros_like(x_BDL)
        grad_x_BDL = torch.empty(x_BDL.shape, dtype=x_BDL.dtype, device=x_BDL.device) if need_x else None
        grad_modes = [torch.empty_like(w) if any(need_modes) else None for w in (log_pole_DN, residue_DN, skip_D)]
        grad_left_BDN = torch.empty_like(left_BDN) if need_left else None
        for part in channel_slices(x_BDL):
            tables = ModalTables(log_pole_DN[part], residue_DN[part], skip_D[part], layout.block)
            g_DGT = _to_blocks(grad_y_BDL[:, part], layout, log_pole_DN.dtype)
            last = None if grad_state_BDN is None else grad_state_BDN[:, part].permute(1, 2, 0)
            leaving_DNBM = tables.states_after(g_DGT, B, last)
            if need_left:
                grad_left_BDN[:, part] = leaving_DNBM[..., layout.first_block].permute(2, 0, 1)
            if need_x:
                gx_DGT = torch.bmm(g_DGT, tables.toeplitz_DTT.mT)
                gx_DGT.baddbmm_(leaving_DNBM.flatten(2).mT, tables.write_DNT)
                grad_x_BDL[:, part] = _to_tokens(gx_DGT, layout, B).transpose(0, 1)
            if any(need_modes):
                x_DGT = _to_blocks(x_BDL[:, part], layout, log_pole_DN.dtype)
                first = None if left_BDN is None else left_BDN[:, part].permute(1, 2, 0)
                entering_DNBM, _ = tables.states_before(x_DGT, B, layout.first_block, first)
                for total, value in zip(grad_modes, tables.gradients(x_DGT, g_DGT, entering_DNBM, leaving_DNBM)):
                    total[part] = value
        grad_echo_BDT = grad_y_BDL[..., : layout.num_first].to(log_pole_DN.dtype) if need_echo else None
        return grad_x_BDL, *grad_modes, grad_left_BDN, grad_echo_BDT


class _ModalState(torch.autograd.Function):
    """``s_n = sum_t exp(log_pole_n * (L - 1 - t)) * x[t]``, slice of channels by slice, block of tokens by block.

    With blocks counted from the end, token i of block m has the age ``T * m + (T - 1 - i)``.
    """

    @staticmethod
    def forward(ctx: Any, x_BDL: Tensor, log_pole_DN: Tensor) -> Tensor:
        ctx.save_for_backward(x_BDL, log_pole_DN)
        state_BDN = log_pole_DN.new_empty(x_BDL.shape[0], *log_pole_DN.shape)
        for part in channel_slices(x_BDL):
            x_BDMT, write_DTN, age_DMN = _aged_blocks(x_BDL[:, part], log_pole_DN[part])
            state_BDN[:, part] = torch.einsum("bdmn,dmn->bdn", x_BDMT @ write_DTN, age_DMN)
        return state_BDN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BDN: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_BDL, log_pole_DN = ctx.saved_tensors
        need_x, need_log_pole = ctx.needs_input_grad
        grad_x_BDL = torch.empty(x_BDL.shape, dtype=x_BDL.dtype, device=x_BDL.device) if need_x else None
        grad_log_pole_DN = torch.empty_like(log_pole_DN) if need_log_pole else None
        for part in channel_slices(x_BDL):
            x_BDMT, write_DTN, age_DMN = _aged_blocks(x_BDL[:, part], log_pole_DN[part])
            M, T = x_BDMT.shape[-2:]
            aged_BDMN = grad_BDN[:, part, None] * age_DMN
            if need_x:
                grad_x_BDL[:, part] = (aged_BDMN @ write_DTN.mT).flatten(2)[..., M * T - x_BDL.shape[-1] :]
            if need_log_pole:
                from_end_M = torch.arange(M - 1, -1, -1, device=x_BDMT.device, dtype=x_BDMT.dtype) * T
                from_end_T = torch.arange(T - 1, -1, -1, device=x_BDMT.device, dtype=x_BDMT.dtype)
                moment_BDMN = from_end_M[:, None] * (x_BDMT @ write_DTN)
                moment_BDMN += x_BDMT @ (from_end_T[:, None] * write_DTN)
                grad_log_pole_DN[part] = (aged_BDMN * moment_BDMN).sum((0, 2))
        return grad_x_BDL, grad_log_pole_DN


def _aged_blocks(x_BDL: Tensor, log_pole_DN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of a signal with zeros in front, how they write the state [D, T, N], and how it decays until the end."""
    T = min(x_BDL.shape[-1], STATE_BLOCK_TOKENS)
    x_BDL = x_BDL.to(log_pole_DN.dtype)
    x_BDMT = F.pad(x_BDL, (-x_BDL.shape[-1] % T, 0)).unflatten(-1, (-1, T))
    age_DMN = _powers(log_pole_DN * T, x_BDMT.shape[-2]).flip(-1).mT
    return x_BDMT, _powers(log_pole_DN, T).flip(-1).mT, age_DMN


class ModalTables:
    """The small matrices that one block of T tokens needs, for a slice of channels."""

    def __init__(self, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, T: int) -> None:
        self.residue_DN = residue_DN
        self.powers_DNK = _powers(log_pole_DN, T + 1)
        self.log_pole_block_R = (log_pole_DN * T).flatten()
        # state before a block -> its outputs; tokens of a block -> state after it; tokens of a block -> its outputs
        self.read_DNT = residue_DN[..., None] * self.powers_DNK[..., 1:]
        self.write_DNT = self.powers_DNK[..., :T].flip(-1)
        filter_DT = torch.bmm(residue_DN[:, None], self.powers_DNK[..., :T])[:, 0]
        filter_DT[:, 0] += skip_D
        self.toeplitz_DTT = toeplitz(filter_DT, T, T)

    def states_before(self, x_DGT: Tensor, B: int, first_block: int, left_DNB: Tensor | None) -> tuple[Tensor, Tensor]:
        """State entering every block [D, N, B, M] and the state after the last one [D, N, B]."""
        D, N, T = self.write_DNT.shape
        written_DNBM = torch.bmm(self.write_DNT, x_DGT.mT).view(D, N, B, -1)
        if left_DNB is not None:
            written_DNBM[..., first_block] += left_DNB
        entering_DNBM = _scan(written_DNBM.flatten(0, 1), self.log_pole_block_R).view_as(written_DNBM)
        last_DNB = torch.addcmul(written_DNBM[..., -1], self.powers_DNK[..., T:], entering_DNBM[..., -1])
        return entering_DNBM, last_DNB

    def states_after(self, g_DGT: Tensor, B: int, last_DNB: Tensor | None) -> Tensor:
        """Gradient of the state leaving every block [D, N, B, M], given that of the state after the last one."""
        D, N, T = self.write_DNT.shape
        read_DNBM = torch.bmm(self.read_DNT, g_DGT.mT).view(D, N, B, -1)
        if last_DNB is not None:
            read_DNBM[..., -1] += self.powers_DNK[..., T:] * last_DNB
        leaving_DNBM = _scan(read_DNBM.flatten(0, 1), self.log_pole_block_R, reverse=True).view_as(read_DNBM)
        if last_DNB is not None:
            leaving_DNBM[..., -1] += last_DNB
        return leaving_DNBM

    def gradients(
        self, x_DGT: Tensor, g_DGT: Tensor, entering_DNBM: Tensor, leaving_DNBM: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of log_pole [D, N], residue [D, N] and skip [D], from the gradients of the tables."""
        entering_DNG, leaving_DNG = entering_DNBM.flatten(2), leaving_DNBM.flatten(2)
        return self.gradients_from(
            torch.bmm(x_DGT.mT, g_DGT),
            torch.bmm(entering_DNG, g_DGT),
            torch.bmm(leaving_DNG, x_DGT),
            torch.linalg.vecdot(leaving_DNG, entering_DNG),
        )

    def gradients_from(
        self, inside_DTT: Tensor, read_DNT: Tensor, written_DNT: Tensor, stepped_DN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same from sums over all blocks of products: of inputs and gradients of outputs, of states that enter and
        gradients of outputs, of gradients of states that leave and inputs, and of these two kinds of states."""
        filter_DT = diagonal_sums(inside_DTT)
        # gradient of residue * power: once from the filter (powers 0 to T - 1), once from reading (1 to T)
        weighted_DNK = F.pad(read_DNT, (1, 0))
        weighted_DNK[..., :-1] += filter_DT[:, None]
        weighted_DNK *= self.powers_DNK
        # gradient of the bare power: from writing (0 to T - 1), and T from stepping over a block
        bare_DNK = torch.cat([written_DNT.flip(-1), stepped_DN[..., None]], dim=-1) * self.powers_DNK
        exponent_K = torch.arange(bare_DNK.shape[-1], device=bare_DNK.device, dtype=bare_DNK.dtype)
        grad_log_pole_DN = torch.addcmul(bare_DNK, weighted_DNK, self.residue_DN[..., None]) @ exponent_K
        return grad_log_pole_DN, weighted_DNK.sum(-1), filter_DT[:, 0]


class _Layout(NamedTuple):
    """A sequence cut into equal blocks, zeros in front where it does not come out even."""

    block: int
    num_blocks: int
    pad: int

    @property
    def first_block(self) -> int:
        """The block that holds the first token."""
        return self.pad // self.block

    @property
    def num_first(self) -> int:
        """Number of tokens in that block."""
        return self.block - self.pad % self.block


def _layout(length: int) -> _Layout:
    block = min(length, BLOCK_TOKENS)
    num_blocks = math.prod(_groups(-(-length // block)))
    return _Layout(block, num_blocks, num_blocks * block - length)


def _groups(num: int) -> tuple[int, int]:
    """Number of groups and their size, at most SCAN_RADIX, with the least left over."""
    num_groups = -(-num // SCAN_RADIX)
    return num_groups, -(-num // num_groups)


def _to_blocks(x_BDL: Tensor, layout: _Layout, dtype: torch.dtype) -> Tensor:
    """[B, D, L] in any dtype to [D, B * M, T]; a view where nothing has to move."""
    x_DBL = x_BDL.transpose(0, 1)
    x_DBL = F.pad(x_DBL.to(dtype), (layout.pad, 0)) if layout.pad else by_channel(x_DBL, dtype)
    return x_DBL.reshape(x_DBL.shape[0], -1, layout.block)


def _to_tokens(x_DGT: Tensor, layout: _Layout, B: int) -> Tensor:
    """[D, B * M, T] to [D, B, L], always a view."""
    return x_DGT.view(x_DGT.shape[0], B, -1)[..., layout.pad :]


def _powers(log_pole_DN: Tensor, num: int) -> Tensor:
    """``exp(log_pole * k)`` for k = 0 .. num - 1, in the last dimension."""
    # products with denormal numbers take twice as long on a CPU
    exponent_K = torch.arange(num, device=log_pole_DN.device, dtype=log_pole_DN.dtype)
    return F.threshold(torch.exp(log_pole_DN[..., None] * exponent_K), _NEGLIGIBLE, 0.0)


def _scan(written_RBM: Tensor, log_pole_R: Tensor, *, reverse: bool = False) -> Tensor:
    """State before every block, from zero: ``s[m + 1] = pole * s[m] + written[m]``. Reverse: after it, backwards."""
    R, B, M = written_RBM.shape
    one_by_one = CPU_BLOCKS_ONE_BY_ONE if written_RBM.device.type == "cpu" else SCAN_RADIX
    if one_by_one >= M:
        return _scan_one_by_one(written_RBM, log_pole_R, reverse=reverse)
    num_groups, size = _groups(M)
    pad = num_groups * size - M
    if pad:
        written_RBM = F.pad(written_RBM, (0, pad) if reverse else (pad, 0))
    powers_RK = _powers(log_pole_R, size)
    inside_RKK = toeplitz(F.pad(powers_RK[:, :-1], (1, 0)), size, size)
    if reverse:
        inside_RKK, powers_RK = inside_RKK.mT, powers_RK.flip(1)
    written_RGK = written_RBM.reshape(R, -1, size)
    state_RGK = torch.bmm(written_RGK, inside_RKK)
    edge = 0 if reverse else -1
    total_RG = torch.addcmul(written_RGK[..., edge], log_pole_R.exp()[:, None], state_RGK[..., edge])
    carried_RBG = _scan(total_RG.view(R, B, num_groups), log_pole_R * size, reverse=reverse)
    state_RGK.addcmul_(carried_RBG.reshape(R, -1, 1), powers_RK[:, None])
    state_RBM = state_RGK.view(R, B, -1)
    return state_RBM[..., :M] if reverse else state_RBM[..., pad:]


def _scan_one_by_one(written_RBM: Tensor, log_pole_R: Tensor, *, reverse: bool) -> Tensor:
    pole_R1 = log_pole_R.exp()[:, None]
    written = written_RBM.unbind(-1)
    states = [torch.zeros_like(written[0])]
    for written_RB in written[:0:-1] if reverse else written[:-1]:
        states.append(torch.addcmul(written_RB, pole_R1, states[-1]))
    return torch.stack(states[::-1] if reverse else states, dim=-1)
