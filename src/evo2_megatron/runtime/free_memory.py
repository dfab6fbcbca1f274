# SPDX-License-Identifier: Apache-2.0
"""How much main memory this process may still take: of the machine, and of the container or job that it runs in.

Docker and Slurm limit memory by control groups of Linux, in the files of version 1 or 2; the machine's own figures do
not know of them, and who takes more is killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MACHINE = Path("/proc/meminfo")
_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


class _Names(NamedTuple):
    """Files of a control group."""

    limit: str
    used: str
    reclaimable: str
    """In ``memory.stat``: files in the page cache that nobody has read lately, which count as used."""


_VERSION_1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Names("memory.max", "memory.current", "inactive_file")


def free_bytes() -> int:
    """What the machine has free, or the least of what the limits of this process's control groups leave."""
    return max(0, min([_free_in_machine(), *(limit - used for limit, used in _limits())]))


def limit_bytes() -> int | None:
    """The least limit of this process's control groups below the machine's memory; None: there is none."""
    least = min((limit for limit, _ in _limits()), default=None)
    return None if least is None or least >= memory_bytes() else least


def memory_bytes() -> int:
    """Of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_in_machine() -> int:
    try:
        lines = _MACHINE.read_text().splitlines()
    except FileNotFoundError:  # macOS: all memory is the nearest figure the system gives
        return memory_bytes()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and bytes in use of each control group with a limit, from this process's own up to the root."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _MOUNT, _VERSION_2
        elif "memory" in controllers.split(","):
            root, names = _MOUNT / "memory", _VERSION_1
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            # inside a container the path is the host's, and only the root is there
            if (folder / names.limit).is_file():
                limit = (folder / names.limit).read_text().strip()
                if limit != "max":
                    yield int(limit), _used(folder, names)
            if folder == root:
                break


def _used(folder: Path, names: _Names) -> int:
    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int((folder / names.used).read_text()) - int(facts.get(names.reclaimable, 0))
