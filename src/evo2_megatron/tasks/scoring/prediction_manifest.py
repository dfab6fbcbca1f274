# SPDX-License-Identifier: Apache-2.0
"""What made a folder of predictions, for whoever finds it later."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from evo2_megatron.checkpoint import checksums
from evo2_megatron.checkpoint.load import LoadedModel
from evo2_megatron.config import UserError
from evo2_megatron.runtime import megatron

_PACKAGES = ("evo2-megatron", "torch", "megatron-core", "megatron-bridge", "transformer-engine", "numpy")


class CheckpointDigest:
    """SHA-256 of a checkpoint's files, computed and compared with its ``SHA256SUMS`` while the model runs."""

    def __init__(self, folder: Path) -> None:
        """Begin; reading goes on beside the program."""
        self._folder = folder
        self._result = ""
        self._error: OSError | UserError | None = None
        self._thread = threading.Thread(target=self._compute, daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        try:
            sums = sha256_of_files(self._folder)
            checksums.compare(self._folder, {name.removeprefix("./"): found for name, found in sums.items()})
            self._result = sha256_of_folder(sums)
        except (OSError, UserError) as error:
            self._error = error

    def check(self) -> None:
        """Raise, without waiting, what ``result`` would, if that is known by now."""
        if self._error is not None:
            raise self._error

    def result(self) -> str:
        """Wait for it.

        Raises:
            UserError: Weights are others than those that were written.
        """
        self._thread.join()
        self.check()
        return self._result


def sha256_of_files(folder: Path) -> dict[str, str]:
    """What ``find . -type f | LC_ALL=C sort | xargs sha256sum`` prints in a folder, by name."""
    names = sorted(f"./{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file())
    return {name: checksums.sha256_of_file(folder / name) for name in names}


def sha256_of_folder(sums: Mapping[str, str]) -> str:
    """What ``sha256sum`` makes of those lines."""
    return hashlib.sha256("".join(f"{found}  {name}\n" for name, found in sums.items()).encode()).hexdigest()


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
        "quantize_weights": provider.quantize_weights,
        "device": torch.cuda.get_device_name() if megatron.on_cuda() else f"CPU ({platform.machine()})",
        "settings": settings,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # Transformer Engine is there on GPUs only
    # its own word for itself also says which CUDA it was built for
    return found | {"torch": torch.__version__}


def as_json(value: Any) -> Any:
    """Settings, given as dataclasses, in what JSON knows."""
    if hasattr(value, "__dataclass_fields__"):
        return as_json(asdict(value))
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value
