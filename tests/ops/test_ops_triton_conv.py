# SPDX-License-Identifier: Apache-2.0
"""The kernels of short convolutions beside the slow references: on a GPU, and by Triton's interpreter without one."""

import pytest
import torch

pytest.importorskip("triton")

from evo2_megatron.ops.reference import causal_conv_ref, gated_conv_ref
from evo2_megatron.ops.triton_conv import causal_conv, gated_conv

pytestmark = [pytest.mark.any_device, pytest.mark.slow]

LENGTHS = (1, 2, 127, 128, 129, 251)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def gated_args(device, B, D, L, K, dtype=torch.float32):
    args = [torch.randn(shape, device=device, dtype=dtype) for shape in ((B, 3 * D, L), (3 * D, 3), (D, K))]
    # sums of 128 terms of the size of one
    return args[0], args[1], args[2] / K**0.5


@pytest.mark.parametrize("K", [1, 2, 7, 128, 129])
@pytest.mark.parametrize("L", LENGTHS)
def test_gated_conv(agree, device, L, K):
    agree(gated_conv, gated_conv_ref, gated_args(device, 2, 3, L, K), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("K", [7, 128])
def test_several_programs_along_the_sequence(agree, device, K):
    agree(gated_conv, gated_conv_ref, gated_args(device, 2, 2, 2100, K), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("K", [3, 128])
def test_several_programs_of_a_convolution(agree, device, K):
    x_BDL, taps_DK = torch.randn(2, 2, 4100, device=device), torch.randn(2, K, device=device)
    agree(causal_conv, causal_conv_ref, [x_BDL, taps_DK / K**0.5], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 2]])
def test_gradient_only_where_it_is_wanted(device, wanted):
    args = gated_args(device, 2, 3, 40, 7)
    leaves = [x.clone().requires_grad_() for x in args]
    weight = torch.randn(2, 3, 40, device=device)
    want = torch.autograd.grad(gated_conv(*leaves), leaves, weight)
    some = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(args)]
    got = torch.autograd.grad(gated_conv(*some), [some[i] for i in wanted], weight)
    assert all(torch.equal(g, want[i]) for g, i in zip(got, wanted))


def test_channels_of_a_token_next_to_each_other(agree, device):
    u_BEL, *taps = gated_args(device, 2, 3, 50, 7)
    agree(gated_conv, gated_conv_ref, [u_BEL.mT.contiguous().mT, *taps], rtol=1e-4, atol=1e-4)


def assert_close_in_sixteen_bits(function, reference, args):
    """Values and gradients, in the dtype of each argument."""
    args = [x.detach().requires_grad_() for x in args]
    wide = [x.detach().double().requires_grad_() for x in args]
    got, want = function(*args), reference(*wide)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=2e-2)
    weight = torch.randn_like(got)
    grads = torch.autograd.grad(got, args, weight), torch.autograd.grad(want, wide, weight.double())
    for x, g, w in zip(args, *grads):
        assert g.dtype == x.dtype
        torch.testing.assert_close(g.double(), w, rtol=2**-6, atol=2**-8 * w.abs().max().item())


@pytest.mark.parametrize("K", [7, 128])
@pytest.mark.parametrize("L", [200, 4200])
def test_sixteen_bits(device, K, L):
    args = gated_args(device, 1, 2, L, K, torch.bfloat16)
    assert_close_in_sixteen_bits(gated_conv, gated_conv_ref, args)


@pytest.mark.parametrize("K", [3, 128])
def test_convolution_of_sixteen_bits(device, K):
    x_BDL, taps_DK = torch.randn(1, 2, 300, device=device).bfloat16(), torch.randn(2, K, device=device) / K**0.5
    assert_close_in_sixteen_bits(causal_conv, causal_conv_ref, [x_BDL, taps_DK])


@pytest.mark.parametrize("K", [1, 3, 7, 128])
@pytest.mark.parametrize("L", LENGTHS)
def test_causal_conv(agree, device, L, K):
    x_BDL, taps_DK, history_BDP = (torch.randn(shape, device=device) for shape in ((2, 3, L), (3, K), (2, 3, K - 1)))
    agree(causal_conv, causal_conv_ref, [x_BDL, taps_DK], rtol=1e-4, atol=1e-4)
    if K > 1:
        want = causal_conv_ref(torch.cat([history_BDP, x_BDL], -1), taps_DK)[..., K - 1 :]
        torch.testing.assert_close(causal_conv(x_BDL, taps_DK, history_BDP), want, rtol=1e-4, atol=1e-4)


def test_too_many_taps(device):
    with pytest.raises(ValueError, match="up to 129 inner ones, not 3 and 130"):
        gated_conv(*gated_args(device, 1, 1, 5, 130))
    with pytest.raises(ValueError, match="up to 129 taps, not 130"):
        causal_conv(torch.ones(1, 1, 5, device=device), torch.ones(1, 130, device=device))
