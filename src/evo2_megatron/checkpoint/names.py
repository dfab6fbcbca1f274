# SPDX-License-Identifier: Apache-2.0
"""One table of parameter names: ours (Megatron) and what becomes of them in a Vortex file. Data, no torch.

Ours are the keys of published checkpoints, so they never change. Shapes are written in these symbols:
V embedding rows, H hidden size, F width of one half of the gated MLP, G filter groups; other entries are numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from evo2_megatron.architectures import LAYER_SYMBOLS, Architecture
from evo2_megatron.config import UserError


class Row(NamedTuple):
    """Tensors of ours that are converted together."""

    megatron: dict[str, str]
    """Our name: shape."""

    vortex: tuple[str, ...]
    """Names in a Vortex file; none where Vortex has no place for it."""

    to_vortex: str = "same"
    """Which entry of ``TRANSFORMS`` in ``checkpoint/vortex.py`` turns ours into theirs."""


_MODEL = [Row({"decoder.final_norm.weight": "H"}, ("norm.scale",))]
_TIED = [
    Row({"embedding.word_embeddings.weight": "V H"}, ("embedding_layer.weight", "unembed.weight"), "duplicate"),
]
_UNTIED = [
    Row({"embedding.word_embeddings.weight": "V H"}, ("embedding_layer.weight",)),
    Row({"output_layer.weight": "V H"}, ("unembed.weight",)),
]
_MLP = [
    Row({"mlp.linear_fc1.layer_norm_weight": "H"}, ("post_norm.scale",)),
    # rows 0 to F-1 are the gate, the rest the linear half
    Row({"mlp.linear_fc1.weight": "2F H"}, ("mlp.l1.weight", "mlp.l2.weight"), "halves"),
    Row({"mlp.linear_fc2.weight": "H F"}, ("mlp.l3.weight",)),
]
_HYENA = [
    Row({"mixer.dense_projection.layer_norm_weight": "H"}, ("pre_norm.scale",)),
    Row({"mixer.dense_projection.weight": "3H H"}, ("projections.weight",)),
    Row({"mixer.hyena_proj_conv.short_conv_weight": "3H 3"}, ("filter.short_filter_weight",), "middle_axis"),
    Row({"mixer.dense.weight": "H H"}, ("out_filter_dense.weight",)),
    Row({"mixer.dense.bias": "H"}, ("out_filter_dense.bias",)),
]
_HYENA_SE = [Row({"mixer.mixer.short_conv.short_conv_weight": "G 1 7"}, ("filter.h",))]
_HYENA_SE_BIAS = [Row({"mixer.mixer.conv_bias": "G"}, ())]
_HYENA_MR = [
    Row({"mixer.mixer.conv_bias": "H"}, ("filter.D",)),
    Row({"mixer.mixer.filter.h": "G 128", "mixer.mixer.filter.decay": "G 128"}, ("filter.h",), "decayed_filter"),
]
_HYENA_LI = [
    Row({"mixer.mixer.conv_bias": "H"}, ("filter.D",)),
    Row({"mixer.mixer.filter.p": "H 16", "mixer.mixer.filter.gamma": "H 16"}, ("filter.log_poles",), "log_poles"),
    Row({"mixer.mixer.filter.R": "H 16"}, ("filter.residues",), "float32"),
]
_ATTENTION = [
    Row({"self_attention.linear_qkv.layer_norm_weight": "H"}, ("pre_norm.scale",)),
    # both: per head, 128 rows of q, then of k, then of v
    Row({"self_attention.linear_qkv.weight": "3H H"}, ("inner_mha_cls.Wqkv.weight",)),
    Row({"self_attention.linear_proj.weight": "H H"}, ("inner_mha_cls.out_proj.weight",)),
]
_ATTENTION_BIAS = [Row({"self_attention.linear_proj.bias": "H"}, ("inner_mha_cls.out_proj.bias",))]


def _layer_rows(architecture: Architecture, symbol: str) -> list[Row]:
    kind = LAYER_SYMBOLS[symbol]
    if kind == "attention":
        return _ATTENTION + (_ATTENTION_BIAS if architecture.attention_output_bias else []) + _MLP
    if kind == "hyena_se":
        return _HYENA + _HYENA_SE + (_HYENA_SE_BIAS if architecture.short_conv_bias else []) + _MLP
    return _HYENA + (_HYENA_MR if kind == "hyena_mr" else _HYENA_LI) + _MLP


def rows(architecture: Architecture) -> list[Row]:
    """The table written out for one model: every name with its layer number, in the order of the forward pass."""
    embedding, *output = _TIED if architecture.tied_embeddings else _UNTIED
    table = [embedding]
    for i, symbol in enumerate(architecture.pattern):
        for row in _layer_rows(architecture, symbol):
            ours = {f"decoder.layers.{i}.{name}": shape for name, shape in row.megatron.items()}
            table.append(row._replace(megatron=ours, vortex=tuple(f"blocks.{i}.{name}" for name in row.vortex)))
    return table + _MODEL + output


def parameter_shapes(architecture: Architecture, *, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name and global shape of every tensor in one of our checkpoints.

    Args:
        architecture: Row of the size table.
        vocab_size: Rows of the embedding table, padding included.

    Returns:
        Parameters and the one persistent buffer, ``filter.decay`` (see ``is_trained``).
    """
    hidden, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    sizes = {"V": vocab_size, "H": hidden, "3H": 3 * hidden, "F": ffn, "2F": 2 * ffn, "G": architecture.num_groups}
    return {
        name: tuple(sizes[axis] if axis in sizes else int(axis) for axis in shape.split())
        for row in rows(architecture)
        for name, shape in row.megatron.items()
    }


def is_trained(name: str) -> bool:
    """Whether a name of ours is a parameter; the decay of the medium filter is a buffer."""
    return not name.endswith(".filter.decay")


def without_extra_state(names: Mapping) -> dict:
    """Leave out what Transformer Engine keeps beside its weights: FP8 history, not part of the model."""
    return {name: value for name, value in names.items() if not name.endswith("_extra_state")}


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless both sides have the same names and shapes; nothing is ever ignored."""
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        examples = f"; e.g. {(missing + unknown)[0]}"
        raise UserError(
            f"{len(missing)} tensors missing and {len(unknown)} not understood{examples}; "
            "check that the model size is the one the checkpoint was made with"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise UserError(
                f"{name} has shape {tuple(found[name])} where {tuple(shape)} is expected; "
                "check that the model size and vocabulary are those the checkpoint was made with"
            )
