# SPDX-License-Identifier: Apache-2.0
"""One table of parameter names: ours (Megatron), Vortex's and Savanna's, and what turns one into another. No torch.

Ours are the keys of published checkpoints, so they never change. Shapes are written in these symbols:
V embedding rows, H hidden size, F width of one half of the gated MLP, G filter groups; other entries are numbers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from evo2_megatron.architectures import LAYER_SYMBOLS, Architecture
from evo2_megatron.config import UserError

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


class Row(NamedTuple):
    """Tensors of ours that are converted together."""

    megatron: dict[str, str]
    """Our name: shape."""

    vortex: tuple[str, ...]
    """Names in a Vortex file; none where Vortex has no place for it."""

    savanna: tuple[str, ...]
    """Names in a Savanna file."""

    vortex_form: str = "same"
    """Which entry of ``checkpoint.translate.FORMS`` turns ours into Vortex's and back."""

    savanna_form: str = "same"
    """Which entry turns ours into Savanna's and back."""


def _same(ours: str, shape: str, vortex: str, savanna: str, form: str = "same") -> Row:
    return Row({ours: shape}, (vortex,), (savanna,), form)


_MODEL = [Row({"decoder.final_norm.weight": "H"}, ("norm.scale",), ("norm.weight",))]
_TIED = [
    Row(
        {EMBEDDING: "V H"},
        ("embedding_layer.weight", "unembed.weight"),
        ("word_embeddings.weight",),
        vortex_form="duplicate",
    )
]
_UNTIED = [
    Row({EMBEDDING: "V H"}, ("embedding_layer.weight",), ("word_embeddings.weight",)),
    # Savanna inherits the name from GPT-NeoX; Arc has published no such model
    Row({OUTPUT: "V H"}, ("unembed.weight",), ("final_linear.weight",)),
]
_OUTPUT_BIAS = [Row({"output_layer.bias": "V"}, (), ())]
_MLP = [
    _same("mlp.linear_fc1.layer_norm_weight", "H", "post_norm.scale", "pre_mlp_layernorm.weight"),
    # rows 0 to F-1 are the gate, the rest the linear half
    Row(
        {"mlp.linear_fc1.weight": "2F H"},
        ("mlp.l1.weight", "mlp.l2.weight"),
        ("mlp.w1.weight", "mlp.w2.weight"),
        vortex_form="halves",
        savanna_form="halves",
    ),
    _same("mlp.linear_fc2.weight", "H F", "mlp.l3.weight", "mlp.w3.weight"),
]
_PROJECTION_CONV = "mixer.hyena_proj_conv.short_conv_weight"
_HYENA = [
    _same("mixer.dense_projection.layer_norm_weight", "H", "pre_norm.scale", "input_layernorm.weight"),
    _same("mixer.dense_projection.weight", "3H H", "projections.weight", "mixer.dense_projection.weight"),
    _same(_PROJECTION_CONV, "3H 3", "filter.short_filter_weight", _PROJECTION_CONV, "middle_axis"),
    _same("mixer.dense.weight", "H H", "out_filter_dense.weight", "mixer.dense.weight"),
    _same("mixer.dense.bias", "H", "out_filter_dense.bias", "mixer.dense.bias"),
]
_SHORT_CONV = "mixer.mixer.short_conv.short_conv_weight"
_HYENA_SE = [_same(_SHORT_CONV, "G 1 7", "filter.h", _SHORT_CONV)]
_HYENA_SE_BIAS = [Row({"mixer.mixer.conv_bias": "G"}, (), ("mixer.mixer.conv_bias",))]
_BIAS = _same("mixer.mixer.conv_bias", "H", "filter.D", "mixer.mixer.conv_bias")
_HYENA_MR = [
    _BIAS,
    Row(
        {"mixer.mixer.filter.h": "G 128", "mixer.mixer.filter.decay": "G 128"},
        ("filter.h",),
        ("mixer.mixer.filter.h", "mixer.mixer.filter.decay"),  # cut to as many columns
        vortex_form="decayed_filter",
    ),
]
_HYENA_LI = [
    _BIAS,
    Row(
        {"mixer.mixer.filter.p": "H 16", "mixer.mixer.filter.gamma": "H 16"},
        ("filter.log_poles",),
        ("mixer.mixer.filter.p", "mixer.mixer.filter.gamma"),
        vortex_form="log_poles",
    ),
    _same("mixer.mixer.filter.R", "H 16", "filter.residues", "mixer.mixer.filter.R", "float32"),
]
_ATTENTION = [
    _same("self_attention.linear_qkv.layer_norm_weight", "H", "pre_norm.scale", "input_layernorm.weight"),
    # all three: per head, 128 rows of q, then of k, then of v
    _same("self_attention.linear_qkv.weight", "3H H", "inner_mha_cls.Wqkv.weight", "mixer.dense_projection.weight"),
    _same("self_attention.linear_proj.weight", "H H", "inner_mha_cls.out_proj.weight", "mixer.dense.weight"),
]
_ATTENTION_BIAS = [_same("self_attention.linear_proj.bias", "H", "inner_mha_cls.out_proj.bias", "mixer.dense.bias")]

_UNFUSED = {
    "mixer.dense_projection.layer_norm_weight": "norm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_NOT_WEIGHTS = re.compile(r"optimizer\.|opt_param_scheduler\.|rng_state|rerun_state_machine|.*_extra_state")
_LISTED = 8


def _layer_rows(architecture: Architecture, symbol: str) -> list[Row]:
    kind = LAYER_SYMBOLS[symbol]
    if kind == "attention":
        return _ATTENTION + (_ATTENTION_BIAS if architecture.attention_output_bias else []) + _MLP
    if kind == "hyena_se":
        return _HYENA + _HYENA_SE + (_HYENA_SE_BIAS if architecture.short_conv_bias else []) + _MLP
    return _HYENA + (_HYENA_MR if kind == "hyena_mr" else _HYENA_LI) + _MLP


def rows(architecture: Architecture) -> list[Row]:
    """The table written out for one model: every name with its layer number, in the order of the forward pass.

    Savanna numbers the steps of its pipeline: 0 is the embedding, 1 a transposition, i + 2 layer i, then another
    transposition, the norm, and the output projection if the model has one of its own.
    """
    (embedding, *output), norm = (_TIED if architecture.tied_embeddings else _UNTIED), architecture.num_layers + 3
    table = [_in_savanna(embedding, 0)]
    for i, symbol in enumerate(architecture.pattern):
        for row in _layer_rows(architecture, symbol):
            ours = {f"decoder.layers.{i}.{name}": shape for name, shape in row.megatron.items()}
            row = row._replace(megatron=ours, vortex=tuple(f"blocks.{i}.{name}" for name in row.vortex))
            table.append(_in_savanna(row, i + 2))
    table += [_in_savanna(row, norm) for row in _MODEL] + [_in_savanna(row, norm + 1) for row in output]
    return table + (_OUTPUT_BIAS if architecture.output_bias else [])


def _in_savanna(row: Row, step: int) -> Row:
    return row._replace(savanna=tuple(f"sequential.{step}.{name}" for name in row.savanna))


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


def is_kept_in_float32(name: str) -> bool:
    """Whether converters store a name of ours in float32 whatever the rest is in: what filters are computed from."""
    return name.rpartition(".filter.")[2] in ("h", "decay", "p", "gamma", "R")


def is_weight(name: str) -> bool:
    """Whether a name in a checkpoint belongs to the model, and not to the optimizer, random or FP8 state."""
    return not _NOT_WEIGHTS.match(name)


def unfused(name: str) -> str:
    """The name of a norm in a checkpoint that was written without Transformer Engine's fused layers; else the same."""
    prefix, layer, rest = name.partition("decoder.layers.")
    number, _, rest = rest.partition(".")
    return f"{prefix}{layer}{number}.{_UNFUSED[rest]}" if rest in _UNFUSED else name


def usual_names(stored: Collection[str], expected: Iterable[str]) -> dict[str, str]:
    """Of names in a checkpoint, which may be ``unfused``, those that models have.

    Where a checkpoint has both, the first stays what it is, for ``check_tensors`` to refuse.

    Args:
        stored: Names in the checkpoint.
        expected: Names of the model.
    """
    usual = {unfused(name): name for name in expected}
    renamed = {name: usual.get(name, name) for name in stored}
    return {name: name if new in stored else new for name, new in renamed.items()}


def check_tensors(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, source: str, remedy: str
) -> None:
    """Raise UserError unless both sides have the same names and shapes; nothing is ever ignored.

    Args:
        found: Shape of every weight in a file.
        expected: Shape of every weight of the model.
        source: What the file is, for the message.
        remedy: What to do.
    """
    problems = {
        "missing": [name for name in expected if name not in found],
        "not understood": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {tuple(found[name])} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    listed = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if listed:
        raise UserError(f"{source}: {'; '.join(listed)}; {remedy}")


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
