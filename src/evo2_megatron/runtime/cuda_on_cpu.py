# SPDX-License-Identifier: Apache-2.0
"""Let Megatron's CUDA call sites run on a machine without a GPU. Installed by ``runtime.megatron.enter`` only there.

Megatron asks ``torch.cuda`` for devices, streams, events, random states and memory in some 360 places, and allocates
with ``device="cuda"``. Here the device is the CPU, streams and events are ordered by program order, the random state
is the CPU generator's, and memory figures are the process's own. ``torch.cuda.is_available()`` stays False.

The factory functions are wrapped one by one: a ``TorchFunctionMode`` would do the same in ten lines but costs a Python
call for every tensor operation, a third of the time of decoding one token.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "as_tensor", "asarray", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace",
    "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros",
    "zeros_like",
)  # fmt: skip
_TENSOR_METHODS = ("to", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _to_cpu(device: Any) -> Any:
    if isinstance(device, int):
        return _CPU
    if isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda":
        return _CPU
    return device


@contextlib.contextmanager
def on_device(name: str) -> Iterator[None]:
    """Let another device than the CPU stand for the GPU meanwhile: ``meta``, to plan."""
    global _CPU
    before, _CPU = _CPU, torch.device(name)
    try:
        yield
    finally:
        _CPU = before


def _on_cpu(function: Callable) -> Callable:
    """Wrap a tensor factory or method: a CUDA device among its arguments becomes the CPU, pinned memory plain."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # there is nothing to copy to
        # Tensor.to(device) and Module.to(device) take it by position
        if len(args) > 1 and isinstance(args[1], (str, torch.device)):
            args = (args[0], _to_cpu(args[1]), *args[2:])
        return function(*args, **kwargs)

    return wrapper


class _Event:
    """What has been recorded has already happened: the CPU runs in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, later: _Event) -> float:
        """Milliseconds, as ``torch.cuda.Event`` gives them."""
        return (later._seconds - self._seconds) * 1e3

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass


class _Stream:
    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


def _resident_bytes(device: Any = None) -> int:
    """Memory that the process holds now."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except FileNotFoundError:  # macOS has no /proc: the peak is the nearest figure that it gives, in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _peak_resident_bytes(device: Any = None) -> int:
    """Most memory that the process has held so far."""
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    # the kernel brings its record up to date now and then, not at every page
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, _resident_bytes())


def _memory_stats(device: Any = None) -> dict[str, int]:
    now, peak = _resident_bytes(), _peak_resident_bytes()
    return {
        "allocated_bytes.all.current": now,
        "allocated_bytes.all.peak": peak,
        "reserved_bytes.all.current": now,
        "reserved_bytes.all.peak": peak,
    }


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _get_rng_state(device: Any = "cuda", *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def install() -> None:
    """Put the stand-ins in place, for the rest of the process and its forked children."""
    # first, because importing Megatron imports Dynamo, which catalogues torch's functions and refuses to find one
    # twice
    _install_megatron_rng()
    _install_torch_cuda()
    _install_factories()
    _install_tensor_type_names()
    # a forked child that enters an OpenMP region after its parent has done so never comes back
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def _install_torch_cuda() -> None:
    cuda = torch.cuda
    for name in (
        "check_error", "empty_cache", "ipc_collect", "manual_seed_all", "reset_peak_memory_stats", "set_device",
        "set_stream", "synchronize",
    ):  # fmt: skip
        setattr(cuda, name, _nothing)
    cuda.current_device = lambda: _CPU
    # must be above 0, or Megatron keeps no random states; one "device" per process on this machine
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.current_stream = cuda.default_stream = lambda *args: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.get_rng_state, cuda.set_rng_state = _get_rng_state, _set_rng_state
    cuda.memory_allocated = cuda.memory_reserved = _resident_bytes
    cuda.max_memory_allocated = cuda.max_memory_reserved = _peak_resident_bytes
    cuda.memory_stats = _memory_stats
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing


def _install_factories() -> None:
    # ``with torch.device("meta")`` knows the factories by identity, from a list made at its first use: make it now
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _TENSOR_METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    torch.nn.Module.to = _on_cpu(torch.nn.Module.to)
    torch.nn.Module.to_empty = _on_cpu(torch.nn.Module.to_empty)
    torch.nn.Module.cuda = torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _install_tensor_type_names() -> None:
    """Megatron's optimizers accept a parameter by its type's name, ``torch.cuda.<...>Tensor``."""
    tensor_type = torch.Tensor.type

    def reported_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        name = tensor_type(self).replace("meta.", "")
        return name if "cuda" in name else name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = reported_type
    # Bridge and core build small tensors through these old constructors
    torch.cuda.FloatTensor, torch.cuda.IntTensor = torch.FloatTensor, torch.IntTensor
    torch.cuda.LongTensor, torch.cuda.ByteTensor = torch.LongTensor, torch.ByteTensor


def _install_megatron_rng() -> None:
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
