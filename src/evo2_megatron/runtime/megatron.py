# SPDX-License-Identifier: Apache-2.0
"""The one gate to Megatron Bridge, with or without Transformer Engine, with or without a GPU.

A task calls ``enter`` before anything imports ``megatron.bridge``, and ``enter_training`` before its training loop or
LoRA. With CUDA and Transformer Engine that changes what is loaded, torch's choice among kernels for attention and the
wheel defect noted below, and nothing else; the rest here is for machines that lack one or the other.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from typing import Any

from evo2_megatron.runtime import job_limits

# megatron-core modules that decide, when imported, whether Transformer Engine exists: they must decide "no" before a
# stand-in for its name is in sys.modules
_TE_DECIDERS = (
    "transformer.attention", "models.gpt", "models.mamba.mamba_layer_specs", "models.T5.t5_spec",
    "models.vision.vit_layer_specs", "optimizer", "distributed", "dist_checkpointing", "pipeline_parallel",
    "models.multimodal", "post_training.modelopt.gpt.model_specs", "extensions.transformer_engine_spec_provider",
    "ssm.mamba_mixer", "models.gpt.experimental_attention_variant_module_specs",
)  # fmt: skip


def on_cuda() -> bool:
    """Whether this process computes on a CUDA device."""
    import torch

    return torch.cuda.is_available()


@functools.cache
def have_transformer_engine() -> bool:
    """Whether Transformer Engine is installed and there is a GPU for it to run on."""
    return on_cuda() and importlib.util.find_spec("transformer_engine") is not None


def device() -> Any:
    """The torch.device that this process computes on."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if on_cuda() else torch.device("cpu")


def device_name() -> str:
    """What this process computes on: the GPU's name, or CPU."""
    import torch

    return torch.cuda.get_device_name() if on_cuda() else "CPU"


@functools.cache
def enter() -> None:
    """Make Megatron Core, and Bridge's model providers and configurations, usable on this machine.

    Further calls do nothing.
    """
    import torch

    if on_cuda():
        # torch prefers cuDNN's attention from Hopper on, which prepares a kernel for each new number of keys, as every
        # decoded token has one: some 30 ms and memory that stays. Transformer Engine calls cuDNN by itself
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        # torch.compile would need a C++ compiler at run time, and cannot trace the stand-ins
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(job_limits.threads())
    for group in _ON_DEMAND:
        for name in reversed(group):  # a package before those in it
            _load_on_demand(name)
    if not on_cuda():
        from evo2_megatron.runtime import cuda_on_cpu

        cuda_on_cpu.install()


@functools.cache
def enter_training() -> None:
    """``enter``, and make Bridge's training loop and LoRA usable, too. Further calls do nothing."""
    enter()
    if importlib.util.find_spec("transformer_engine") is None:
        with warnings.catch_warnings():
            # a dozen times that Transformer Engine and Apex are absent, and that torch is used instead
            warnings.simplefilter("ignore", UserWarning)
            _import_lora_without_transformer_engine()
    _patch_initialize()


_ON_DEMAND = (("megatron.bridge.models", "megatron.bridge"), ("wandb",))
"""Packages that run when somebody needs them, in the order in which those of a group then run."""
_PROVIDERS = {"GPTModelProvider": "gpt_provider", "T5ModelProvider": "t5_provider"}
"""What Bridge's own configurations take from ``megatron.bridge.models``, and the modules in it that define them."""


class _OnDemand(types.ModuleType):
    """A package whose modules can be imported although its own ``__init__`` has not run.

    That of ``megatron.bridge.models`` imports every model that Bridge knows, with transformers, scikit-learn and five
    seconds, of which Evo 2 needs none; megatron-core imports Weights & Biases for an engine that we do not use.
    Whoever asks for another name than those in ``_PROVIDERS`` gets all of it.
    """

    def __getattr__(self, name: str) -> Any:
        if self.__name__ == "megatron.bridge.models" and name in _PROVIDERS:
            return getattr(importlib.import_module(f"{self.__name__}.{_PROVIDERS[name]}"), name)
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        (group,) = (group for group in _ON_DEMAND if self.__name__ in group)
        for module in [sys.modules[package] for package in group]:
            if isinstance(module, _OnDemand):
                module.__class__ = types.ModuleType
                module.__spec__.loader.exec_module(module)
        return getattr(self, name)


def _load_on_demand(name: str) -> None:
    if name in sys.modules or (spec := importlib.util.find_spec(name)) is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _OnDemand
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


class _StandIn(types.ModuleType):
    """A module whose every attribute is an empty class: enough for Bridge's ``class X(te.Y)`` lines at import."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _StandIn(f"{self.__name__}.{name}") if name in ("ops", "pytorch", "optimizers") else type(name, (), {})
        setattr(self, name, value)
        return value


def _import_lora_without_transformer_engine() -> None:
    """megatron.bridge.peft imports Transformer Engine unconditionally (Bridge 0.3.1): satisfy that import, no more.

    Ends when Bridge guards the import as megatron-core does.
    """
    for name in _TE_DECIDERS:
        importlib.import_module(f"megatron.core.{name}")
    names = ("transformer_engine", "transformer_engine.pytorch")
    for name in names:
        module = _StandIn(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__, module.__version__ = [], "0.0.0"
        sys.modules[name] = module
    sys.modules[names[0]].pytorch = sys.modules[names[1]]
    try:
        importlib.import_module("megatron.bridge.peft.lora")
        importlib.import_module("megatron.bridge.peft.canonical_lora")
        for name in ("utils", "module_matcher"):
            # megatron-core's names for Transformer Engine's layers exist, as mocks: these take that for the layers
            importlib.import_module(f"megatron.bridge.peft.{name}").HAVE_TE = False
    finally:
        # nobody else may believe that it is there
        for name in [n for n in sys.modules if n.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]


def _patch_initialize() -> None:
    import megatron.bridge.training.initialize as initialize
    import megatron.bridge.training.setup as setup

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        # it runs make in a folder where the wheel has no Makefile, and ends the process; the wheel ships the result
        initialize.compile_helpers = lambda: None
    if not on_cuda():
        # setup() does not pass this argument on (Bridge 0.3.1)
        setup.initialize_megatron = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
