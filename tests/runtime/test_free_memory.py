# SPDX-License-Identifier: Apache-2.0
"""Memory that is free where a container or a job has a limit, by the files of control groups of both versions."""

import os

import pytest

from evo2_megatron.runtime import free_memory

GIB = 2**30
NONE_OF_VERSION_1 = 2**63 - 4096
"""What version 1 has for no limit."""


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Files of a machine with 64 GiB, 48 of them free, and a process in the group that it is given."""
    monkeypatch.setattr(free_memory, "_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(free_memory, "_MOUNT", tmp_path / "mount")
    monkeypatch.setattr(free_memory, "memory_bytes", lambda: 64 * GIB)
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable: {48 * 2**20} kB\n")

    def make(line, groups):
        names = free_memory._VERSION_2 if line.startswith("0::") else free_memory._VERSION_1
        (tmp_path / "cgroup").write_text(f"12:cpu,cpuacct:/elsewhere\n{line}\n")
        for path, (limit, used, reclaimable) in groups.items():
            folder = tmp_path / "mount" / path
            folder.mkdir(parents=True, exist_ok=True)
            (folder / names.limit).write_text(f"{limit}\n")
            (folder / names.used).write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 5\n{names.reclaimable} {reclaimable}\n")

    return make


@pytest.mark.parametrize(
    "line, groups, free, limit",
    [
        ("0::/", {}, 48 * GIB, None),
        ("0::/job/step", {"job": ("max", 0, 0), "job/step": (20 * GIB, 9 * GIB, GIB)}, 12 * GIB, 20 * GIB),
        ("0::/job/step", {"job": (16 * GIB, 9 * GIB, GIB), "job/step": (20 * GIB, GIB, 0)}, 8 * GIB, 16 * GIB),
        ("0::/job/step", {"job": (60 * GIB, 0, 0)}, 48 * GIB, 60 * GIB),
        ("0::/job", {"job": (80 * GIB, 0, 0)}, 48 * GIB, None),
        ("0::/job", {"job": (2 * GIB, 3 * GIB, 0)}, 0, 2 * GIB),
        ("4:memory:/job", {"memory/job": (20 * GIB, 9 * GIB, GIB)}, 12 * GIB, 20 * GIB),
        ("4:memory:/job", {"memory": (NONE_OF_VERSION_1, 9 * GIB, GIB)}, 48 * GIB, None),
        # in a container: the host's path, which is not there
        ("4:memory:/docker/0af3", {"memory": (20 * GIB, 9 * GIB, GIB)}, 12 * GIB, 20 * GIB),
    ],
)
def test_limits(system, line, groups, free, limit):
    system(line, groups)
    assert (free_memory.free_bytes(), free_memory.limit_bytes()) == (free, limit)


def test_this_machine(tmp_path, monkeypatch):
    assert 0 < free_memory.free_bytes() <= free_memory.memory_bytes()
    monkeypatch.setattr(free_memory, "_GROUPS", tmp_path / "none")
    monkeypatch.setattr(free_memory, "_MACHINE", tmp_path / "none")
    assert free_memory.free_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
