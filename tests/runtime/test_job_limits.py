# SPDX-License-Identifier: Apache-2.0
"""Memory and cores where a container or a job has limits, by the files of control groups of both versions."""

import os

import pytest
import torch

from evo2_megatron.runtime import job_limits

GIB = 2**30
NONE_OF_VERSION_1 = 2**63 - 4096
"""What version 1 has for no limit."""


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Files of a machine with 64 GiB, 48 of them free, and a process in the group that it is given."""
    monkeypatch.setattr(job_limits, "_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(job_limits, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(job_limits, "_MOUNT", tmp_path / "mount")
    monkeypatch.setattr(job_limits, "memory_bytes", lambda: 64 * GIB)
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable: {48 * 2**20} kB\n")

    def make(line, groups):
        names = job_limits._MEMORY[2 if line.startswith("0::") else 1]
        (tmp_path / "cgroup").write_text(f"12:blkio:/elsewhere\n{line}\n")
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
    assert (job_limits.free_bytes(), job_limits.limit_bytes()) == (free, limit)


@pytest.mark.parametrize(
    "line, files, cores",
    [
        ("0::/", {}, None),
        ("0::/pod/one", {"pod/cpu.max": "max 100000", "pod/one/cpu.max": "200000 100000"}, 2),
        ("0::/pod/one", {"pod/cpu.max": "150000 100000", "pod/one/cpu.max": "800000 100000"}, 2),
        ("0::/pod", {"pod/cpu.max": "20000 100000"}, 1),
        ("0::/pod", {"pod/cpu.max": "1600000 100000"}, None),
        ("3:cpu,cpuacct:/x", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu,cpuacct:/x", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_cores(system, tmp_path, monkeypatch, line, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    system(line, {})
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert job_limits.limit_cores() == cores
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert job_limits.threads() == min(cores or 8, 8)


def test_this_machine(tmp_path, monkeypatch):
    assert 0 < job_limits.free_bytes() <= job_limits.memory_bytes()
    monkeypatch.setattr(job_limits, "_GROUPS", tmp_path / "none")
    monkeypatch.setattr(job_limits, "_MACHINE", tmp_path / "none")
    assert job_limits.free_bytes() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
