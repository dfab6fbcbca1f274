# SPDX-License-Identifier: Apache-2.0
"""Copy a checkpoint without its optimizer, scheduler and random state; the weights keep every bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evo2_megatron.checkpoint import layout
from evo2_megatron.checkpoint.distcp import OnBytes, copy_tensors, entry_bytes, read_index, tensor_entries
from evo2_megatron.checkpoint.names import is_weight
from evo2_megatron.checkpoint.torch_file import UNREADABLE, save_tensors
from evo2_megatron.config import UserError


class Stripped(NamedTuple):
    """What a checkpoint takes on disk, in bytes."""

    before: int
    after: int


def kept_tensors(checkpoint: Path) -> dict[str, int]:
    """Names of the weights in a checkpoint, and the bytes that each takes in its files."""
    index = read_index(checkpoint)
    names = [name for name in tensor_entries(index) if is_weight(name)]
    if not names:
        raise UserError(f"{checkpoint} holds no weights of a model; check --src-ckpt-dir")
    return {name: entry_bytes(index, name) for name in names}


def strip_optimizer(checkpoint: Path, target: Path, *, on_bytes: OnBytes = lambda count: None) -> Stripped:
    """Fill an empty folder with a checkpoint's weights, configuration and tokenizer.

    Args:
        checkpoint: One iteration, ``.../iter_0000100``.
        target: An existing empty folder.
        on_bytes: Called as weights are copied.

    Raises:
        UserError: The checkpoint is damaged or holds no weights.
    """
    kept = kept_tensors(checkpoint)
    layout.check_common(checkpoint)
    common = _without_optimizer(checkpoint / layout.COMMON)
    copy_tensors(checkpoint, read_index(checkpoint), {name: name for name in kept}, target, on_bytes=on_bytes)
    # the format's description as the checkpoint has it, in place of the one just written
    for name in (layout.WEIGHTS_FORMAT, layout.TRAIN_STATE, layout.RUN_CONFIG, layout.SELF_TEST):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, target / name)
    if (checkpoint / layout.TOKENIZER).is_dir():
        layout.copy_tokenizer(checkpoint / layout.TOKENIZER, target)
    with open(target / layout.COMMON, "wb") as file:
        save_tensors(common, file)
    return Stripped(folder_bytes(checkpoint), folder_bytes(target))


def _without_optimizer(path: Path) -> dict[str, Any]:
    # known to torch as harmless because Megatron Core, which runtime.megatron imports, says so
    try:
        common = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise UserError(f"{path} is damaged or holds more than plain values ({reason}); copy it again") from None
    if not isinstance(common, dict):
        raise UserError(f"{path} holds no table of values; copy the checkpoint again")
    common = {name: value for name, value in common.items() if name not in ("optimizer", "opt_param_scheduler")}
    if isinstance(common.get("content_metadata"), dict):
        common["content_metadata"] = {
            name: value for name, value in common["content_metadata"].items() if name != "distrib_optim_sharding_type"
        }
    return common


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
