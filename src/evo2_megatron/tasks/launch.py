# SPDX-License-Identifier: Apache-2.0
"""Run a command in several processes of this machine, one a device, as ``torchrun --no-python`` does."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Collection, Sequence

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from evo2_megatron.config import UserError
from evo2_megatron.runtime import job_limits, megatron
from evo2_megatron.runtime.children import end_with_parent

# and a process id: the name that torchrun gives a run of processes that this one started. Jobs of users, who give
# theirs with --rdzv-id, must not begin so
_RUN_OF = "evo2-megatron-started-by-process-"
_GRACE_SECONDS = 30  # to end after a signal; whoever has not is killed
_LONG_SECONDS = 24 * 60 * 60


def on_devices(
    devices: int | None,
    argv: Sequence[str] | None,
    *,
    divide: Callable[..., int] | None = None,
    copies: bool = True,
    ended_by: Collection[int] = (),
) -> bool:
    """Start the command again in a process for each device and wait for them, if several are asked for.

    Signals that ask this process to end reach the others. Its exit status is that of the process that failed.

    Args:
        devices: How many; None: as many as there are GPUs, or 1.
        argv: What ``main`` was given; None, the command line, is all that can be started again.
        divide: Where ``devices`` is None: given ``num_gpus`` and ``gpu_bytes``, those of the smallest, says over how
            many to divide the model, which the others learn from ``--tensor-parallel-size``. None: not divided.
        copies: Whether there is a copy of such a model on each GPU, or on as many as it is divided over.
        ended_by: Signals after which the command finishes what it does, takes its time, and has done well.

    Returns:
        Whether the work is done. False: it is for this process.

    Raises:
        UserError: There are not so many GPUs, or torchrun has started another number of processes.
    """
    if "RANK" in os.environ:
        run = os.environ.get("TORCHELASTIC_RUN_ID", "")
        if run.startswith(_RUN_OF):
            end_with_parent(int(run.removeprefix(_RUN_OF)))
        found = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if devices not in (None, found):
            raise UserError(f"--devices is {devices}, but torchrun started {found}; leave it out, torchrun decides")
        return False
    count, flags = _count(devices), []
    if devices is None and divide is not None and count > 1:
        size = divide(num_gpus=count, gpu_bytes=min(_memory(gpu) for gpu in range(count)))
        count = count // size * size if copies else size
        flags = ["--tensor-parallel-size", str(size)] * (size > 1)
    if count == 1:
        return False
    if argv is not None:
        raise UserError("--devices starts a command line again; a function of Python's is to be started by torchrun")
    _run(count, flags, ended_by=ended_by)
    return True


def _count(devices: int | None) -> int:
    """Processes to start; one a GPU, or on a machine without any, as many as are asked for."""
    gpus = torch.cuda.device_count() if megatron.on_cuda() else 0
    if devices is None:
        return max(gpus, 1)
    if 0 < gpus < devices:
        raise UserError(f"--devices is {devices}, but GPUs of this machine are {gpus}; --devices auto takes all")
    return devices


def _memory(gpu: int) -> int:
    return torch.cuda.get_device_properties(gpu).total_memory


def _run(count: int, flags: Sequence[str], *, ended_by: Collection[int]) -> None:
    """Start this process's own command line so many times, with further flags.

    Returns when all have ended well, and exits otherwise.
    """
    logging.disable()  # the processes speak for themselves
    if not megatron.on_cuda():
        # torchrun would say 1, which leaves cores idle; torch would say all, which has processes wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, job_limits.threads() // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"{_RUN_OF}{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a free port
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=_LONG_SECONDS if ended_by else _GRACE_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:], *flags)
    except SignalException as error:
        sys.exit(0 if error.sigval in ended_by else 128 + error.sigval)
    except ChildFailedError as error:
        # the first in this order has failed; others were ended because of it
        rank, failure = next(iter(error.failures.items()))
        if failure.exitcode > 0:  # and has said why
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        hint = "; most often, memory ran out" if name == "SIGKILL" else ""
        sys.stderr.write(f"process {rank} of {count} was ended by {name}{hint}\n")
        sys.exit(128 - failure.exitcode)
