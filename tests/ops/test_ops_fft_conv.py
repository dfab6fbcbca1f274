# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from evo2_megatron.ops.causal_conv import causal_conv
from evo2_megatron.ops.fft_conv import fft_causal_conv
from evo2_megatron.ops.reference import fft_causal_conv_ref

LENGTHS = (1, 2, 3, 6, 7, 8, 63, 64, 100, 126, 127, 128, 129, 200, 257, 509)


def make(B, D, L, K, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype) for shape in ((B, D, L), (D, K), (D,))]


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("B, D", [(1, 1), (2, 3)])
def test_fft_causal_conv(agree, B, D, L):
    agree(fft_causal_conv, fft_causal_conv_ref, make(B, D, L, L))
    agree(fft_causal_conv, fft_causal_conv_ref, make(B, D, L, 128))
    agree(fft_causal_conv, fft_causal_conv_ref, make(B, D, L, 3))


def test_filter_longer_than_the_sequence_does_not_wrap():
    x_BDL, filter_DK, skip_D = make(1, 2, 90, 128)
    cut = fft_causal_conv(x_BDL, filter_DK[:, :90], skip_D)
    torch.testing.assert_close(fft_causal_conv(x_BDL, filter_DK, skip_D), cut)


def test_it_is_causal():
    x_BDL, filter_DK, skip_D = make(1, 2, 100, 128)
    other_BDL = x_BDL.clone()
    other_BDL[..., 60:] += 1e3
    got = fft_causal_conv(other_BDL, filter_DK, skip_D)[..., :60]
    torch.testing.assert_close(got, fft_causal_conv(x_BDL, filter_DK, skip_D)[..., :60])


def test_impulse_gives_the_stored_taps():
    _, filter_DK, _ = make(1, 2, 10, 10)
    x_BDL = torch.zeros(1, 2, 10, dtype=torch.float64)
    x_BDL[..., 0] = 1
    torch.testing.assert_close(fft_causal_conv(x_BDL, filter_DK, torch.zeros(2))[0], filter_DK)


@pytest.mark.parametrize("L", [1, 64, 126, 300])
def test_reversed_taps_give_the_correlation(L):
    x_BDL, filter_DK, skip_D = make(2, 3, L, 128)
    want = causal_conv(x_BDL, filter_DK.flip(1)) + skip_D[:, None] * x_BDL
    torch.testing.assert_close(fft_causal_conv(x_BDL, filter_DK, skip_D), want)


def test_bfloat16_is_rounded_once():
    x_BDL, filter_DK, skip_D = make(1, 3, 200, 128, torch.bfloat16)
    want = fft_causal_conv(x_BDL.double(), filter_DK.double(), skip_D.double())
    got = fft_causal_conv(x_BDL, filter_DK, skip_D)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16(), rtol=2**-7, atol=1e-4)
