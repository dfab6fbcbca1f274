# SPDX-License-Identifier: Apache-2.0
"""Memory and cores that this process may take: of the machine, and of the container or job that it runs in.

Docker, Kubernetes and Slurm limit both by control groups of Linux, in the files of version 1 or 2. The machine's own
figures do not know of them: who takes more memory is killed, and more threads than cores wait for each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MACHINE = Path("/proc/meminfo")
_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


class _MemoryFiles(NamedTuple):
    limit: str
    used: str
    reclaimable: str
    """In ``memory.stat``: files in the page cache that nobody has read lately, which count as used."""


_MEMORY = {
    1: _MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: _MemoryFiles("memory.max", "memory.current", "inactive_file"),
}


def free_bytes() -> int:
    """What the machine has free, or the least of what the limits of this process's control groups leave."""
    return max(0, min([_free_in_machine(), *(limit - used for limit, used in _memory_limits())]))


def limit_bytes() -> int | None:
    """The least memory limit of this process's control groups, below the machine's memory; None: there is none."""
    least = min((limit for limit, _ in _memory_limits()), default=None)
    return None if least is None or least >= memory_bytes() else least


def memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores() -> int:
    """That this process may run on; where the system cannot say which (it is not Linux), all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_cores() -> int | None:
    """Cores' worth of time that the control groups allow, rounded up, below those to be seen; None: all of these."""
    least = min(_core_limits(), default=math.inf)
    return math.ceil(least) if least < cores() else None


def threads() -> int:
    """As many as torch has, unless the limits of this process's control groups are of fewer cores."""
    import torch

    return min(torch.get_num_threads(), limit_cores() or torch.get_num_threads())


def _free_in_machine() -> int:
    try:
        lines = _MACHINE.read_text().splitlines()
    except FileNotFoundError:  # macOS: all memory is the nearest figure the system gives
        return memory_bytes()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Limit and bytes in use of each control group with a limit."""
    for version, folder in _groups("memory"):
        files = _MEMORY[version]
        limit = _words(folder / files.limit)
        if limit and limit != ["max"]:
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield int(limit[0]), int((folder / files.used).read_text()) - int(facts.get(files.reclaimable, 0))


def _core_limits() -> Iterator[float]:
    for version, folder in _groups("cpu"):
        if version == 2:
            quota_and_period = _words(folder / "cpu.max")
        else:
            quota_and_period = [*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")]
        if quota_and_period and quota_and_period[0] not in ("max", "-1"):
            quota, period = map(int, quota_and_period)
            yield quota / period


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of this process's control groups, from its own up to the root, whether they exist or not."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            version, root = 2, _MOUNT
        elif controller in controllers.split(","):
            version, root = 1, _MOUNT / controller
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield version, folder  # inside a container the path is the host's, and only the root is there
            if folder == root:
                break


def _words(path: Path) -> list[str]:
    """Of a file of a control group; none where the group, or the limit, does not exist."""
    try:
        return path.read_text().split()
    except FileNotFoundError:
        return []
