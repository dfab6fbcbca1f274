# SPDX-License-Identifier: Apache-2.0
"""What a step of training moves through a GPU's memory, without a GPU: plain convolutions beside compiled ones.

The model and Megatron's schedule run on tensors that have a shape and no memory, and each operation of torch counts
for the tensors it reads and writes; matrix products and attention for their arithmetic instead. Norms count as one
kernel, as they are on a GPU; the compiled convolutions read their streams and write their results, once forwards and
once backwards. Nothing is kept in a cache, nothing waits, and no two operations overlap: the times are what the step
cannot fall below in this form, and no measurements.

    python benchmarks/traffic.py [--model-size evo2_1b_base] [--seq-length 8192]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from evo2_megatron.ops.backends import PLAIN, Kernels
from evo2_megatron.ops.modal import ModalOutput
from evo2_megatron.tasks.planning import plan

BYTES_PER_SECOND, FLOPS_PER_SECOND = 3.35e12, 989e12
"""Of an H100 SXM."""

OPERATIONS_WITHOUT_TRAFFIC = ("empty", "new_empty", "detach", "alias", "as_strided", "unbind", "split", "_unsafe_view")


class OneKernel(Function):
    """Reads its arguments and writes one result of the first one's shape, or of another; backwards their gradients."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_empty(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


class Traffic(TorchDispatchMode):
    """Bytes that operations move, and the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.flops, self.calls = 0, 0, 0

    def add(self, *tensors: Tensor) -> None:
        """Tensors that are read or written; what is repeated without being stored counts once."""
        seen = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in tensors}
        for tensor in seen.values():
            stored = [size for size, stride in zip(tensor.shape, tensor.stride()) if stride or size == 1]
            self.bytes += torch.Size(stored).numel() * tensor.element_size()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation and account for it."""
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        elif not func.is_view and func._opname not in OPERATIONS_WITHOUT_TRAFFIC:
            self.calls += 1
            self.add(*(leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)))
        return result


@contextlib.contextmanager
def one_kernel_each(traffic: Traffic, *, convolutions: bool) -> Iterator[None]:
    """Norms, and convolutions if asked, as operations that move no more than they must."""

    def run(shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        result = OneKernel.apply(shape, *inputs)
        traffic.add(*inputs, result)
        if result.requires_grad:
            # once more all inputs and the gradient of the result, and the gradients of the inputs
            result.register_hook(lambda grad: traffic.add(grad, *inputs, *map(torch.empty_like, inputs)))
        return result

    def gated_conv(u_BEL: Tensor, *taps: Tensor) -> Tensor:
        return run((u_BEL.shape[0], u_BEL.shape[1] // 3, u_BEL.shape[2]), u_BEL, *taps)

    def modal_conv(x_BDL: Tensor, *parameters: Tensor | None) -> ModalOutput:
        return ModalOutput(run(x_BDL.shape, x_BDL, *parameters[:3]), x_BDL)

    compiled = Kernels(gated_conv, lambda x, taps, _: run(x.shape, x, taps), modal_conv)
    with (
        mock.patch("evo2_megatron.model.torch_modules.rms_norm", lambda x, weight, _: run(x.shape, x, weight)),
        mock.patch("evo2_megatron.model.operator.PLAIN", compiled if convolutions else PLAIN),
    ):
        yield


def step(model_size: str, seq_length: int, recompute: str, *, convolutions: bool) -> Traffic:
    """One micro-batch of one sample, forwards and backwards."""
    given = {"model_size": model_size, "seq_length": seq_length, "recompute": recompute}
    options = plan.planned_options(**given, global_batch_size=1)
    with plan.on_stage(options, 0, 1):
        from evo2_megatron.tasks.planning import plan_step

        traffic = Traffic()
        with one_kernel_each(traffic, convolutions=convolutions):
            config = plan_step.step_config(options, 512)
            model = plan_step.build_model(config)
            with traffic:
                plan_step.run_step(config, model, 1)
    return traffic


def main() -> None:
    """Print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", default="evo2_1b_base", help="key of a model (default: evo2_1b_base)")
    parser.add_argument("--seq-length", type=int, default=8192, help="tokens (default: 8192)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        "| convolutions | recompute | moved, GB | memory, ms | products, ms | together, ms | tokens/s | operations |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, recompute in itertools.product(("plain", "compiled"), ("full", "none")):
        found = step(args.model_size, args.seq_length, recompute, convolutions=name == "compiled")
        memory, products = 1e3 * found.bytes / BYTES_PER_SECOND, 1e3 * found.flops / FLOPS_PER_SECOND
        total = memory + products
        print(
            f"| {name} | {recompute} | {found.bytes / 1e9:.0f} | {memory:.0f} | {products:.0f} | {total:.0f} | "
            f"{1e3 * args.seq_length / total:,.0f} | {found.calls:,} |"
        )


if __name__ == "__main__":
    main()
