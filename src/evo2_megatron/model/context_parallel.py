# SPDX-License-Identifier: Apache-2.0
"""Sequences split over processes: what the layers need from each other's parts, with gradients.

A sequence is cut into twice as many chunks as there are processes, and each process holds an early chunk and its
mirror image (``ops.zigzag``). A finite filter needs the last inputs of the chunk before (the halo), a modal filter the
state in which that chunk ends, attention all keys and values so far. So what travels for a Hyena layer does not grow
with the length, and its channels need not be divisible by anything.

Shape legend: B batch, L tokens of this process, l = L / 2 tokens of a chunk, C = 2B chunks (the batch's early chunks,
then its late ones), X channels, P tokens of a halo, N modes, J chunks of the whole sequence, S all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from evo2_megatron.ops.zigzag import from_zigzag


class SplitSequence:
    """This process's part of every sequence, and its neighbours."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """``group``: the context-parallel processes, two or more."""
        self.group = group
        self.size, self.rank = group.size(), group.rank()

    def to_chunks(self, x_LBX: Tensor) -> Tensor:
        """Early and late chunks side by side in the batch: [C, X, l]."""
        return x_LBX.unflatten(0, (2, -1)).permute(0, 2, 3, 1).flatten(0, 1)

    def from_chunks(self, x_CXl: Tensor) -> Tensor:
        """Inverse of ``to_chunks``: [L, B, X]."""
        return x_CXl.unflatten(0, (2, -1)).permute(0, 3, 1, 2).flatten(0, 1)

    def convolve(self, conv: Callable[[Tensor], Tensor], x_CXl: Tensor, num_history: int) -> Tensor:
        """Apply a causal convolution to chunks as if each came after the chunk before it.

        While the halos travel, every chunk is convolved as if nothing came before; then its first ``num_history``
        outputs, the only ones that this makes wrong, are computed again. In the backward pass the halos' gradients
        travel while the gradient of the bulk is computed.

        Args:
            conv: Causal; the output at a token depends on it and on ``num_history`` tokens before it, and zeros before
                the first token change nothing.
            x_CXl: Chunks of at least ``num_history`` tokens.
            num_history: P.

        Returns:
            What ``conv`` gives, for every token.
        """
        assert x_CXl.shape[-1] >= num_history, f"chunks of {x_CXl.shape[-1]} tokens for a halo of {num_history}"
        exchange = _HaloExchange(self)
        halo_CXP = _StartExchange.apply(x_CXl[..., -num_history:], exchange)
        y_CXl = conv(x_CXl)
        halo_CXP = _FinishExchange.apply(halo_CXP, exchange)
        y_CXl[..., :num_history] = conv(torch.cat([halo_CXP, x_CXl[..., :num_history]], dim=-1))[..., num_history:]
        return y_CXl

    def entering_states(self, written_CXN: Tensor, log_pole_XN: Tensor, chunk_length: int) -> Tensor:
        """State before the first token of this process's chunks, given what every chunk alone makes of zeros.

        Args:
            written_CXN: State after the chunk if it was zero before it.
            log_pole_XN: Logarithm of the poles.
            chunk_length: l.
        """
        of_all = gather_from_sequence_parallel_region(written_CXN, group=self.group)
        written_JBXN = from_zigzag(of_all.unflatten(0, (2 * self.size, -1)), self.size, 0)
        decay_XN = torch.exp(log_pole_XN * chunk_length)
        state_BXN = torch.zeros_like(written_JBXN[0])
        entering = []
        for written_BXN in written_JBXN.unbind(0):
            entering.append(state_BXN)
            state_BXN = decay_XN * state_BXN + written_BXN
        return torch.cat([entering[self.rank], entering[-1 - self.rank]])

    def gather(self, x_LX: Tensor) -> Tensor:
        """All processes' parts along the first dimension, in natural order: [S, ...]."""
        return from_zigzag(gather_from_sequence_parallel_region(x_LX, group=self.group), self.size, 0)

    def ends(self, chunk_length: int) -> tuple[int, int]:
        """Where this process's chunks end in the whole sequence."""
        return (self.rank + 1) * chunk_length, (2 * self.size - self.rank) * chunk_length


class _HaloExchange:
    """Two messages between neighbours: tails of early chunks go up in rank, tails of late chunks go down.

    The chunk after process r's early one is process r + 1's early one, and the chunk after its late one is process
    r - 1's late one; in the middle of the sequence, on the last process, the late chunk follows the early one.
    """

    def __init__(self, split: SplitSequence) -> None:
        self._split = split
        self._works: list[dist.Work] = []
        self._buffers: tuple[Tensor, ...] = ()

    def start(self, up: Tensor, down: Tensor, from_below: Tensor, from_above: Tensor) -> None:
        """Send ``up`` and ``down``; what the neighbours send fills the other two, unless there is no neighbour."""
        split, group, ops = self._split, self._split.group, []
        if split.rank + 1 < split.size:
            ops += [dist.P2POp(dist.isend, up, group=group, group_peer=split.rank + 1)]
            ops += [dist.P2POp(dist.irecv, from_above, group=group, group_peer=split.rank + 1)]
        if split.rank > 0:
            ops += [dist.P2POp(dist.isend, down, group=group, group_peer=split.rank - 1)]
            ops += [dist.P2POp(dist.irecv, from_below, group=group, group_peer=split.rank - 1)]
        self._buffers = (up, down, from_below, from_above)  # must outlive the transfer
        self._works = dist.batch_isend_irecv(ops)

    def wait(self) -> tuple[Tensor, Tensor]:
        """What came from below and from above."""
        for work in self._works:
            work.wait()
        _, _, from_below, from_above = self._buffers
        self._works, self._buffers = [], ()
        return from_below, from_above

    @property
    def is_last(self) -> bool:
        """Whether the late chunk of this process follows its early chunk."""
        return self._split.rank == self._split.size - 1


class _StartExchange(torch.autograd.Function):
    """Tails of the chunks to halos that are on their way; in the backward pass, the end of the journey back."""

    @staticmethod
    def forward(ctx: Any, tail_CXP: Tensor, exchange: _HaloExchange) -> Tensor:
        ctx.exchange = exchange
        early_BXP, late_BXP = (tail.contiguous() for tail in tail_CXP.chunk(2))
        halo_CXP = torch.zeros(tail_CXP.shape, dtype=tail_CXP.dtype, device=tail_CXP.device)
        before_early_BXP, before_late_BXP = halo_CXP.chunk(2)
        exchange.start(early_BXP, late_BXP, before_early_BXP, before_late_BXP)
        if exchange.is_last:
            before_late_BXP.copy_(early_BXP)
        return halo_CXP

    @staticmethod
    def backward(ctx: Any, grad_CXP: Tensor) -> tuple[Tensor, None]:
        exchange: _HaloExchange = ctx.exchange
        late_BXP, early_BXP = exchange.wait()
        if exchange.is_last:
            # what was started is the gradient of the halos: that of the late chunk stays here
            early_BXP = grad_CXP.chunk(2)[1]
        return torch.cat([early_BXP, late_BXP]), None


class _FinishExchange(torch.autograd.Function):
    """Halos on their way to halos; in the backward pass, the start of the journey back."""

    @staticmethod
    def forward(ctx: Any, halo_CXP: Tensor, exchange: _HaloExchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return halo_CXP.clone()

    @staticmethod
    def backward(ctx: Any, grad_CXP: Tensor) -> tuple[Tensor, None]:
        before_early_BXP, before_late_BXP = (grad.contiguous() for grad in grad_CXP.chunk(2))
        from_below, from_above = torch.zeros_like(before_early_BXP), torch.zeros_like(before_late_BXP)
        # the halo of the early chunk came from below, that of the late one from above
        ctx.exchange.start(before_late_BXP, before_early_BXP, from_below, from_above)
        return grad_CXP, None
