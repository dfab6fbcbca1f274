# SPDX-License-Identifier: Apache-2.0
"""Our weights and sizes in the form that Arc's Vortex reads: a flat state dict and the fields of its YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evo2_megatron.architectures import Architecture
from evo2_megatron.checkpoint.names import check_shapes, parameter_shapes, rows, without_extra_state
from evo2_megatron.config import UserError

TRANSFORMS = {
    "same": lambda x: (x,),
    "float32": lambda x: (x.float(),),
    "duplicate": lambda x: (x, x),
    "halves": lambda x: x.chunk(2),
    "middle_axis": lambda x: (x[:, None],),
    "decayed_filter": lambda h, decay: ((h * decay)[:, None],),
    # Vortex evaluates exp(log_pole * t) in float32 whatever the other weights are
    "log_poles": lambda p, gamma: (-(p.float().exp() * gamma.float().exp())[..., None],),
}
"""What the table in ``checkpoint/names.py`` names: our tensors in, Vortex's out, in the order of the table."""


def _check_representable(architecture: Architecture) -> None:
    if architecture.gelu_in_every_layer or architecture.short_conv_bias:
        raise UserError(
            "Vortex has no bias in its short convolution and no tanh GELU, so NVIDIA's variants (keys with _nv) "
            "cannot be written in its format; choose one of the evo2_* model sizes"
        )


def to_vortex(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Rename and reshape our weights for Vortex, all or nothing.

    Args:
        state: Our whole model (global shapes, any float dtype); ``_extra_state`` entries are left out.
        architecture: Row of the size table that the weights belong to.

    Returns:
        Vortex's names; dtypes are kept, except that poles, residues and ``inv_freq`` are float32.
        ``inv_freq`` is exact, where Arc's own files hold it rounded to bfloat16.

    Raises:
        UserError: A tensor is missing, unknown or of another shape, or Vortex cannot express the model.
    """
    _check_representable(architecture)
    state = without_extra_state(state)
    embedding = state.get("embedding.word_embeddings.weight")
    vocab_size = 0 if embedding is None else embedding.shape[0]
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_shapes(shapes, parameter_shapes(architecture, vocab_size=vocab_size))

    vortex = {}
    for row in rows(architecture):
        tensors = TRANSFORMS[row.to_vortex](*(state[name] for name in row.megatron))
        vortex.update(zip(row.vortex, tensors, strict=True))
    head_size = architecture.hidden_size // architecture.num_heads
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    for i in _layers(architecture, "*"):
        vortex[f"blocks.{i}.inner_mha_cls.rotary_emb.inv_freq"] = 1.0 / architecture.rotary_base**exponent
    return vortex


def vortex_config(architecture: Architecture, *, vocab_size: int) -> dict[str, Any]:
    """Fields of the YAML file that Vortex builds a model from.

    Args:
        architecture: Row of the size table.
        vocab_size: Rows of the embedding table.

    Returns:
        Plain numbers, strings, booleans and lists. Attention and projections are set to run without
        flash-attn and without FP8; whoever has them may switch ``use_flash_attn`` and
        ``use_fp8_input_projections`` on.

    Raises:
        UserError: Vortex cannot express the model.
    """
    _check_representable(architecture)
    hidden = architecture.hidden_size
    config = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_filters": hidden,
        "num_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "inner_mlp_size": architecture.ffn_hidden_size,
        "hcs_layer_idxs": _layers(architecture, "S"),
        "hcm_layer_idxs": _layers(architecture, "D"),
        "hcl_layer_idxs": _layers(architecture, "H"),
        "attn_layer_idxs": _layers(architecture, "*"),
        "hcs_filter_length": 7,
        "hcm_filter_length": 128,
        "hcs_filter_groups": architecture.num_groups,
        "hcm_filter_groups": architecture.num_groups,
        "hcl_filter_groups": hidden,
        "hyena_filter_groups": 1,
        "state_size": 16,
        "short_filter_length": 3,
        "short_filter_bias": False,
        "proj_groups": 1,
        "max_seqlen": architecture.max_tokens,
        "max_batch_size": 1,
        "eps": 1e-6,
        "final_norm": True,
        "rotary_emb_base": architecture.rotary_base,
        "tie_embeddings": architecture.tied_embeddings,
        "mha_out_proj_bias": architecture.attention_output_bias,
        "hyena_out_proj_bias": True,
        "qkv_proj_bias": False,
        # Wqkv is stored per head; the rows of the input projection are period-3 interleaved
        "column_split": True,
        "column_split_hyena": False,
        "interleave": True,
        "hyena_flip_x1x2": False,
        "mlp_activation": "gelu",
        "evo2_style_activations": True,
        "mlp_init_method": "torch.nn.init.zeros_",
        "mlp_output_init_method": "torch.nn.init.zeros_",
        "make_vocab_size_divisible_by": 8,
        "inner_size_multiple_of": 16,
        "model_parallel_size": 1,
        "pipe_parallel_size": 1,
        "use_flash_attn": False,
        "use_fp8_input_projections": False,
        "use_flash_rmsnorm": False,
        "use_flash_depthwise": False,
        "use_flashfft": False,
        "use_laughing_hyena": False,
        "inference_mode": True,
        "prefill_style": "fft",
        "print_activations": False,
        "tokenizer_type": "CharLevelTokenizer",
    }
    if architecture.position_scale is not None:
        config |= {
            "use_interpolated_rotary_pos_emb": True,
            "rotary_emb_scaling_factor": architecture.position_scale,
        }
    return config


def _layers(architecture: Architecture, symbol: str) -> list[int]:
    return [i for i, s in enumerate(architecture.pattern) if s == symbol]
