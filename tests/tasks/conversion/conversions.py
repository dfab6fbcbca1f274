# SPDX-License-Identifier: Apache-2.0
"""What the tests of the three converters share: a small model's weights, and what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from evo2_megatron.architectures import architecture
from evo2_megatron.checkpoint import distcp
from evo2_megatron.checkpoint.names import is_kept_in_float32
from evo2_megatron.data.tokenizer import tokenizer_dir
from evo2_megatron.tasks.conversion.convert import Result
from parity.vortex_model import random_weights

TINY = architecture("evo2_tiny")
WEIGHTS = {name: value.bfloat16() for name, value in random_weights(TINY).items()}


def new_result(folder: Path) -> Result:
    """What to convert to: the folder ``mbridge`` in another one; without the numbers that a self-test needs."""
    return Result(directory=folder / "mbridge", tokenizer=tokenizer_dir(512), model_size="evo2_tiny", self_test=False)


def left_behind(result: Result) -> list[Path]:
    """The result and whatever was written beside it."""
    return list(result.directory.parent.glob("mbridge*"))


def save(value: Any, path: Path) -> str:
    """``torch.save``; returns the path."""
    torch.save(value, path)
    return str(path)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    index = distcp.read_index(folder)
    names = {name: name for name in distcp.tensor_entries(index)}
    return {name: tensor.read() for name, tensor in distcp.stored_tensors(folder, index, names).items()}


def assert_weights(folder: Path, expected: dict[str, torch.Tensor] = WEIGHTS) -> None:
    """A checkpoint holds these weights, bit by bit, in the formats that a converter writes."""
    found = stored(folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype is (torch.float32 if is_kept_in_float32(name) else torch.bfloat16), name
        assert torch.equal(found[name].float(), value.float()), name
