# SPDX-License-Identifier: Apache-2.0
"""Our weights and sizes in the form that Arc's Vortex reads: a flat state dict and the fields of its YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from evo2_megatron.architectures import Architecture
from evo2_megatron.checkpoint.fp8_state import read_scales
from evo2_megatron.checkpoint.names import is_weight
from evo2_megatron.checkpoint.tensors import StoredTensor, in_memory
from evo2_megatron.checkpoint.translate import Weights, named_tensors, to_ours, to_theirs
from evo2_megatron.config import UserError

_EMBEDDING, _HEAD = "embedding_layer.weight", "unembed.weight"


def check_representable(architecture: Architecture) -> None:
    """Raise UserError for models that Vortex has no place for."""
    if architecture.gelu_in_every_layer or architecture.short_conv_bias:
        raise UserError(
            "Vortex has no bias in its short convolution and no tanh GELU, so NVIDIA's variants (keys with _nv) "
            "cannot be written in its format; choose one of the evo2_* model sizes"
        )
    if architecture.output_bias:
        raise UserError(
            "Vortex has no bias in its output projection, so this model (add_bias_output) cannot be written in its "
            "format"
        )


def to_vortex(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """``vortex_tensors`` for weights that are in memory; FP8 state is left out."""
    ours = {name: in_memory(tensor) for name, tensor in state.items() if is_weight(name)}
    return {name: tensor.read() for name, tensor in vortex_tensors(ours, architecture).items()}


def vortex_tensors(
    ours: Mapping[str, StoredTensor], architecture: Architecture, *, bf16_frequencies: bool = False
) -> dict[str, StoredTensor]:
    """Rename and reshape our weights for Vortex, all or nothing.

    Args:
        ours: Our whole model (global shapes, any float dtype).
        architecture: Describes the model.
        bf16_frequencies: Round the rotary frequencies to bfloat16, as Arc's own files have them, and not as our
            model computes them: positions far apart then differ by up to a turn.

    Returns:
        Vortex's names; dtypes are kept, except that medium filters, poles, residues and ``inv_freq`` are float32.

    Raises:
        UserError: A tensor is missing, unknown or of another shape, or Vortex cannot express the model.
    """
    check_representable(architecture)
    theirs = to_theirs(ours, architecture, "vortex")
    frequencies = rotary_frequencies(architecture)
    if bf16_frequencies:
        frequencies = frequencies.bfloat16().float()
    for i in _layers(architecture, "*"):
        theirs[f"blocks.{i}.inner_mha_cls.rotary_emb.inv_freq"] = in_memory(frequencies)
    return theirs


def from_vortex(state: Mapping[str, Any], architecture: Architecture, *, source: str) -> Weights:
    """Rename and reshape Vortex's weights for us, all or nothing.

    Medium filters become h with a decay of one, long filters p + gamma with the same poles. Both compute what Vortex
    computes; how they were split in training is not in the file.

    Args:
        state: The file's state dict; FP8 state may be among it.
        architecture: Row of the size table.
        source: The file, for messages.

    Raises:
        UserError: A tensor is missing, unknown or of another shape, or its values are not those of such a model.
    """
    check_representable(architecture)
    state = named_tensors(state, source=source, wanted="Vortex's .pt file, a state dict and nothing around it")
    theirs = {name: tensor for name, tensor in state.items() if is_weight(name)}
    frequencies = {name: theirs.pop(name) for name in list(theirs) if name.endswith(".rotary_emb.inv_freq")}
    embedding = theirs.get(_EMBEDDING)
    head = theirs.setdefault(_HEAD, embedding) if embedding is not None else None
    if head is not None and head.shape == embedding.shape:
        tied = head is embedding or torch.equal(head.read(), embedding.read())
        architecture = replace(architecture, tied_embeddings=tied)
    ours = to_ours(theirs, architecture, "vortex", source=source)
    for name, tensor in frequencies.items():
        check_frequencies(tensor, architecture, source=f"{source}: {name}")
    for name, tensor in theirs.items():
        if name.endswith(".log_poles"):
            values = tensor.read()
            if not (values.isfinite() & (values < 0)).all():
                raise UserError(f"{source}: {name} has values that are not below 0, so its filters would grow forever")
    scales = read_scales(state, {i: f"blocks.{i}.projections._extra_state" for i in _hyena_layers(architecture)})
    return Weights(architecture, theirs, ours, scales)


def rotary_frequencies(architecture: Architecture) -> Tensor:
    """Angle per position of each pair of channels of a head, before ``position_scale``; exact, float32."""
    head_size = architecture.hidden_size // architecture.num_heads
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    return 1.0 / architecture.rotary_base**exponent


def check_frequencies(stored: StoredTensor, architecture: Architecture, *, source: str) -> None:
    """Raise UserError unless a file's ``inv_freq`` is that of the architecture, rounded to bfloat16 or not.

    Files carry it because torch saves buffers. Its values follow from the base, which is what this checks.
    """
    expected, detail = rotary_frequencies(architecture).double(), ""
    if stored.shape == tuple(expected.shape):
        found = stored.read().double()
        if ((found - expected).abs() <= 2**-8 * expected).all():
            return
        if len(found) > 1 and 0 < found[-1] < 1:
            base = math.exp(-math.log(found[-1]) * len(found) / (len(found) - 1))
            detail = f" (it seems to be about {base:.3g})"
    raise UserError(
        f"{source} does not belong to a rotary base of {architecture.rotary_base}{detail}; check that --model-size is "
        "the one the file was made with"
    )


_FREE_FIELDS = {
    "vocab_size", "max_batch_size", "make_vocab_size_divisible_by", "inner_size_multiple_of", "model_parallel_size",
    "pipe_parallel_size", "use_flash_attn", "use_fp8_input_projections", "use_flash_rmsnorm", "use_flash_depthwise",
    "use_flashfft", "use_laughing_hyena", "inference_mode", "prefill_style", "print_activations", "tokenizer_type",
    "mlp_init_method", "mlp_output_init_method", "tie_embeddings",
}  # fmt: skip
"""Fields of the YAML file that do not fix the function computed, or that the weights themselves tell."""


def check_config(path: Path, architecture: Architecture) -> Architecture:
    """Compare Vortex's YAML file with a model.

    Returns:
        The architecture with the file's rotary base, position scale and longest sequence.

    Raises:
        UserError: Not such a file, or it describes another model; names the fields.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no plain YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict) or "hidden_size" not in given:
        raise UserError(f"{path} is not the configuration of a Vortex model")
    numbers = {"rotary_emb_base": 10_000, "rotary_emb_scaling_factor": 1.0, "max_seqlen": architecture.max_tokens}
    for name in numbers:
        value = numbers[name] = given.get(name, numbers[name])
        if not (type(value) is int or (type(value) is float and name != "max_seqlen")) or not 0 < value < math.inf:
            raise UserError(f"{path}: {name} is {value!r}; it must be a number above 0, and max_seqlen a whole one")
    interpolated = given.get("use_interpolated_rotary_pos_emb", False)
    architecture = replace(
        architecture,
        rotary_base=numbers["rotary_emb_base"],
        position_scale=float(numbers["rotary_emb_scaling_factor"]) if interpolated else None,
        max_tokens=numbers["max_seqlen"],
    )
    expected = vortex_config(architecture, vocab_size=512)
    different = [
        f"{name} {given[name]} instead of {value}"
        for name, value in expected.items()
        if name in given and name not in _FREE_FIELDS and given[name] != value
    ]
    if different:
        raise UserError(
            f"{path} describes another model than --model-size: {'; '.join(different[:4])}; check both, or leave "
            "--vortex-config out"
        )
    return architecture


def vortex_config(architecture: Architecture, *, vocab_size: int, fp8_projections: bool = False) -> dict[str, Any]:
    """Fields of the YAML file that Vortex builds a model from.

    Args:
        architecture: Describes the model.
        vocab_size: Rows of the embedding table.
        fp8_projections: Compute the input projections in 8 bits, which needs Transformer Engine; for models that
            were trained so.

    Returns:
        Plain numbers, strings, booleans and lists. Attention is set to run without flash-attn; whoever has it may
        switch ``use_flash_attn`` on.

    Raises:
        UserError: Vortex cannot express the model.
    """
    check_representable(architecture)
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
        "use_fp8_input_projections": fp8_projections,
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


def asks_for_fp8(path: Path) -> bool | None:
    """What Vortex's YAML file says of 8-bit input projections; None: nothing. ``check_config`` goes first."""
    return yaml.safe_load(path.read_text()).get("use_fp8_input_projections")


def _hyena_layers(architecture: Architecture) -> list[int]:
    return [i for i, symbol in enumerate(architecture.pattern) if symbol != "*"]


def _layers(architecture: Architecture, symbol: str) -> list[int]:
    return [i for i, s in enumerate(architecture.pattern) if s == symbol]
