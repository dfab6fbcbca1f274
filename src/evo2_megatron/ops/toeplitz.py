# SPDX-License-Identifier: Apache-2.0
"""Toeplitz matrices: a convolution inside a block of tokens as one matrix product.

Shape legend: D channels, K taps, S rows (tokens that come in), W columns (tokens that go out).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU_SLICE = 1 << 19
_GPU_SLICE = 1 << 27


def toeplitz(filter_DK: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Matrices [D, S, W] with entry ``filter[w - s]`` in row s, column w; zero where w - s is no tap."""
    D, K = filter_DK.shape
    S, W = num_rows, num_columns
    # rows of W + S read as rows one shorter: each then starts one later than the row above, S zeros in between
    rows = F.pad(filter_DK, (0, W + S - K))
    if K > W:
        rows[:, W:] = 0
    flat = rows[:, None].expand(D, S, W + S).reshape(D, -1)
    return flat[:, : S * (W + S - 1)].view(D, S, W + S - 1)[..., :W]


def diagonal_sums(x_DSW: Tensor) -> Tensor:
    """Gradient of ``toeplitz``: [D, W], for each lag the sum of the entries with ``w - s = lag``."""
    D, S, W = x_DSW.shape
    # rows of W + S read as rows one longer: column j of row s is then entry (s, s + j), or a zero
    flat = F.pad(F.pad(x_DSW, (0, S)).flatten(1), (0, S))
    return flat.view(D, S, W + S + 1)[..., :W].sum(1)


def by_channel(x_BDL: Tensor, dtype: torch.dtype) -> Tensor:
    """The signal in ``dtype``, the tokens of a channel next to each other; a view where it already is so.

    What comes from a linear layer has the channels of a token next to each other. Convolving that takes several times
    as long as one copy of it: no step of it can use vector instructions, and batched products copy matrix by matrix.
    """
    return x_BDL.to(dtype).contiguous()


def channel_slices(x_BDL: Tensor, *, copies: int = 1) -> Iterator[slice]:
    """Slices of channels to work on one after the other: on a CPU small enough to stay in cache.

    Args:
        x_BDL: The signal, [batch, channels, tokens].
        copies: How many intermediates of the size of a slice are alive at once.
    """
    B, D, L = x_BDL.shape
    budget = _CPU_SLICE if x_BDL.device.type == "cpu" else _GPU_SLICE
    size = max(1, budget // (B * L * copies))
    return (slice(d, min(d + size, D)) for d in range(0, D, size))
