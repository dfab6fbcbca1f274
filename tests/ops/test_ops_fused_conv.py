# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from evo2_megatron.ops.causal_conv import causal_conv
from evo2_megatron.ops.fused_conv import gated_conv, gated_operator
from evo2_megatron.ops.reference import gated_conv_ref

LENGTHS = (1, 2, 6, 7, 8, 64, 126, 127, 128, 129, 200)


def make(B, D, L, K, dtype=torch.float64):
    """u, input_taps, inner_taps, skip."""
    return [torch.randn(shape, dtype=dtype) for shape in ((B, 3 * D, L), (3 * D, 3), (D, K), (D,))]


@pytest.mark.parametrize("K", [7, 128])
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("B, D", [(1, 1), (2, 3)])
def test_gated_conv(agree, B, D, L, K):
    agree(gated_conv, gated_conv_ref, make(B, D, L, K))


@pytest.mark.parametrize("K", [7, 128])
@pytest.mark.parametrize("L", [1, 7, 129])
def test_channels_of_a_token_next_to_each_other(agree, L, K):
    u_BEL, *rest = make(2, 3, L, K)
    agree(gated_conv, gated_conv_ref, [u_BEL.mT.contiguous().mT, *rest])


@pytest.mark.parametrize("K", [7, 128])
def test_without_skip(agree, K):
    agree(gated_conv, gated_conv_ref, make(2, 3, 64, K)[:3])


@pytest.mark.parametrize("K", [7, 128])
def test_slices_of_channels(agree, few_channels_at_a_time, K):
    agree(gated_conv, gated_conv_ref, make(2, 3, 100, K))


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [0, 2]])
def test_gradient_only_where_it_is_wanted(wanted):
    args = make(2, 3, 40, 7)
    weight = torch.randn(2, 3, 40, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in args]
    want = torch.autograd.grad(gated_conv(*leaves), leaves, weight)
    some = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(args)]
    got = torch.autograd.grad(gated_conv(*some), [some[i] for i in wanted], weight)
    for g, i in zip(got, wanted):
        assert torch.equal(g, want[i])


@pytest.mark.parametrize("K", [7, 128])
def test_it_equals_the_four_steps(K):
    u_BEL, input_taps_EK, inner_taps_DK, skip_D = make(2, 20, 150, K, torch.float32)
    post_gate, pre_gate, value = causal_conv(u_BEL, input_taps_EK).unflatten(1, (-1, 3)).unbind(2)
    z = pre_gate * value
    want = post_gate * (causal_conv(z, inner_taps_DK) + skip_D[:, None] * z)
    torch.testing.assert_close(gated_conv(u_BEL, input_taps_EK, inner_taps_DK, skip_D), want, rtol=1e-4, atol=1e-4)


def test_it_is_causal_and_batch_mates_are_apart():
    u_BEL, *taps = make(3, 3, 200, 128)
    want = gated_conv(u_BEL, *taps)
    other_BEL = u_BEL.clone()
    other_BEL[1, :, 90:] += 1e3
    other_BEL[2] = 1e3
    got = gated_conv(other_BEL, *taps)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1, :, :90], want[1, :, :90])


def test_bfloat16_is_rounded_once():
    args = make(2, 3, 60, 128, torch.bfloat16)
    got, want = gated_conv(*args), gated_conv(*(x.double() for x in args))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("cut", [1, 2, 5, 128, 199])
@pytest.mark.parametrize("K", [7, 128])
def test_in_two_pieces(few_channels_at_a_time, K, cut):
    u_BEL, input_taps_EK, inner_taps_DK, _ = make(2, 3, 200, K)
    want = gated_conv_ref(u_BEL, input_taps_EK, inner_taps_DK)
    history_BEP, inner_history_BDP = torch.zeros(2, 9, 2).double(), torch.zeros(2, 3, K - 1).double()

    def operator(x_BDL, channels):
        history = inner_history_BDP[:, channels]
        y_BDL = causal_conv(x_BDL, inner_taps_DK[channels], history)
        history.copy_(torch.cat([history, x_BDL], dim=-1)[..., x_BDL.shape[-1] :])
        return y_BDL

    pieces = [gated_operator(u, input_taps_EK, operator, history_BEP) for u in (u_BEL[..., :cut], u_BEL[..., cut:])]
    torch.testing.assert_close(torch.cat(pieces, dim=-1), want)
    assert torch.equal(history_BEP, u_BEL[..., -2:])


def test_any_operator_without_history():
    u_BEL, input_taps_EK, inner_taps_DK, _ = make(2, 3, 50, 7)
    got = gated_operator(u_BEL, input_taps_EK, lambda x_BDL, part: causal_conv(x_BDL, inner_taps_DK[part]))
    torch.testing.assert_close(got, gated_conv_ref(u_BEL, input_taps_EK, inner_taps_DK))


@pytest.mark.gpu
@pytest.mark.parametrize("K", [7, 128])
def test_on_cuda(agree, K):
    agree(gated_conv, gated_conv_ref, [x.cuda() for x in make(2, 3, 129, K)])
