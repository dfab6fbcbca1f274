# SPDX-License-Identifier: Apache-2.0
"""What single modules of a model give for a sequence, under Megatron's names and those of Arc's code.

Shape legend: L tokens, S with padding, X channels of a module's output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evo2_megatron.config import UserError
from evo2_megatron.tasks.scoring.batching import Item
from evo2_megatron.tasks.scoring.prediction_runner import Runner
from evo2_megatron.tasks.server.arrays import MAX_NPZ_VALUES, check_values

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

_ARC_NAMES = (
    (r"embedding_layer", "embedding"),
    (r"blocks\.(\d+)", r"decoder.layers.\1"),
    (r"blocks\.(\d+)\.mlp\.l3", r"decoder.layers.\1.mlp.linear_fc2"),
    (r"norm", "decoder.final_norm"),
    (r"unembed", "output_layer"),
)
"""Arc's name, Megatron's name."""


_WHOLE = r"embedding|decoder\.final_norm|decoder\.layers\.\d+(\.mlp(\.linear_fc2)?)?"
"""Modules whose output every process has, where tensor parallelism splits those of others."""


def module_names(model: StripedHyenaModel, *, whole_only: bool = False) -> list[str]:
    """Names of all modules, or of those alone whose output is not split over processes."""
    names = [name for name, _ in model.named_modules() if name]
    return [name for name in names if re.fullmatch(_WHOLE, name)] if whole_only else names


def megatron_name(name: str) -> str:
    """Megatron's name of a module, from that or from the name in Arc's code."""
    for pattern, replacement in _ARC_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def layer_outputs(runner: Runner, model: StripedHyenaModel, item: Item, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Run one sequence and keep what modules return.

    Args:
        runner: Of logits, so that every module is run.
        model: Its model, without a wrapper.
        item: The sequence.
        names: Of modules, Megatron's.

    Returns:
        For each name float32 [L, 1, X]: tokens, one sequence, channels.

    Raises:
        UserError: A module was not called, or does not return a vector for each token.
        Refused: There are more numbers than an answer may have.
    """
    pieces: dict[str, list[Any]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    num_values = 0

    def keep(name: str) -> Any:
        def hook(_module: torch.nn.Module, _arguments: Any, output: Any) -> None:
            nonlocal num_values
            value = output[0] if isinstance(output, tuple) else output
            num_values += value.numel() if isinstance(value, Tensor) else 0
            check_values(num_values, MAX_NPZ_VALUES, way_out="fewer layers or fewer bases")
            pieces[name].append(value.detach().float().cpu() if isinstance(value, Tensor) else None)

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in pieces]
    try:
        runner([item])
    finally:
        for handle in handles:
            handle.remove()
    return {name: _joined(name, values, len(item["tokens"])) for name, values in pieces.items()}


def _joined(name: str, pieces: Sequence[Any], num_tokens: int) -> np.ndarray:
    whole = None
    if pieces and all(piece is not None and piece.dim() == 3 and piece.shape[1] == 1 for piece in pieces):
        whole = torch.cat(list(pieces))
    if whole is None or len(whole) < num_tokens:
        raise UserError(f"output_layers: {name!r} does not give a vector for each token; ask for another layer")
    return whole[:num_tokens].numpy()
