# SPDX-License-Identifier: Apache-2.0
"""One process that believes to be one of many, with tensors that have a shape but no memory; only without a GPU."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any

from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.runtime import megatron

_COLLECTIVES = ("allgather_into_tensor_coalesced_", "allreduce_coalesced_", "reduce_scatter_tensor_coalesced_")
"""Those that torch 2.13 knows for real memory only."""

_libraries: list[Any] = []


@contextlib.contextmanager
def fake_processes(parallel: ParallelConfig, *, rank: int, world_size: int) -> Iterator[None]:
    """Run a block as process ``rank`` of ``world_size``: nothing is sent, and new tensors are on the meta device.

    Raises:
        UserError: There is a GPU, whose code path has no meta form; or the processes do not divide as wanted.
    """
    parallel.check_world_size(world_size)
    megatron.enter_training()
    import torch

    if megatron.on_cuda():
        raise UserError("planning runs on the CPU; hide the GPUs from it with CUDA_VISIBLE_DEVICES=''")
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from evo2_megatron.runtime import cuda_on_cpu

    _let_collectives_take_meta_tensors()
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ |= environment
    torch.distributed.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            create_gloo_process_groups=False,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        with cuda_on_cpu.on_device("meta"), torch.device("meta"), _functions_of_a_gpu():
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@functools.cache
def _let_collectives_take_meta_tensors() -> None:
    """Register with torch that these do nothing to tensors without memory."""
    import torch
    from torch._C._distributed_c10d import FakeWork

    library = torch.library.Library("c10d", "IMPL")
    for name in _COLLECTIVES:
        library.impl(name, lambda *args, **kwargs: FakeWork().boxed(), "Meta")
    _libraries.append(library)  # the registration ends with the object


def _functions_of_a_gpu() -> Any:
    """Fused kernels where torch would take separate steps for meta tensors, and numbers that the code writes down."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    tensor = inspect.unwrap(torch.tensor)

    class RmsNorm(torch.autograd.Function):
        """Keeps its input and a number for each token."""

        @staticmethod
        def forward(ctx: Any, x_LBH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
            scale_LB1 = torch.empty(*x_LBH.shape[:-1], 1, dtype=torch.float32)
            ctx.save_for_backward(x_LBH, weight_H, scale_LB1)
            return torch.empty_like(x_LBH)

        @staticmethod
        def backward(ctx: Any, grad_LBH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            return tuple(
                torch.empty_like(x) if needed else None for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad)
            )

    class FunctionsOfAGpu(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            kwargs = kwargs or {}
            if func is tensor and kwargs.get("device") is None:
                # Megatron passes a mask's type through a checkpoint so, and reads it there
                return func(*args, **kwargs | {"device": "cpu"})
            if func is functional.rms_norm:
                return RmsNorm.apply(args[0], kwargs["weight"])
            if func is functional.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
                return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *args, kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False)
                )[0]
            return func(*args, **kwargs)

    return FunctionsOfAGpu()
