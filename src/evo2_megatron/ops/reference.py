# SPDX-License-Identifier: Apache-2.0
"""Slow direct versions of every operator in this folder: the specification. Only tests call them.

Shape legend: B batch, D channels, E = 3D interleaved rows, L tokens, K taps, P = K - 1 tokens of history, N modes.
Every function works in the dtype it is given (float64 for ground truth) and is differentiable.
"""

import math

import torch
from torch import Tensor


def causal_conv_ref(x_BDL: Tensor, taps_DK: Tensor, history_BDP: Tensor | None = None) -> Tensor:
    """``y[b,d,t] = sum_k taps[d,k] * x[b,d,t-(K-1)+k]``; tokens before the first come from history, or are zero."""
    B, D, L = x_BDL.shape
    K = taps_DK.shape[1]
    if history_BDP is None:
        history_BDP = x_BDL.new_zeros(B, D, K - 1)
    seen = torch.cat([history_BDP, x_BDL], dim=-1)
    return torch.stack([(taps_DK * seen[..., t : t + K]).sum(-1) for t in range(L)], dim=-1)


def last_inputs_ref(x_BDL: Tensor, num: int, history_BDP: Tensor | None = None) -> Tensor:
    """Token by token: the ``num`` inputs before the next one, oldest first, zero where nothing was seen."""
    tokens = list(x_BDL.unbind(-1))
    if history_BDP is not None:
        tokens = list(history_BDP.unbind(-1)) + tokens
    tokens = [torch.zeros_like(x_BDL[..., 0])] * num + tokens
    return torch.stack(tokens, dim=-1)[..., len(tokens) - num :]


def fft_causal_conv_ref(x_BDL: Tensor, filter_DK: Tensor, skip_D: Tensor) -> Tensor:
    """``y[b,d,t] = sum_{j<=t} filter[d,j] * x[b,d,t-j] + skip[d] * x[b,d,t]``, one lag at a time."""
    L = x_BDL.shape[-1]
    y_BDL = skip_D[:, None] * x_BDL
    for lag in range(min(L, filter_DK.shape[1])):
        shifted = torch.nn.functional.pad(x_BDL[..., : L - lag], (lag, 0))
        y_BDL = y_BDL + filter_DK[:, lag, None] * shifted
    return y_BDL


def modal_filter_ref(log_pole_DN: Tensor, residue_DN: Tensor, length: int) -> Tensor:
    """``filter[d,t] = sum_n residue[d,n] * exp(log_pole[d,n] * t)``, the whole exponential at once."""
    time_L = torch.arange(length, dtype=log_pole_DN.dtype, device=log_pole_DN.device)
    return (residue_DN[..., None] * torch.exp(log_pole_DN[..., None] * time_L)).sum(1)


def modal_conv_ref(
    x_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, state_BDN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By token: ``s[t] = exp(log_pole) * s[t-1] + x[t]``; ``y[t] = sum_n residue[n] * s_n[t] + skip * x[t]``.

    Returns:
        y_BDL and the state after the last token.
    """
    B, D, _ = x_BDL.shape
    pole_DN = log_pole_DN.exp()
    state = x_BDL.new_zeros(B, D, log_pole_DN.shape[1]) if state_BDN is None else state_BDN
    outputs = []
    for x_BD in x_BDL.unbind(-1):
        state = pole_DN * state + x_BD[..., None]
        outputs.append((residue_DN * state).sum(-1) + skip_D * x_BD)
    return torch.stack(outputs, dim=-1), state


def gated_conv_ref(
    u_BEL: Tensor, input_taps_EK: Tensor, inner_taps_DK: Tensor, skip_D: Tensor | None = None
) -> Tensor:
    """``y = post_gate * (corr(z, inner_taps) + skip * z)`` with ``z = pre_gate * value``, one channel at a time.

    Rows 3c, 3c+1, 3c+2 of the convolved input are post_gate, pre_gate and value of channel c.
    """
    outputs = []
    for c in range(inner_taps_DK.shape[0]):
        rows = slice(3 * c, 3 * c + 3)
        post_gate, pre_gate, value = causal_conv_ref(u_BEL[:, rows], input_taps_EK[rows]).unbind(1)
        z = (pre_gate * value)[:, None]
        inner = causal_conv_ref(z, inner_taps_DK[c : c + 1])
        if skip_D is not None:
            inner = inner + skip_D[c] * z
        outputs.append(post_gate * inner[:, 0])
    return torch.stack(outputs, dim=1)


def zigzag_order_ref(num_ranks: int) -> list[int]:
    """Rank r holds chunk r and its mirror image, chunk ``2 * num_ranks - 1 - r``."""
    order: list[int] = []
    for rank in range(num_ranks):
        order.append(rank)
        order.append(2 * num_ranks - 1 - rank)
    return order


def to_upper_ref(ids: list[int]) -> list[int]:
    """Upper case of the ASCII letters; every other id unchanged."""
    return [ord(chr(i).upper()) if i < 128 else i for i in ids]


def e4m3_values() -> list[float]:
    """All finite values of e4m3 that are not negative, ascending: the definition, by exponent and mantissa."""
    subnormal = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    normal = [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return subnormal + normal[:-1]  # the last pattern of bits stands for NaN


def round_to_e4m3_ref(x: Tensor) -> Tensor:
    """Element by element: the nearest of ``e4m3_values``, of two the one with the even mantissa; at most 448."""
    values = e4m3_values()

    def rounded(number: float) -> float:
        if number != number:
            return number
        magnitude = min(abs(number), values[-1])
        nearest = min(range(len(values)), key=lambda i: (abs(values[i] - magnitude), i % 2))
        return math.copysign(values[nearest], number)

    return torch.tensor([rounded(number) for number in x.double().flatten().tolist()], dtype=x.dtype).view(x.shape)


def int8_product_ref(x_TH: Tensor, weight_DH: Tensor) -> Tensor:
    """``sum_h bf16(x) * s * round(weight / s)``, row by row; ``s`` is the bfloat16 nearest to the largest over 127."""
    outputs = []
    for row in weight_DH.double().tolist():
        largest = torch.tensor(max(abs(number) for number in row) / 127)
        scale = largest.bfloat16().item() or 1.0
        levels = [max(-127, min(127, round(number / scale))) for number in row]  # round: of two, the even one
        outputs.append(x_TH.bfloat16().double() @ torch.tensor(levels, dtype=torch.float64) * scale)
    return torch.stack(outputs, dim=1)


def int4_product_ref(x_TH: Tensor, weight_DH: Tensor, group: int) -> Tensor:
    """``sum_h bf16(x) * (s * (q - 8) + z)``, row by row and group by group of ``group`` columns.

    The range of a group in 15 steps: ``s = bf16((max - min) / 15)``, ``z = bf16(min + 8 s)``, q the nearest of 0..15.
    """
    outputs = []
    for row in weight_DH.float().tolist():
        rounded = []
        for start in range(0, len(row), group):
            part = torch.tensor(row[start : start + group])  # float32, as what is rounded to bfloat16 below
            step = ((part.max() - part.min()) / 15).bfloat16().float()
            zero = (part.min() + 8 * step).bfloat16().float()
            size = step.item() or 1.0
            levels = [max(0, min(15, round(number) + 8)) for number in ((part - zero) / size).tolist()]
            rounded += [size * (level - 8) + zero.item() for level in levels]
        outputs.append(x_TH.bfloat16().double() @ torch.tensor(rounded, dtype=torch.float64))
    return torch.stack(outputs, dim=1)
