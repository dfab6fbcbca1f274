# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from evo2_megatron.ops.causal_conv import MIN_CONV1D_CHANNELS, causal_conv, causal_conv_step, last_inputs
from evo2_megatron.ops.reference import causal_conv_ref, last_inputs_ref

LENGTHS = (1, 2, 3, 6, 7, 8, 63, 64, 100, 126, 127, 128, 129, 200, 257, 509)
TAPS = (3, 7, 128)


def make(B, D, L, K, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype) for shape in ((B, D, L), (D, K), (B, D, K - 1))]


@pytest.mark.parametrize("K", TAPS)
@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("B, D", [(1, 1), (2, 3)])
def test_causal_conv(agree, B, D, L, K):
    agree(causal_conv, causal_conv_ref, make(B, D, L, K)[:2])


@pytest.mark.parametrize("K", TAPS)
@pytest.mark.parametrize("L", [1, 7, 129])
def test_channels_of_a_token_next_to_each_other(agree, L, K):
    x_BDL, taps_DK, _ = make(2, 3, L, K)
    agree(causal_conv, causal_conv_ref, [x_BDL.mT.contiguous().mT, taps_DK])


@pytest.mark.parametrize("K", [1, 2, *TAPS])
@pytest.mark.parametrize("L", [1, 3, 64, 129])
def test_history_comes_before_the_sequence(agree, L, K):
    agree(causal_conv, causal_conv_ref, make(2, 3, L, K))


@pytest.mark.parametrize("K", [9, 33, 128])
@pytest.mark.parametrize("L", [1, 8, 31, 32, 33, 129])
def test_many_channels(agree, L, K):
    agree(causal_conv, causal_conv_ref, make(2, MIN_CONV1D_CHANNELS, L, K)[:2])


@pytest.mark.parametrize("K", TAPS)
def test_slices_of_channels(agree, few_channels_at_a_time, K):
    agree(causal_conv, causal_conv_ref, make(2, 3, 100, K)[:2])


def test_gradient_only_where_it_is_wanted():
    x_BDL, taps_DK, _ = make(2, 3, 20, 7)
    weight = torch.randn_like(x_BDL)
    x_BDL.requires_grad_()
    (alone,) = torch.autograd.grad(causal_conv(x_BDL, taps_DK), x_BDL, weight)
    taps_DK.requires_grad_()
    together = torch.autograd.grad(causal_conv(x_BDL, taps_DK), (x_BDL, taps_DK), weight)
    (taps_alone,) = torch.autograd.grad(causal_conv(x_BDL.detach(), taps_DK), taps_DK, weight)
    assert torch.equal(alone, together[0])
    assert torch.equal(taps_alone, together[1])


@pytest.mark.parametrize("K", [1, *TAPS])
@pytest.mark.parametrize("cuts", [(1,), (5, 6, 130), (64, 128)])
def test_continuing_equals_one_call(K, cuts):
    x_BDL, taps_DK, _ = make(2, 3, 200, K)
    pieces, history_BDP = [], None
    for piece_BDL in x_BDL.tensor_split(cuts, dim=-1):
        pieces.append(causal_conv(piece_BDL, taps_DK, history_BDP))
        history_BDP = last_inputs(piece_BDL, K - 1, history_BDP)
    torch.testing.assert_close(torch.cat(pieces, dim=-1), causal_conv(x_BDL, taps_DK))


@pytest.mark.parametrize("K", [1, *TAPS])
def test_stepping_equals_convolving(K):
    x_BDL, taps_DK, _ = make(2, 3, 140, K)
    state_BDP = torch.zeros(2, 3, K - 1, dtype=torch.float64)
    stepped = torch.stack([causal_conv_step(x_BD, taps_DK, state_BDP) for x_BD in x_BDL.unbind(-1)], dim=-1)
    torch.testing.assert_close(stepped, causal_conv(x_BDL, taps_DK))
    assert torch.equal(state_BDP, last_inputs(x_BDL, K - 1))


@pytest.mark.parametrize("num_seen", [0, 2, 6])
@pytest.mark.parametrize("L", [1, 2, 5, 6, 7, 20])
@pytest.mark.parametrize("num", [0, 1, 6])
def test_last_inputs(num, L, num_seen):
    x_BDL, history_BDP = torch.randn(2, 3, L), torch.randn(2, 3, num_seen)
    assert torch.equal(last_inputs(x_BDL, num), last_inputs_ref(x_BDL, num))
    assert torch.equal(last_inputs(x_BDL, num, history_BDP), last_inputs_ref(x_BDL, num, history_BDP))


@pytest.mark.parametrize("D", [2, MIN_CONV1D_CHANNELS])
@pytest.mark.parametrize("K", TAPS)
def test_impulse_gives_the_reversed_taps(D, K):
    _, taps_DK, _ = make(1, D, 1, K)
    x_BDL = torch.zeros(1, D, K, dtype=torch.float64)
    x_BDL[..., 0] = 1
    torch.testing.assert_close(causal_conv(x_BDL, taps_DK)[0], taps_DK.flip(1))


@pytest.mark.parametrize("D", [2, MIN_CONV1D_CHANNELS])
@pytest.mark.parametrize("K", TAPS)
def test_it_is_causal_and_batch_mates_are_apart(D, K):
    x_BDL, taps_DK, _ = make(3, D, 100, K)
    want = causal_conv(x_BDL, taps_DK)
    other_BDL = x_BDL.clone()
    other_BDL[1, :, 60:] += 1e3
    other_BDL[2] = 1e3
    got = causal_conv(other_BDL, taps_DK)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1, :, :60], want[1, :, :60])


@pytest.mark.parametrize("D", [2, MIN_CONV1D_CHANNELS])
@pytest.mark.parametrize("K", TAPS)
@pytest.mark.parametrize("taps_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_rounded_once(D, K, taps_dtype):
    x_BDL, taps_DK, history_BDP = make(2, D, 50, K, torch.bfloat16)
    taps_DK = (taps_DK * 1.001).to(taps_dtype)
    got = causal_conv(x_BDL, taps_DK, history_BDP)
    want = causal_conv(x_BDL.double(), taps_DK.double(), history_BDP.double())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16(), rtol=2**-7, atol=1e-4)


def test_rows_that_do_not_lie_together():
    x_BDL, taps_DK, _ = make(2, 3, 50, 128)
    spread_BDL = x_BDL.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(causal_conv(spread_BDL, taps_DK), causal_conv(x_BDL, taps_DK))


@pytest.mark.gpu
@pytest.mark.parametrize("K", TAPS)
def test_on_cuda(agree, K):
    agree(causal_conv, causal_conv_ref, [x.cuda() for x in make(2, 32, 129, K)])
    single = [x.cuda().float() for x in make(2, 32, 129, K)]
    agree(causal_conv, causal_conv_ref, single, rtol=1e-4, atol=1e-3)
