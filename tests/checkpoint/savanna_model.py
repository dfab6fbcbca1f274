# SPDX-License-Identifier: Apache-2.0
"""Savanna files as Arc publishes them, made of small random weights; names spelled out again, apart from our table."""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch
from torch import Tensor

from evo2_megatron.architectures import Architecture

SEQ_LENGTH = 256
"""Columns of the medium filters, of which 128 are used."""


def savanna_state(weights: dict[str, Tensor], architecture: Architecture) -> dict:
    """A state dict by Savanna's names.

    Args:
        weights: By our names.
        architecture: Describes them.
    """
    last = architecture.num_layers + 3
    state: dict = {"sequential.0.word_embeddings.weight": weights["embedding.word_embeddings.weight"]}
    for i, symbol in enumerate(architecture.pattern):
        layer = {
            name.removeprefix(f"decoder.layers.{i}."): value
            for name, value in weights.items()
            if name.startswith(f"decoder.layers.{i}.")
        }
        theirs = _attention(layer, architecture) if symbol == "*" else _hyena(layer, symbol)
        theirs["pre_mlp_layernorm.weight"] = layer["mlp.linear_fc1.layer_norm_weight"]
        theirs["mlp.w1.weight"], theirs["mlp.w2.weight"] = layer["mlp.linear_fc1.weight"].chunk(2)
        theirs["mlp.w3.weight"] = layer["mlp.linear_fc2.weight"]
        # there, and not used
        theirs["post_attention_layernorm.weight"] = torch.ones(architecture.hidden_size)
        theirs["outer_mlp_layernorm.weight"] = torch.ones(architecture.hidden_size)
        theirs["mixer.dense_projection._extra_state"] = io.BytesIO(b"FP8 history")
        state |= {f"sequential.{i + 2}.{name}": value for name, value in theirs.items()}
    state[f"sequential.{last}.norm.weight"] = weights["decoder.final_norm.weight"]
    if not architecture.tied_embeddings:
        state[f"sequential.{last + 1}.final_linear.weight"] = weights["output_layer.weight"]
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def _attention(layer: dict[str, Tensor], architecture: Architecture) -> dict:
    head_size = architecture.hidden_size // architecture.num_heads
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    theirs = {
        "input_layernorm.weight": layer["self_attention.linear_qkv.layer_norm_weight"],
        "mixer.dense_projection.weight": layer["self_attention.linear_qkv.weight"],
        "mixer.dense.weight": layer["self_attention.linear_proj.weight"],
        "mixer.rotary_emb.inv_freq": (1.0 / architecture.rotary_base**exponent).bfloat16(),
    }
    if architecture.attention_output_bias:
        theirs["mixer.dense.bias"] = layer["self_attention.linear_proj.bias"]
    return theirs


def _hyena(layer: dict[str, Tensor], symbol: str) -> dict:
    theirs = {name: value for name, value in layer.items() if name.startswith("mixer.")}
    theirs["input_layernorm.weight"] = theirs.pop("mixer.dense_projection.layer_norm_weight")
    for name in ("h", "decay") if symbol == "D" else ():
        short = theirs[f"mixer.mixer.filter.{name}"]
        theirs[f"mixer.mixer.filter.{name}"] = torch.cat([short, torch.zeros(len(short), SEQ_LENGTH - 128)], dim=1)
    if symbol == "H":
        theirs["mixer.mixer.filter.t"] = torch.arange(SEQ_LENGTH)[None, None].float()
    return theirs


def split(state: dict, num_ranks: int) -> list[dict]:
    """What each model-parallel rank has; the axes of Savanna's own resharding tool."""
    ranks: list[dict] = [{} for _ in range(num_ranks)]
    for name, value in state.items():
        if re.search(r"norm\.weight|filter\.t$|inv_freq|dense\.bias|_extra_state", name):
            parts = [value] * num_ranks
        else:
            parts = value.chunk(num_ranks, dim=1 if re.search(r"mixer\.dense\.weight|mlp\.w3", name) else 0)
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.clone() if isinstance(part, Tensor) else part
    return ranks


def save_ranks(state: dict, num_ranks: int, folder: Path) -> None:
    """Write ``mp_rank_*`` files with the bookkeeping that DeepSpeed puts beside the state dict."""
    for rank, part in enumerate(split(state, num_ranks)):
        shapes = {name: value.shape for name, value in part.items() if isinstance(value, Tensor)}
        saved = {"module": part, "param_shapes": [shapes], "dp_world_size": 1, "global_steps": 10}
        torch.save(saved, folder / f"mp_rank_{rank:02d}_model_states.pt")
