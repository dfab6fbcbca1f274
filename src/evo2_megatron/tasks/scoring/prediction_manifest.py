# SPDX-License-Identifier: Apache-2.0
"""What made a folder of predictions, for whoever finds it later."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from evo2_megatron.checkpoint.load import LoadedModel
from evo2_megatron.runtime import megatron
from evo2_megatron.tasks.scoring.prediction_parts import sha256_of_file

_PACKAGES = ("evo2-megatron", "torch", "megatron-core", "megatron-bridge", "transformer-engine", "numpy")


class CheckpointDigest:
    """SHA-256 of a checkpoint's files, computed while the model runs."""

    def __init__(self, folder: Path) -> None:
        """Begin; reading goes on beside the program."""
        self._folder = folder
        self._result: str | OSError | None = None
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        try:
            self._result = sha256_of_folder(self._folder)
        except OSError as error:
            self._result = error

    def result(self) -> str:
        """Wait for it."""
        self._thread.join()
        if isinstance(self._result, OSError):
            raise self._result
        return self._result


def sha256_of_folder(folder: Path) -> str:
    """What ``find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum`` prints in it."""
    names = sorted(f"./{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of_file(folder / name)}  {name}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def manifest(loaded: LoadedModel, checkpoint_sha256: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The content of ``manifest.json``: the same whenever the same is computed, so without a time.

    Args:
        loaded: The model.
        checkpoint_sha256: Of its folder; of LoRA adapters, without their base.
        settings: What decides the results besides, as JSON.
    """
    provider = loaded.provider
    names = ("hybrid_override_pattern", "hidden_size", "ffn_hidden_size", "num_attention_heads", "rotary_base")
    return {
        "model": {name: getattr(provider, name) for name in names},
        "checkpoint": {"path": str(loaded.checkpoint.absolute()), "sha256": checkpoint_sha256},
        "precision": loaded.precision,
        "fp8_projections": loaded.fp8_projections,
        "int8_weights": provider.int8_weights,
        "device": torch.cuda.get_device_name() if megatron.on_cuda() else f"CPU ({platform.machine()})",
        "settings": settings,
        # its own word for itself also says which CUDA it was built for
        "versions": {"python": platform.python_version()} | _versions() | {"torch": torch.__version__},
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # Transformer Engine is there on GPUs only
    return found


def as_json(value: Any) -> Any:
    """Settings, given as dataclasses, in what JSON knows."""
    if hasattr(value, "__dataclass_fields__"):
        return as_json(asdict(value))
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value
