# SPDX-License-Identifier: Apache-2.0
"""The modal kernel beside the plain operator: on a GPU, and by Triton's interpreter without one."""

import pytest
import torch

pytest.importorskip("triton")

from evo2_megatron.ops.modal import modal_conv
from evo2_megatron.ops.reference import modal_conv_ref
from evo2_megatron.ops.triton_modal import modal_conv as triton_modal_conv

pytestmark = [pytest.mark.any_device, pytest.mark.slow]


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def modal_args(device, B, D, L, N=16):
    shapes = ((B, D, L), (D, N), (D, N), (D,))
    x_BDL, log_pole_DN, residue_DN, skip_D = (torch.randn(shape, device=device) for shape in shapes)
    return x_BDL, -log_pole_DN.abs() / 4 - 1e-3, residue_DN / N, skip_D


def assert_close(got, args, state_BDN=None, *, tolerance):
    """To the reference in double precision; the state relative to its largest number."""
    wide = [x.double() for x in args] + [None if state_BDN is None else state_BDN.double()]
    y_BDL, last_BDN = modal_conv_ref(*wide)
    torch.testing.assert_close(got.y_BDL.double(), y_BDL, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.state_BDN.double(), last_BDN, rtol=1e-4, atol=1e-5 * last_BDN.abs().max().item())


@pytest.mark.parametrize("L", [1, 2, 31, 32, 33, 127, 128, 129, 251, 1024, 2100])
def test_beside_the_plain_operator(agree, device, L):
    agree(triton_modal_conv, modal_conv, modal_args(device, 2, 2, L), rtol=1e-3, atol=1e-4)


def output(function):
    """Without the state, whose gradient the plain operator would compute."""
    return lambda *args: function(*args).y_BDL


@pytest.mark.parametrize("L", [1, 2, 31, 32, 33, 127, 128, 129, 251, 1024, 1057, 2100])
def test_gradients(agree, device, L):
    agree(output(triton_modal_conv), output(modal_conv), modal_args(device, 2, 2, L), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("N", [1, 5, 16, 20])
def test_any_number_of_modes(agree, device, N):
    args = modal_args(device, 2, 3, 70, N)
    assert_close(triton_modal_conv(*args), args, tolerance=1e-4)
    agree(output(triton_modal_conv), output(modal_conv), args, rtol=1e-3, atol=1e-4)


def test_gradient_only_where_it_is_wanted(device):
    args, weight = modal_args(device, 2, 2, 70), torch.randn(2, 2, 70, device=device)
    leaves = [x.clone().requires_grad_() for x in args]
    want = torch.autograd.grad(triton_modal_conv(*leaves).y_BDL, leaves, weight)
    some = [x.clone().requires_grad_(i in (0, 2)) for i, x in enumerate(args)]
    got = torch.autograd.grad(triton_modal_conv(*some).y_BDL, [some[0], some[2]], weight)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[2])


def test_gradients_of_sixteen_bits(device):
    x_BDL, *modes = modal_args(device, 2, 2, 1100)
    args = [x.requires_grad_() for x in (x_BDL.bfloat16(), *modes)]
    wide = [x.detach().double().requires_grad_() for x in args]
    weight = torch.randn(2, 2, 1100, device=device).bfloat16()
    got = torch.autograd.grad(triton_modal_conv(*args).y_BDL, args, weight)
    want = torch.autograd.grad(modal_conv(*wide).y_BDL, wide, weight.double())
    for x, g, w in zip(args, got, want):
        assert g.dtype == x.dtype
        torch.testing.assert_close(g.double(), w, rtol=2**-6, atol=2**-8 * w.abs().max().item())


@pytest.mark.parametrize("L", [1, 40, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(device, L, dtype):
    x_BDL, *modes = modal_args(device, 1, 2, L)
    args, state_BDN = [x_BDL.to(dtype), *modes], torch.randn(1, 2, 16, device=device)
    got = triton_modal_conv(*args, state_BDN)
    assert (got.y_BDL.dtype, got.state_BDN.dtype) == (dtype, torch.float32)
    assert_close(got, args, state_BDN, tolerance=2e-2)


@pytest.mark.parametrize("cut", [1, 32, 100, 128, 1024])
def test_in_two_pieces(device, cut):
    x_BDL, *modes = modal_args(device, 2, 2, 1200)
    first = triton_modal_conv(x_BDL[..., :cut], *modes)
    entering = first.state_BDN.clone()
    second = triton_modal_conv(x_BDL[..., cut:], *modes, first.state_BDN)
    assert torch.equal(first.state_BDN, entering)
    whole = second._replace(y_BDL=torch.cat([first.y_BDL, second.y_BDL], -1))
    assert_close(whole, [x_BDL, *modes], tolerance=1e-4)


def test_states_that_are_kept_for_a_million_tokens(device):
    """Poles of nearly one: the sum is as large as the sequence is long, and its steps as small as a token."""
    _, log_pole_DN, residue_DN, skip_D = modal_args(device, 1, 1, 1)
    x_BDL, log_pole_DN = torch.rand(1, 1, 5000, device=device), log_pole_DN * 1e-6
    args = [x_BDL, log_pole_DN, residue_DN, skip_D]
    assert_close(triton_modal_conv(*args), args, tolerance=1e-4)
