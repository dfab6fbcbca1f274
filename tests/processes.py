# SPDX-License-Identifier: Apache-2.0
"""Several processes with torchrun's environment, forked from one that has imported all; and what becomes of them.

Importing Megatron takes longer than most of what is tested; torchrun would have every process do it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_TESTS = Path(__file__).parent
_SOURCES = _TESTS.parent / "src"


def environment() -> dict[str, str]:
    """Of an interpreter that runs a script which calls ``fork``."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{_TESTS}{os.pathsep}{_SOURCES}"}


def launch(script: Path, *arguments: object, timeout: float = 600) -> None:
    """Run a script that calls ``fork`` in an interpreter of its own."""
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True, env=environment(), timeout=timeout)


def fork(num_processes: int, target: Callable[..., None], *arguments: object, loads: Sequence[str] = ()) -> None:
    """Call ``target`` in so many processes and wait; ends the program with status 1 as soon as one of them fails.

    Call it before anything large was computed: OpenMP's threads do not survive a fork. ``loads`` names modules to
    import before, once for all.
    """
    from evo2_megatron.runtime.megatron import enter

    enter()
    for name in loads:
        importlib.import_module(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_run, args=(rank, num_processes, port, target, *arguments))
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        time.sleep(0.05)
        if any(process.exitcode for process in processes):
            break
    for process in processes:
        process.kill()  # of those that wait for one that failed
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(1)


def _run(rank: int, world_size: int, port: int, target: Callable[..., None], *arguments: object) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    target(*arguments)


def until(happens: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # one that has ended may not have been waited for
