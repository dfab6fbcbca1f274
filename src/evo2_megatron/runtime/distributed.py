# SPDX-License-Identifier: Apache-2.0
"""Start and stop process groups; who am I among the processes."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.runtime import megatron

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule
    from torch import Tensor

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(days=14)
"""That processes have with one that writes the results of all, or has the last and longest sequence; torch's own would
end the job after ten minutes on GPUs. Where one fails, whoever started them ends the others."""


def rank() -> int:
    """This process among all; right before process groups exist, too."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_one_of_several() -> bool:
    """Whether torchrun started this process. A job may name a master for other commands than this one."""
    return "RANK" in os.environ or world_size() > 1


def tell_of_idle_gpus() -> None:
    """Log how to use all GPUs of this machine, if there are several and this process was started alone."""
    import torch

    if "RANK" in os.environ or not megatron.on_cuda():
        return
    count = torch.cuda.device_count()
    if count > 1:
        logger.info(
            "One of %d GPUs is used; commands use all with --devices auto, scripts with torchrun --nproc-per-node %d",
            count, count,
        )  # fmt: skip


@contextlib.contextmanager
def process_groups(parallel: ParallelConfig, *, seed: int = 1234) -> Iterator[None]:
    """Run a block inside torch.distributed and Megatron's parallel state; both are gone afterwards.

    NCCL on CUDA, gloo elsewhere. Without torchrun this is a group of one process. After an error on one of several
    GPUs they stay, for the process to end.

    Args:
        parallel: How the processes divide into copies of the model.
        seed: Seed of Python's, NumPy's and torch's generators and of Megatron's per-region random states.

    Raises:
        UserError: The number of processes is not a multiple of ``parallel.model_size``, or a machine without network
            lacks even 127.0.0.1.
    """
    parallel.check_world_size(world_size())
    megatron.enter()
    import torch
    from megatron.core import parallel_state

    if megatron.on_cuda():
        torch.cuda.set_device(local_rank())
        backend = "nccl"
    else:
        backend = "gloo"
    if _is_one_of_several():
        torch.distributed.init_process_group(backend, timeout=_PATIENCE, rank=rank(), world_size=world_size())
    else:
        store = torch.distributed.HashStore()
        try:
            torch.distributed.init_process_group(backend, timeout=_PATIENCE, store=store, rank=0, world_size=1)
        except RuntimeError:
            check_loopback()
            raise
    with contextlib.ExitStack() as groups:
        groups.push(_end_groups)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=_PATIENCE // timedelta(minutes=1),
        )
        _seed_everything(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
        yield


def _end_groups(kind: type[BaseException] | None, *_: object) -> None:
    import torch
    from megatron.core import parallel_state

    # NCCL's end waits for all processes of a machine: one that fails by itself would never say why
    if kind is not None and issubclass(kind, Exception) and megatron.on_cuda() and world_size() > 1:
        return
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _seed_everything(seed: int) -> None:
    import random

    import numpy
    import torch
    from megatron.core import tensor_parallel

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def share_random_state() -> None:
    """Have all processes draw what the first would; every process must call this.

    A checkpoint holds the state of one copy of the model: where copies have drawn different numbers, for batches of
    different lengths, a run that goes on would draw others.
    """
    import torch

    # on a machine without CUDA its function may be a stand-in for the same generator
    state = [torch.get_rng_state(), torch.cuda.get_rng_state() if megatron.on_cuda() else None]
    torch.distributed.broadcast_object_list(state, src=0)
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def of_first_in_model(value: Tensor) -> Tensor:
    """A tensor as the first of the processes that share a model has it; every one of them must call this.

    For what decides how they go on: equal sums may differ in their last digit from GPU to GPU.
    """
    import torch
    from megatron.core import parallel_state

    group = parallel_state.get_model_parallel_group()
    if group.size() > 1:
        torch.distributed.broadcast(value, group=group, group_src=0)
    return value


def check_loopback() -> None:
    """Raise UserError where this machine cannot be reached at 127.0.0.1, which torch needs for one process, too."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            pass
    except OSError as error:
        raise UserError(
            f"127.0.0.1 cannot be reached ({error.strerror or error}); bring the loopback interface up, as root: ip "
            "link set lo up"
        ) from None


def be_alone_without_torchrun() -> None:
    """Name one process on a free port; Bridge would guess, from Slurm's variables and the same port for every run."""
    if _is_one_of_several():
        return
    check_loopback()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")


def data_parallel_rank() -> int:
    """Which copy of the model this process belongs to."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    """Number of copies of the model."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_world_size()


def is_one_process_per_copy() -> bool:
    """Whether no copy of the model is split over processes."""
    return world_size() == data_parallel_size()


def is_model_parallel_writer() -> bool:
    """Whether this process speaks for its copy of the model: first of tensor and context, last of pipeline."""
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
        and parallel_state.is_pipeline_last_stage()
    )


def total_over_parameters(model: list[MegatronModule], of: Callable[[Tensor], int]) -> int:
    """Sum over the parameters of the whole model, of which every process has a part; every process must call this.

    Args:
        model: The stages of this process.
        of: Value of a parameter of which this process has the whole or, of a split one, an equal share.
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.transformer.module import param_is_not_shared

    tensor = parallel_state.get_tensor_model_parallel_world_size()
    # a tied table counts once: the last stage's copy is marked as shared
    mine = [p for stage in model for p in stage.parameters() if param_is_not_shared(p)]
    shares = [tensor if getattr(p, "tensor_model_parallel", False) else 1 for p in mine]
    total = torch.tensor(sum(of(p) * share for p, share in zip(mine, shares)), device="cuda")
    torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return int(total)
