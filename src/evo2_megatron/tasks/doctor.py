# SPDX-License-Identifier: Apache-2.0
"""What this machine has, what of it is used, what is missing, and the command that mends it.

Only the standard library and, if it is there, ``packaging`` are imported here, so that a broken installation can still
be looked at; everything else is loaded and run by ``doctor_probe``, in a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import VOCAB_SIZES, tokenizer_dir
from evo2_megatron.runtime import job_limits
from evo2_megatron.runtime.distributed import check_loopback
from evo2_megatron.tasks.doctor_probe import STAGES

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PROJECT = "evo2-megatron"
REBUILD = "./.ci_build.sh, in the project's folder"
START_OVER = "rm -rf .venv && ./.ci_build.sh, in the project's folder"

_LOOPBACK = "loopback"
_FP8_CAPABILITY = [8, 9]
_LARGEST_DIFFERENCE = 1e-3
"""Of logits, in units of their standard deviation; GPUs may round products to TF32."""
_SMALL_SHARED_MEMORY = 1 << 30  # Docker gives 64 MB unless told otherwise
_FREE_DISK = 30e9  # a 7B checkpoint and what it is converted from
_PROBE_SECONDS = 600
_NVIDIA_SMI_SECONDS = 60


class Finding(NamedTuple):
    """One line of the report."""

    topic: str
    name: str
    status: Literal["ok", "note", "problem"]
    text: str
    fix: str | None = None
    """A command, or what to do."""


def examine() -> list[Finding]:
    """Look at everything; takes as long as loading Megatron."""
    findings = [*_machine(), *_packages(), *_files()]
    probed, failure = _probe()
    has_gpu = any(finding.name == "GPU" and finding.status == "ok" for finding in findings)
    # what no new installation would mend
    fix = next((finding.fix for finding in findings if finding.name == _LOOPBACK), START_OVER)
    return [*findings, *_parts(probed, failure, has_gpu=has_gpu, fix=fix)]


def _machine() -> Iterator[Finding]:
    version = platform.python_version()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 12)
    fix = None if supported else f"PYTHON=python3.12 {REBUILD}"
    yield Finding("machine", "Python", "ok" if supported else "problem", f"{version}, {sys.executable}", fix)
    is_known = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    memory = f"{job_limits.memory_bytes() / 2**30:.0f} GiB memory"
    text = f"{platform.system()} {platform.machine()}, {job_limits.cores()} cores, {memory}{_limits()}"
    fix = None if is_known else "use Linux on x86-64 or ARM64"
    yield Finding("machine", "system", "ok" if is_known else "problem", text, fix)
    gpus = _gpus()
    if gpus:
        yield Finding("machine", "GPU", "ok", "; ".join(gpus))
    elif gpus is None:
        text = f"nvidia-smi says nothing within {_NVIDIA_SMI_SECONDS} s"
        yield Finding("machine", "GPU", "problem", text, "reset the GPU, or restart the machine")
    else:
        yield Finding("machine", "GPU", "note", "nvidia-smi shows none: everything runs on the CPU")
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    if shared < _SMALL_SHARED_MEMORY:
        text = f"/dev/shm has {shared / 1e6:.0f} MB: processes that load data may stop with a bus error"
        yield Finding(
            "machine", "shared memory", "problem", text, "start the container with --ipc=host or --shm-size=8g"
        )
    try:
        check_loopback()
    except UserError as error:
        text, _, fix = str(error).partition("; ")
        yield Finding("machine", _LOOPBACK, "problem", text, fix)
    for name, why in (("cc", "kernels that Triton compiles"), ("nvcc", "Transformer Engine")) if gpus else ():
        found = shutil.which(name)
        status, fix = ("ok", None) if found else ("note", f"install {name}; it is needed to build {why}")
        yield Finding("machine", name, status, found or "not on the PATH", fix)


def _limits() -> str:
    cores, memory = job_limits.limit_cores(), job_limits.limit_bytes()
    parts = [] if cores is None else [f"the time of {cores} of them"]
    parts += [] if memory is None else [f"{memory / 2**30:.1f} GiB"]
    return f"; this container or job may take {' and '.join(parts)}" if parts else ""


def _gpus() -> list[str] | None:
    """Name, memory and driver of each GPU that nvidia-smi shows; None: it hangs."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.splitlines() if done.returncode == 0 else []


def _packages() -> Iterator[Finding]:
    """What the installed project asks for, without its extras, beside what is there."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(text) for text in metadata.requires(PROJECT) or ()]
    except ImportError as error:  # that of a package without metadata, too
        text = f"not installed, so that what else is missing cannot be told: {error}"
        yield Finding("packages", error.name or PROJECT, "problem", text, START_OVER)
        return
    wanted = [requirement for requirement in wanted if not requirement.marker or requirement.marker.evaluate()]
    right = 0
    for requirement in [*wanted, Requirement("megatron-bridge")]:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("packages", requirement.name, "problem", "not installed", _install(requirement))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            right += 1
        else:
            text = f"{version} is installed, {requirement.specifier} is needed"
            yield Finding("packages", requirement.name, "problem", text, _install(requirement))
    text = f"{metadata.version(PROJECT)}; {right} of the {len(wanted) + 1} packages that it needs are here and right"
    yield Finding("packages", PROJECT, "ok", text)


def _install(requirement: Requirement) -> str:
    """The command that installs it and nothing that it must not bring."""
    if requirement.name == "megatron-bridge":
        return f"{sys.executable} -m pip install --no-deps -r requirements-no-deps.txt, or {REBUILD}"
    return (
        f"{sys.executable} -m pip install -c constraints.txt '{requirement.name}{requirement.specifier}', or {REBUILD}"
    )


def _files() -> Iterator[Finding]:
    missing = [size for size in VOCAB_SIZES if not (tokenizer_dir(size) / "tokenizer.json").is_file()]
    text = f"{tokenizer_dir().parent} has no tokenizer of {missing} tokens" if missing else f"{tokenizer_dir().parent}"
    yield Finding("files", "tokenizers", "problem" if missing else "ok", text, REBUILD if missing else None)
    program = shutil.which("torchrun")
    same = program is not None and Path(program).parent == Path(sys.executable).parent
    text = f"{program}" if program else "not on the PATH"
    fix = None if same else "source .ci_test_env.sh: torchrun must come from this environment"
    yield Finding("files", "torchrun", "ok" if same else "problem", text, fix)
    yield _downloads()


def _downloads() -> Finding:
    """Where huggingface_hub puts what it downloads, and whether there is room."""
    cache = _hub_cache()
    # os.path: without permission to look, there is nothing
    existing = next(folder for folder in (cache, *cache.parents) if os.path.isdir(folder))  # noqa: PTH112
    free, fix = shutil.disk_usage(existing).free, None
    text = f"{cache}, {free / 1e9:.0f} GB free"
    if not os.access(existing, os.W_OK | os.X_OK):
        text += f"; no permission to write in {existing}"
        fix = "set HF_HOME to a folder that you may write to before converting from Hugging Face"
    elif free < _FREE_DISK:
        fix = "set HF_HOME to a folder on a larger disk before converting 7B or more"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        text += "; HF_HUB_OFFLINE is set: nothing is downloaded"
    return Finding("files", "downloads", "note" if fix else "ok", text, fix)


def _hub_cache() -> Path:
    """As huggingface_hub finds it, also where nobody has a home."""
    home = os.environ.get("HF_HOME")
    if home is None:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")  # noqa: PTH118
    # what cannot be expanded stays as it is; Path.expanduser raises
    return Path(os.path.expandvars(os.path.expanduser(home))).absolute()  # noqa: PTH111


def _probe() -> tuple[dict[str, dict[str, Any]], str | None]:
    """What each stage said, and why the first that said nothing did not."""
    command = [sys.executable, "-m", "evo2_megatron.tasks.doctor_probe"]
    # one process by itself: as one of a job, it would wait for the others
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, env=alone)
    except subprocess.TimeoutExpired as error:
        stdout, failure = (error.stdout or b"").decode(), f"nothing after {_PROBE_SECONDS} s"
    else:
        stdout, failure = done.stdout, None
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            failure = last[0].strip() if last else f"the process ended with status {done.returncode}"
    lines = [json.loads(line) for line in stdout.splitlines() if line.startswith('{"stage"')]
    return {line["stage"]: line for line in lines}, failure


def _parts(
    probed: dict[str, dict[str, Any]], failure: str | None, *, has_gpu: bool, fix: str = START_OVER
) -> Iterator[Finding]:
    """What of the machine is used; ``fix`` is for the first part that cannot be."""
    if "torch" in probed:
        yield _torch(probed["torch"], has_gpu=has_gpu)
    if "bridge" in probed:
        yield from _bridge(probed["bridge"])
    if "kernels" in probed:
        yield from _kernels(probed["kernels"], probed["torch"])
    if "model" in probed:
        yield _model(probed["model"])
    failed = next((stage for stage in STAGES if stage not in probed), None)
    if failed is not None:
        what = {"torch": "torch", "bridge": "Megatron Bridge", "kernels": "kernels", "model": "evo2_tiny"}[failed]
        yield Finding("parts", what, "problem", f"cannot be used: {failure}", fix)


def _torch(torch: dict[str, Any], *, has_gpu: bool) -> Finding:
    if torch["on_cuda"]:
        gpus = ", ".join(f"{gpu['name']} ({gpu['memory'] / 2**30:.0f} GiB)" for gpu in torch["gpus"])
        return Finding("parts", "torch", "ok", f"{torch['version']} computes on {gpus}")
    text = f"{torch['version']} computes on the CPU ({torch['cpu']}, {torch['threads']} threads)"
    if not has_gpu:
        return Finding("parts", "torch", "ok", text)
    if torch["cuda"] is None:
        return Finding("parts", "torch", "problem", f"{text}: a CPU build, though there is a GPU", START_OVER)
    reason = f"{text}, though there is a GPU: its driver is too old for CUDA {torch['cuda']}, or it is hidden"
    return Finding("parts", "torch", "problem", reason, "update the driver, and look at CUDA_VISIBLE_DEVICES")


def _bridge(bridge: dict[str, Any]) -> Iterator[Finding]:
    versions = ", ".join(_with_version(name) for name in ("megatron-bridge", "megatron-core"))
    yield Finding("parts", "Megatron", "ok", f"{versions}, loaded in {bridge['seconds']:.1f} s")
    if not bridge["dataset_index"]:
        text = "megatron-core has no compiled dataset index: training on indexed datasets stops"
        fix = f"{sys.executable} -m pip install --force-reinstall --no-deps -c constraints.txt megatron-core"
        yield Finding("parts", "dataset index", "problem", text, fix)


def _with_version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:  # a problem already, among the packages
        return f"{name} of unknown version"


def _kernels(kernels: dict[str, Any], torch: dict[str, Any]) -> Iterator[Finding]:
    on_cuda = torch["on_cuda"]
    for module, reason in kernels["reasons"].items():
        name = module.split(".")[0]
        if reason is None:
            used = on_cuda and kernels["transformer_engine_used"] and name == "transformer_engine"
            text = "norms, linear layers and attention" if used else "installed; not called here"
            yield Finding("kernels", name, "ok" if used else "note", text)
        elif on_cuda:
            status = "problem" if name == "transformer_engine" else "note"
            yield Finding("kernels", name, status, f"cannot be loaded: {reason}", START_OVER)
        else:
            yield Finding(
                "kernels", name, "note", "absent, and not needed without a GPU: torch's own products are used"
            )
    capable = [gpu for gpu in torch["gpus"] if gpu["capability"] >= _FP8_CAPABILITY]
    usable = bool(capable) and kernels["transformer_engine_used"]
    text = (
        "precision recipes with FP8"
        if usable
        else "by --fp8-emulation only: it takes a GPU of capability 8.9 or newer"
    )
    yield Finding("kernels", "FP8", "ok" if usable else "note", text)
    backend = "NCCL" if on_cuda and torch["nccl"] else "Gloo" if torch["gloo"] else None
    text = f"{backend} between processes" if backend else "torch has neither NCCL nor Gloo"
    yield Finding("kernels", "communication", "ok" if backend else "problem", text, None if backend else START_OVER)


def _model(model: dict[str, Any]) -> Finding:
    right = model["difference"] < _LARGEST_DIFFERENCE
    text = (
        f"evo2_tiny's logits of {model['tokens']} tokens on {model['device']} "
        f"{'are those of' if right else 'DIFFER from'} the slow reference (by {model['difference']:.1e})"
    )
    fix = None if right else "do not trust results of this machine; report this, with the whole output"
    return Finding("parts", "model", "ok" if right else "problem", text, fix)
