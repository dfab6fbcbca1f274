# SPDX-License-Identifier: Apache-2.0
"""A second, slow statement of Evo 2 in plain torch that reads weights by the names of any checkpoint format.

Converters are checked with it. It spells out the formats and the model by itself, on purpose: a mistake in the name
table or in the Megatron model must not be made twice. Only one layer's weights are in memory at a time.
Shape legend: B batch, L tokens, H hidden channels, V vocabulary, N attention heads, K taps, M modes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evo2_megatron.architectures import Architecture

Names = Literal["savanna", "vortex", "megatron"]
_EPSILON = 1e-6


class _Layer(NamedTuple):
    """One layer's weights, float32, the same for all formats."""

    norm: Tensor
    projection: Tensor
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate: Tensor
    linear: Tensor
    down: Tensor
    input_taps: Tensor | None = None
    """[3H, K], the last tap meets the current token; None in attention layers."""
    filter: Callable[[int], Tensor] | None = None
    """Number of tokens: filter of every group or channel by lag, [groups, up to L]."""
    skip: Tensor | None = None
    input_scale: float | None = None
    """What the projection's input is multiplied by before it is rounded to 8 bits; None: it is not rounded."""


class _Reader:
    """Looks names up under a prefix."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str) -> None:
        self._weights, self._prefix = weights, prefix

    def __call__(self, *names: str) -> Tensor:
        """The first of the names that exists."""
        found = [name for name in names if self._prefix + name in self._weights]
        return self._weights[self._prefix + (found or names)[0]].float()

    def optional(self, name: str) -> Tensor | None:
        return self(name) if self._prefix + name in self._weights else None


def _modes(log_poles_GM: Tensor, residues_GM: Tensor) -> Callable[[int], Tensor]:
    def by_lag(length: int) -> Tensor:
        time = torch.arange(length, dtype=torch.float64)
        # mode by mode: all at once would be 16 times the result
        return sum(r[:, None] * torch.exp(pole[:, None] * time) for pole, r in zip(log_poles_GM.T, residues_GM.T))

    log_poles_GM, residues_GM = log_poles_GM.double(), residues_GM.double()
    return by_lag


def _taps(by_lag_GK: Tensor) -> Callable[[int], Tensor]:
    return lambda length: by_lag_GK[:, :length].double()


def _savanna_layer(weights: Mapping[str, Tensor], i: int, symbol: str) -> _Layer:
    get = _Reader(weights, f"sequential.{i + 2}.")
    layer = _Layer(
        norm=get("input_layernorm.weight"),
        projection=get("mixer.dense_projection.weight"),
        output=get("mixer.dense.weight"),
        output_bias=get.optional("mixer.dense.bias"),
        mlp_norm=get("pre_mlp_layernorm.weight"),
        gate=get("mlp.w1.weight"),
        linear=get("mlp.w2.weight"),
        down=get("mlp.w3.weight"),
    )
    return layer if symbol == "*" else _with_trained_filter(layer, get, symbol)


def _megatron_layer(weights: Mapping[str, Tensor], i: int, symbol: str) -> _Layer:
    get = _Reader(weights, f"decoder.layers.{i}.")
    gate, linear = get("mlp.linear_fc1.weight").chunk(2)
    attention = symbol == "*"
    first, last = ("linear_qkv", "linear_proj") if attention else ("dense_projection", "dense")
    part = "self_attention" if attention else "mixer"
    layer = _Layer(
        # the second name: models without fused layers
        norm=get(f"{part}.{first}.layer_norm_weight", "input_layernorm.weight" if attention else "norm.weight"),
        projection=get(f"{part}.{first}.weight"),
        output=get(f"{part}.{last}.weight"),
        output_bias=get.optional(f"{part}.{last}.bias"),
        mlp_norm=get("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        gate=gate,
        linear=linear,
        down=get("mlp.linear_fc2.weight"),
    )
    return layer if attention else _with_trained_filter(layer, get, symbol)


def _with_trained_filter(layer: _Layer, get: _Reader, symbol: str) -> _Layer:
    """Savanna and Megatron name what a filter is computed from alike."""
    if symbol == "S":
        by_lag = _taps(get("mixer.mixer.short_conv.short_conv_weight")[:, 0].flip(1))
    elif symbol == "D":
        by_lag = _taps((get("mixer.mixer.filter.h") * get("mixer.mixer.filter.decay"))[:, :128])
    else:
        p, gamma = get("mixer.mixer.filter.p").double(), get("mixer.mixer.filter.gamma").double()
        by_lag = _modes(-(p + gamma).exp(), get("mixer.mixer.filter.R"))
    return layer._replace(
        input_taps=get("mixer.hyena_proj_conv.short_conv_weight"),
        filter=by_lag,
        skip=get.optional("mixer.mixer.conv_bias"),
    )


def _vortex_layer(weights: Mapping[str, Tensor], i: int, symbol: str) -> _Layer:
    get = _Reader(weights, f"blocks.{i}.")
    attention = symbol == "*"
    first, last = (
        ("inner_mha_cls.Wqkv", "inner_mha_cls.out_proj") if attention else ("projections", "out_filter_dense")
    )
    layer = _Layer(
        norm=get("pre_norm.scale"),
        projection=get(f"{first}.weight"),
        output=get(f"{last}.weight"),
        output_bias=get.optional(f"{last}.bias"),
        mlp_norm=get("post_norm.scale"),
        gate=get("mlp.l1.weight"),
        linear=get("mlp.l2.weight"),
        down=get("mlp.l3.weight"),
    )
    if attention:
        return layer
    if symbol == "S":
        by_lag = _taps(get("filter.h")[:, 0].flip(1))
    elif symbol == "D":
        by_lag = _taps(get("filter.h")[:, 0])
    else:
        by_lag = _modes(get("filter.log_poles")[..., 0], get("filter.residues"))
    return layer._replace(
        input_taps=get("filter.short_filter_weight")[:, 0], filter=by_lag, skip=get.optional("filter.D")
    )


_LAYERS = {"savanna": _savanna_layer, "vortex": _vortex_layer, "megatron": _megatron_layer}


def _ends(weights: Mapping[str, Tensor], names: Names, num_layers: int) -> tuple[str, str, str, str | None]:
    """Names of the embedding, the last norm, the output projection (if tied, the embedding) and its bias."""
    if names == "vortex":
        embedding, norm, head, bias = "embedding_layer.weight", "norm.scale", "unembed.weight", None
    elif names == "megatron":
        embedding, norm = "embedding.word_embeddings.weight", "decoder.final_norm.weight"
        head, bias = "output_layer.weight", "output_layer.bias"
    else:
        step = num_layers + (3 if f"sequential.{num_layers + 3}.norm.weight" in weights else 2)
        embedding, norm = "sequential.0.word_embeddings.weight", f"sequential.{step}.norm.weight"
        head, bias = f"sequential.{step + 1}.final_linear.weight", None
    return embedding, norm, head if head in weights else embedding, bias if bias in weights else None


@torch.inference_mode()
def reference_logits(
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    batches: Sequence[Tensor],
    *,
    names: Names,
    norm: Literal["megatron", "vortex"] = "megatron",
    fp8_scales: Mapping[int, tuple[float, float]] | None = None,
) -> list[Tensor]:
    """Logits of whole sequences, float32 with convolutions in float64.

    Args:
        weights: Tensors by the format's own names; may read from disk each time one is looked up.
        architecture: Numbers that the weights do not tell: pattern, heads, activations, rotary embedding.
        batches: Tokens [B, L], all of which go through a layer before the next is read.
        names: The format.
        norm: Where RMSNorm adds its epsilon: to the mean square, as Megatron does, or to its root, as Vortex does.
        fp8_scales: Round inputs and weights of the Hyena input projections to 8 bits, with these scales by number of
            the layer, and a scale of 1 for others; None: do not round.

    Returns:
        For each batch, logits [B, L, V].
    """
    embedding, last_norm, head, bias = _ends(weights, names, architecture.num_layers)
    table = weights[embedding].float()
    streams = [table[tokens_BL] for tokens_BL in batches]
    for i, symbol in enumerate(architecture.pattern):
        layer = _LAYERS[names](weights, i, symbol)
        if fp8_scales is not None and symbol != "*":
            input_scale, weight_scale = fp8_scales.get(i, (1.0, 1.0))
            layer = layer._replace(projection=_in_8_bits(layer.projection, weight_scale), input_scale=input_scale)
        mix = _attention if symbol == "*" else _hyena
        for j, x_BLH in enumerate(streams):
            y_BLH = mix(layer, _rms_norm(x_BLH, layer.norm, norm), architecture)
            x_BLH = x_BLH + F.linear(y_BLH, layer.output, layer.output_bias)
            streams[j] = x_BLH + _mlp(layer, _rms_norm(x_BLH, layer.mlp_norm, norm), architecture, first=i == 0)
    scale, table = weights[last_norm].float(), weights[head].float()
    offset = None if bias is None else weights[bias].float()
    return [F.linear(_rms_norm(x_BLH, scale, norm), table, offset) for x_BLH in streams]


def _rms_norm(x: Tensor, scale: Tensor, kind: str) -> Tensor:
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return x * scale / ((mean_square + _EPSILON).sqrt() if kind == "megatron" else mean_square.sqrt() + _EPSILON)


def _mlp(layer: _Layer, x: Tensor, architecture: Architecture, *, first: bool) -> Tensor:
    gate = F.linear(x, layer.gate)
    if architecture.gelu_in_every_layer:
        gate = F.gelu(gate, approximate="tanh")
    elif first:
        gate = F.gelu(gate)
    return F.linear(gate * F.linear(x, layer.linear), layer.down)


def _convolve(x_BLD: Tensor, by_lag_DK: Tensor) -> Tensor:
    """Causal, by FFT with room for the whole result."""
    length = x_BLD.shape[1] + by_lag_DK.shape[1]
    product = torch.fft.rfft(x_BLD.double(), length, dim=1) * torch.fft.rfft(by_lag_DK.T, length, dim=0)
    return torch.fft.irfft(product, length, dim=1)[:, : x_BLD.shape[1]]


def _in_8_bits(x: Tensor, scale: float) -> Tensor:
    return (x * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() / scale


def _hyena(layer: _Layer, x_BLH: Tensor, architecture: Architecture) -> Tensor:
    if layer.input_scale is not None:
        x_BLH = _in_8_bits(x_BLH, layer.input_scale)
    rows = _convolve(F.linear(x_BLH, layer.projection), layer.input_taps.flip(1).double())
    # three neighbouring rows per channel
    post_gate, pre_gate, value = rows.unflatten(-1, (-1, 3)).unbind(-1)
    z, by_lag = pre_gate * value, layer.filter(x_BLH.shape[1])
    y = _convolve(z, by_lag.repeat_interleave(z.shape[-1] // by_lag.shape[0], dim=0))
    if layer.skip is not None:
        y = y + z * layer.skip.double().repeat_interleave(z.shape[-1] // layer.skip.shape[0])
    return (post_gate * y).float()


def _attention(layer: _Layer, x_BLH: Tensor, architecture: Architecture) -> Tensor:
    # rows of the projection: for each head q, then k, then v
    q, k, v = F.linear(x_BLH, layer.projection).unflatten(-1, (architecture.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
    half = q.shape[-1] // 2
    frequencies = architecture.rotary_base ** -(torch.arange(half, dtype=torch.float64) / half)
    positions = torch.arange(x_BLH.shape[1], dtype=torch.float64) / (architecture.position_scale or 1.0)
    angles = torch.outer(positions, frequencies)
    cos, sin = angles.cos().float(), angles.sin().float()

    def rotate(x_BNLC: Tensor) -> Tensor:
        a, b = x_BNLC[..., :half], x_BNLC[..., half:]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    y_BNLC = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    return y_BNLC.transpose(1, 2).flatten(2)
