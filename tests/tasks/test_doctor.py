# SPDX-License-Identifier: Apache-2.0
"""What evo2_doctor finds: on this machine, in broken installations, and on machines that this one is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from evo2_megatron.tasks import doctor

COMMAND = [sys.executable, "-c", "from evo2_megatron.cli.doctor import main; main()"]
H100 = {"name": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "memory": 80 << 30}
TORCH = {
    "version": "2.13.0", "cuda": "13.0", "on_cuda": True, "gpus": [H100], "cpu": "AVX512", "threads": 8, "nccl": True,
    "gloo": True,
}  # fmt: skip
BRIDGE = {"seconds": 5.0, "dataset_index": True}
KERNELS = {
    "reasons": {"transformer_engine.pytorch": None, "subquadratic_ops_torch": None},
    "transformer_engine_used": True,
}
MODEL = {"device": "cuda", "tokens": 256, "difference": 1e-5}
PROBED = {"torch": TORCH, "bridge": BRIDGE, "kernels": KERNELS, "model": MODEL}


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *flags], env=os.environ | environment, capture_output=True, text=True)


def parts(failure: str | None = None, *, has_gpu: bool = True, **changes: dict | None) -> dict[str, doctor.Finding]:
    probed = {name: stage for name, stage in (PROBED | changes).items() if stage is not None}
    return {finding.name: finding for finding in doctor._parts(probed, failure, has_gpu=has_gpu)}


def test_this_machine_is_well(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    # as in a container of a job of several
    of_job = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = run("--json", **of_job)
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert [name for name, finding in found.items() if finding["status"] == "problem"] == [] and done.returncode == 0
    assert "are those of the slow reference" in found["model"]["text"]
    assert found["torch"]["text"].startswith(metadata.version("torch"))


def broken(folder: Path, package: str, source: str) -> str:
    """A folder for PYTHONPATH in which a package is something else."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(source)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_a_library_that_ends_the_process_is_told(tmp_path):
    source = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    done = run(PYTHONPATH=broken(tmp_path, "torch", source))
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "torch                cannot be used: the process ended with status -9" in done.stdout
    assert "mend it: rm -rf .venv" in done.stdout and "1 problem\n" in done.stdout


def test_an_import_that_fails_is_told_with_its_reason(tmp_path):
    source = "raise ImportError('libmegatron.so: undefined symbol')"
    done = run(PYTHONPATH=broken(tmp_path, "megatron", source))
    assert done.returncode == 1
    assert "Megatron Bridge      cannot be used: ImportError: libmegatron.so: undefined symbol" in done.stdout


def test_packages_that_are_absent_or_of_another_version(monkeypatch):
    def version(name: str) -> str:
        if name == "megatron-bridge":
            raise metadata.PackageNotFoundError(name)
        return "9.9" if name == "einops" else real(name)

    real = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    problems = {finding.name: finding for finding in doctor._packages() if finding.status == "problem"}
    assert set(problems) == {"megatron-bridge", "einops"}
    assert problems["einops"].text == "9.9 is installed, ==0.8.1 is needed"
    assert "pip install -c constraints.txt 'einops==0.8.1'" in problems["einops"].fix
    assert "--no-deps -r requirements-no-deps.txt" in problems["megatron-bridge"].fix


@pytest.mark.parametrize("absent", ["packaging", "evo2-megatron"])
def test_what_says_what_is_needed_is_absent(monkeypatch, absent):
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    if absent == "packaging":
        monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    else:
        monkeypatch.setattr(metadata, "requires", requires)
    (finding,) = doctor._packages()
    assert finding.name.startswith(absent) and finding.status == "problem" and finding.fix == doctor.START_OVER
    code = "import sys; sys.modules['packaging'] = None; import evo2_megatron.tasks.doctor"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_megatron_without_its_metadata(monkeypatch):
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "megatron-core of unknown version" in parts()["Megatron"].text


def downloads() -> doctor.Finding:
    (finding,) = [finding for finding in doctor._files() if finding.name == "downloads"]
    return finding


def test_where_downloads_go(monkeypatch, tmp_path):
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "_FREE_DISK", 0)
    assert downloads().status == "ok" and downloads().text.startswith(f"{tmp_path}/.cache/huggingface, ")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert downloads().text.startswith(f"{tmp_path}/cache/huggingface, ")
    monkeypatch.setenv("HF_HOME", "~/hub")
    assert downloads().text.startswith(f"{tmp_path}/hub, ")
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert downloads().status == "note" and f"no permission to write in {tmp_path};" in downloads().text + ";"


def test_nobody_has_no_home(monkeypatch):
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert "huggingface" in downloads().text


def test_a_system_that_cannot_say_which_cores_it_may_use(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("sys.platform", "darwin")
    (finding,) = [finding for finding in doctor._machine() if finding.name == "system"]
    assert finding.status == "problem" and f" {os.cpu_count()} cores, " in finding.text
    assert finding.fix == "use Linux on x86-64 or ARM64"


def test_nvidia_smi_that_hangs(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "_NVIDIA_SMI_SECONDS", 0.1)
    (finding,) = [finding for finding in doctor._machine() if finding.name == "GPU"]
    assert finding.status == "problem" and "restart" in finding.fix


def test_a_gpu_with_everything():
    found = parts()
    assert {finding.status for finding in found.values()} == {"ok", "note"}
    assert found["torch"].text == "2.13.0 computes on NVIDIA H100 80GB HBM3 (80 GiB)"
    assert found["FP8"].status == "ok" and found["communication"].text == "NCCL between processes"


@pytest.mark.parametrize(
    "name, text, fix, changes",
    [
        (
            "torch",
            "a CPU build, though",
            "rm -rf .venv",
            {"torch": TORCH | {"on_cuda": False, "gpus": [], "cuda": None}},
        ),
        ("torch", "driver is too old", "update the driver", {"torch": TORCH | {"on_cuda": False, "gpus": []}}),
        ("dataset index", "no compiled", "--force-reinstall", {"bridge": BRIDGE | {"dataset_index": False}}),
        (
            "transformer_engine",
            "cannot be loaded: OSError: libcudnn",
            "rm -rf .venv",
            {
                "kernels": {
                    "reasons": {"transformer_engine.pytorch": "OSError: libcudnn"},
                    "transformer_engine_used": False,
                }
            },
        ),
        (
            "model",
            "DIFFER from the slow reference (by 1.0e+00)",
            "do not trust",
            {"model": MODEL | {"difference": 1.0}},
        ),
        ("model", "DIFFER from", "do not trust", {"model": MODEL | {"difference": float("nan")}}),
        ("evo2_tiny", "cannot be used: no room", "rm -rf .venv", {"model": None, "failure": "no room"}),
        ("communication", "neither NCCL nor Gloo", "rm -rf .venv", {"torch": TORCH | {"nccl": False, "gloo": False}}),
    ],
)
def test_what_is_wrong_is_told_with_what_mends_it(name, text, fix, changes):
    finding = parts(**changes)[name]
    assert finding.status == "problem" and text in finding.text and fix in finding.fix


def test_an_older_gpu_has_no_fp8():
    old = H100 | {"name": "NVIDIA A100", "capability": [8, 0]}
    assert parts(torch=TORCH | {"gpus": [old]})["FP8"].status == "note"


def test_small_shared_memory_and_a_foreign_torchrun(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_SMALL_SHARED_MEMORY", 1 << 60)
    (finding,) = [f for f in doctor._machine() if f.name == "shared memory"]
    assert finding.status == "problem" and "--ipc=host" in finding.fix
    (tmp_path / "torchrun").write_text("#!/bin/sh\n")
    (tmp_path / "torchrun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = [f for f in doctor._files() if f.name == "torchrun"]
    assert finding.status == "problem" and str(tmp_path) in finding.text


def test_a_machine_that_does_not_reach_itself(monkeypatch):
    """As in a network namespace of its own; a new installation mends nothing."""

    def unreachable(*args, **options):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("evo2_megatron.runtime.distributed.socket.create_connection", unreachable)
    without_model = {name: stage for name, stage in PROBED.items() if name != "model"}
    monkeypatch.setattr(doctor, "_probe", lambda: (without_model, "Unable to find interface for: [127.0.0.1]"))
    found = {finding.name: finding for finding in doctor.examine()}
    assert found["loopback"].text == "127.0.0.1 cannot be reached (Network is unreachable)"
    assert found["loopback"].fix == found["evo2_tiny"].fix
    assert found["loopback"].fix.startswith("bring the loopback interface up, as root: ip link set lo up")


@pytest.mark.parametrize(
    "cores, memory, end",
    [
        (None, None, " GiB memory"),
        (2, None, " GiB memory; this container or job may take the time of 2 of them"),
        (2, 3 << 30, " GiB memory; this container or job may take the time of 2 of them and 3.0 GiB"),
    ],
)
def test_limits_of_a_container(monkeypatch, cores, memory, end):
    from evo2_megatron.runtime import job_limits

    monkeypatch.setattr(job_limits, "limit_cores", lambda: cores)
    monkeypatch.setattr(job_limits, "limit_bytes", lambda: memory)
    (system,) = (finding for finding in doctor._machine() if finding.name == "system")
    assert system.text.endswith(end)
