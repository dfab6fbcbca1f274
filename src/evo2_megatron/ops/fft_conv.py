# SPDX-License-Identifier: Apache-2.0
"""Causal long convolution by FFT.

Shape legend: B batch, D channels, L tokens, K taps, F = L + 1 frequencies.
"""

import torch
from torch import Tensor


def fft_causal_conv(x_BDL: Tensor, filter_DK: Tensor, skip_D: Tensor) -> Tensor:
    """Convolve every channel with its own causal filter and add the scaled input.

    ``y[b,d,t] = sum_{j<=t} filter[d,j] * x[b,d,t-j] + skip[d] * x[b,d,t]``

    Args:
        x_BDL: Signal in any float dtype; the sum runs in float32 (float64 if x is).
        filter_DK: Impulse response of any length; tap 0 meets the current token.
        skip_D: Gain of the direct path.

    Returns:
        y_BDL, in the dtype of ``x_BDL``.
    """
    L = x_BDL.shape[-1]
    dtype = torch.promote_types(x_BDL.dtype, torch.float32)
    x_wide_BDL = x_BDL.to(dtype)
    # pad to 2L: the FFT product is circular, and the tail must not wrap onto the head.
    # taps beyond L would wrap onto early outputs, and no output can reach them: drop them
    x_BDF = torch.fft.rfft(x_wide_BDL, n=2 * L)
    h_DF = torch.fft.rfft(filter_DK[:, :L].to(dtype), n=2 * L)
    y_BDL = torch.fft.irfft(x_BDF * h_DF, n=2 * L)[..., :L]
    return torch.addcmul(y_BDL, skip_D.to(dtype)[:, None], x_wide_BDL).to(x_BDL.dtype)
