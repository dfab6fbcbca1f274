# SPDX-License-Identifier: Apache-2.0
"""Read the weights of Savanna, the framework that Evo 2 was trained with, under our names.

A file of ``torch.save`` holds either the state dict itself or, beside bookkeeping, the state dict in ``module``. Keys
may begin with ``module.``. A model that was split over processes has one such file for each.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from evo2_megatron.architectures import Architecture
from evo2_megatron.checkpoint.fp8_state import read_scales
from evo2_megatron.checkpoint.names import is_weight
from evo2_megatron.checkpoint.savanna_files import SavannaFiles
from evo2_megatron.checkpoint.tensors import StoredTensor, one_below_another, side_by_side
from evo2_megatron.checkpoint.torch_file import JoinedFile, read_torch_file, whole_files
from evo2_megatron.checkpoint.translate import Weights, named_tensors, to_ours
from evo2_megatron.checkpoint.vortex import check_frequencies
from evo2_megatron.config import UserError

logger = logging.getLogger(__name__)

_FILTER_LENGTH = 128
_UNUSED = (".filter.t", ".post_attention_layernorm.weight", ".outer_mlp_layernorm.weight")
_FP8_STATE = "mixer.dense_projection._extra_state"
_FREQUENCIES = ".rotary_emb.inv_freq"
_SPLIT_BY_ROWS = re.compile(
    r".*\.(word_embeddings\.weight|final_linear\.weight|mixer\.dense_projection\.weight|mlp\.w[12]\.weight"
    r"|hyena_proj_conv\.short_conv_weight|short_conv\.short_conv_weight|mixer\.conv_bias"
    r"|filter\.(decay|gamma|h|p|R))"
)
_SPLIT_BY_COLUMNS = re.compile(r".*\.(mixer\.dense\.weight|mlp\.w3\.weight)")


def read_savanna(files: SavannaFiles, architecture: Architecture) -> Weights:
    """Find a model's weights; their values are read when they are needed.

    Args:
        files: Where they are.
        architecture: Row of the size table.

    Raises:
        UserError: A file is damaged or holds something else; tensors are missing, unknown or of another shape.
    """
    source = str(files.ranks[0][0])
    loaded = [_load(whole_files(parts), str(parts[0])) for parts in files.ranks]
    states = [{name: value for name, value in state.items() if is_weight(name)} for state in loaded]
    state = states[0] if len(states) == 1 else _merged(states, source)
    weights = _without_unused(state, architecture.num_layers)
    has_head = any(name.endswith(".final_linear.weight") for name in weights)
    architecture = replace(architecture, tied_embeddings=not has_head)
    ours = to_ours(weights, architecture, "savanna", source=source)
    for name, tensor in state.items():
        if name.endswith(_FREQUENCIES):
            check_frequencies(tensor, architecture, source=f"{source}: {name}")
    entries = {i: f"sequential.{i + 2}.{_FP8_STATE}" for i, s in enumerate(architecture.pattern) if s != "*"}
    # Transformer Engine takes one maximum over all ranks
    return Weights(architecture, weights, ours, read_scales(loaded[0], entries))


def _load(file: JoinedFile, name: str) -> dict[str, Any]:
    loaded = read_torch_file(file, name)
    state = loaded.get("module", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{name} holds no state dict, by itself or in 'module'; give a Savanna checkpoint of a model")
    named = named_tensors(state, source=name, wanted="a Savanna checkpoint of a model")
    renamed = {key.removeprefix("module."): value for key, value in named.items()}
    if len(renamed) < len(named):
        twice = next(key for key in renamed if f"module.{key}" in named and key in named)
        raise UserError(f"{name} has {twice} twice, with and without 'module.'; save a state dict that has it once")
    return renamed


def _merged(states: Sequence[Mapping[str, StoredTensor]], source: str) -> dict[str, StoredTensor]:
    """Join what model parallelism split; the files are in the order of the ranks."""
    for rank, state in enumerate(states):
        different = sorted(state.keys() ^ states[0].keys())
        if different:
            raise UserError(
                f"rank {rank} and rank 0 of {source} do not hold the same tensors, e.g. {different[0]}; "
                "check that the files belong to one checkpoint"
            )
    merged = {}
    for name in states[0]:
        parts = [state[name] for state in states]
        if _SPLIT_BY_ROWS.fullmatch(name):
            join, axis = one_below_another, 0
        elif _SPLIT_BY_COLUMNS.fullmatch(name):
            join, axis = side_by_side, 1
        else:
            merged[name] = _same_on_all_ranks(parts, f"{source}: {name}")
            continue
        kinds = {(part.dtype, part.shape[:axis], part.shape[axis + 1 :]) for part in parts}
        if len(kinds) > 1 or len(parts[0].shape) <= axis:
            raise UserError(f"the parts of {name} do not fit together; check that the files belong to one checkpoint")
        merged[name] = join(parts)
    return merged


def _same_on_all_ranks(parts: Sequence[StoredTensor], name: str) -> StoredTensor:
    """Norms and biases are kept by every rank; training may let their last bits drift apart."""
    if any(part.shape != parts[0].shape for part in parts):
        raise UserError(f"{name} has another shape on another rank; check that the files belong to one checkpoint")
    if parts[0].nbytes == 0 or not parts[0].shape:
        return parts[0]  # no weight, which is told when all are joined
    first = parts[0].read().double()
    for part in parts[1:]:
        distance = (part.read().double() - first).abs().max().item()
        if distance > 0.01 * first.abs().max().item():
            raise UserError(f"{name} differs between ranks by {distance:.2g}; the files are not of one checkpoint")
        if distance > 0:
            logger.warning("%s differs between ranks by %.2g; taking that of rank 0", name, distance)
    return parts[0]


def _first_columns(tensor: StoredTensor) -> StoredTensor:
    """What the model uses of a filter, read row by row: with a million columns, all rows would be gigabytes."""

    def read_rows(start: int, stop: int) -> Tensor:
        return torch.cat([tensor.read_rows(row, row + 1)[:, :_FILTER_LENGTH] for row in range(start, stop)])

    return StoredTensor((tensor.shape[0], min(tensor.shape[1], _FILTER_LENGTH)), tensor.dtype, read_rows)


def _without_unused(state: Mapping[str, StoredTensor], num_layers: int) -> dict[str, StoredTensor]:
    """Leave out buffers and norms that the model does not use, and cut filters to the columns that it does."""
    weights = {}
    for name, tensor in state.items():
        if name.endswith((".filter.h", ".filter.decay")) and len(tensor.shape) == 2:
            weights[name] = _first_columns(tensor)
        elif not name.endswith((_FREQUENCIES, *_UNUSED)):
            weights[name] = tensor
    # the file of the 20B model has one pipeline step less before its last norm
    norm, usual = (f"sequential.{num_layers + step}.norm.weight" for step in (2, 3))
    if norm in weights and usual not in weights:
        weights[usual] = weights.pop(norm)
    return weights
