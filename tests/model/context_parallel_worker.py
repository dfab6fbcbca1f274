# SPDX-License-Identifier: Apache-2.0
"""Processes that split sequences: convolutions and states of the parts against those of the whole, in float64.

Run by test_context_parallel.py. Every process checks its own part, values and gradients.
"""

import torch

from evo2_megatron.config import ParallelConfig
from evo2_megatron.runtime.distributed import process_groups, world_size
from processes import fork

B, D, MODES = 2, 3, 4
CHUNKS = (129, 131, 256)


def split_sequence():
    from megatron.core import parallel_state

    from evo2_megatron.model.context_parallel import SplitSequence

    return SplitSequence(parallel_state.get_context_parallel_group())


def mine(x_BDL, split):
    """This process's part, as the layers have it: [L, B, D]."""
    from evo2_megatron.ops.zigzag import zigzag_split

    return zigzag_split(x_BDL, 2, num_ranks=split.size, rank=split.rank).permute(2, 0, 1).contiguous()


def check(split, whole, part, shapes, length):
    """Compare ``whole(x_BDL, *args)`` with ``part(x_LBD, *args)``, and the gradients; the arguments' are summed."""
    torch.manual_seed(length)
    x_BDL, weight_BDL = (torch.randn(B, D, length, dtype=torch.float64) for _ in range(2))
    args = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    leaves = [tensor.clone().requires_grad_() for tensor in (x_BDL, *args)]
    want_BDL = whole(*leaves)
    want_grads = torch.autograd.grad(want_BDL, leaves, weight_BDL)

    own = [tensor.clone().requires_grad_() for tensor in (mine(x_BDL, split), *args)]
    got_LBD = part(*own)
    got_grads = torch.autograd.grad(got_LBD, own, mine(weight_BDL, split))
    torch.testing.assert_close(got_LBD, mine(want_BDL, split), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_grads[0], mine(want_grads[0], split), rtol=1e-10, atol=1e-10)
    for got, want in zip(got_grads[1:], want_grads[1:]):
        torch.distributed.all_reduce(got, group=split.group)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def check_convolutions(split, length):
    from evo2_megatron.ops.causal_conv import causal_conv
    from evo2_megatron.ops.reference import causal_conv_ref

    for num_taps in (2, 3, 8, 128, 130):

        def part(x_LBD, taps_DK):
            y = split.convolve(lambda x: causal_conv(x, taps_DK), split.to_chunks(x_LBD), taps_DK.shape[1] - 1)
            return split.from_chunks(y)

        check(split, causal_conv_ref, part, [(D, num_taps)], length)


def check_states(split, length):
    from evo2_megatron.ops.modal import modal_conv, modal_state

    def whole(x_BDL, log_pole, residue, skip):
        return modal_conv(x_BDL, -log_pole.exp() / 50, residue, skip).y_BDL

    def part(x_LBD, log_pole, residue, skip):
        x_CDl, log_pole = split.to_chunks(x_LBD), -log_pole.exp() / 50
        entering = split.entering_states(modal_state(x_CDl, log_pole), log_pole, x_CDl.shape[-1])
        return split.from_chunks(modal_conv(x_CDl, log_pole, residue, skip, entering).y_BDL)

    check(split, whole, part, [(D, MODES), (D, MODES), (D,)], length)


def check_gathering(split, length):
    def whole(x_BDL):
        return x_BDL.cumsum(-1)

    def part(x_LBD):
        sums_SBD = split.gather(x_LBD).cumsum(0)
        half = x_LBD.shape[0] // 2
        return torch.cat([sums_SBD[end - half : end] for end in split.ends(half)])

    check(split, whole, part, [], length)


def check_overlap(split):
    """The bulk is computed between the start of an exchange and the wait for it, forward and backward."""
    from evo2_megatron.model import context_parallel

    events = []

    class Watched(context_parallel._HaloExchange):
        def start(self, *messages):
            events.append("start")
            super().start(*messages)

        def wait(self):
            events.append("wait")
            return super().wait()

    class Bulk(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            events.append(f"forward of {x.shape[-1]}")
            ctx.length = x.shape[-1]
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            events.append(f"backward of {ctx.length}")
            return grad * 2

    context_parallel._HaloExchange = Watched
    x_CDl = torch.randn(2, D, 50, requires_grad=True)
    split.convolve(Bulk.apply, x_CDl, 3).sum().backward()
    there = ["start", "forward of 50", "wait", "forward of 6"]
    assert events == [*there, "backward of 6", "start", "backward of 50", "wait"], events


def main():
    with process_groups(ParallelConfig(context=world_size())):
        split = split_sequence()
        for chunk in CHUNKS:
            length = 2 * split.size * chunk
            check_convolutions(split, length)
            check_states(split, length)
            check_gathering(split, length)
        check_overlap(split)


if __name__ == "__main__":
    for num_processes in (2, 3):
        fork(num_processes, main)
