# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from evo2_megatron.ops import modal
from evo2_megatron.ops.modal import modal_conv, modal_state, modal_step
from evo2_megatron.ops.reference import modal_conv_ref, modal_filter_ref

LENGTHS = (1, 2, 3, 6, 7, 8, 63, 64, 100, 126, 127, 128, 129, 200, 257, 509)
NUM_MODES = 16


def make(B, D, L, dtype=torch.float64, N=NUM_MODES):
    """x, log_pole, residue, skip, state; the poles remember between one token and some thousands."""
    log_pole_DN = -torch.exp(torch.linspace(-8, 1, N, dtype=dtype)) * (0.5 + torch.rand(D, N, dtype=dtype))
    shapes = ((B, D, L), (D, N), (D,), (B, D, N))
    x_BDL, residue_DN, skip_D, state_BDN = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return [x_BDL, log_pole_DN, residue_DN, skip_D, state_BDN]


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("B, D", [(1, 1), (2, 3)])
def test_modal_conv(agree, B, D, L):
    agree(modal_conv, modal_conv_ref, make(B, D, L)[:4])
    agree(modal_conv, modal_conv_ref, make(B, D, L))


@pytest.mark.parametrize("L", [1, 31, 32, 129, 3000])
def test_channels_of_a_token_next_to_each_other(agree, L):
    """As a linear layer gives them; the last length has more blocks than are done one by one."""
    x_BDL, *rest = make(2, 3, L, N=4)
    agree(modal_conv, modal_conv_ref, [x_BDL.mT.contiguous().mT, *rest[:3]])


@pytest.mark.parametrize("L", [1, 5, 6, 23, 24, 25, 77, 128])
def test_many_levels_of_the_scan(agree, monkeypatch, L):
    """Blocks of 3 and groups of 2: a short sequence goes through as many levels as one of millions of tokens."""
    monkeypatch.setattr(modal, "BLOCK_TOKENS", 3)
    monkeypatch.setattr(modal, "SCAN_RADIX", 2)
    monkeypatch.setattr(modal, "CPU_BLOCKS_ONE_BY_ONE", 2)
    agree(modal_conv, modal_conv_ref, make(2, 3, L, N=4))


def test_slices_of_channels(agree, few_channels_at_a_time):
    agree(modal_conv, modal_conv_ref, make(2, 3, 100, N=4))


def test_gradcheck():
    args = [x.requires_grad_() for x in make(1, 1, 40, N=2)]
    assert torch.autograd.gradcheck(lambda *a: tuple(modal_conv(*a)), args)


@pytest.mark.parametrize("wanted", [[0], [1, 2, 3], [4], [0, 2]])
def test_gradient_only_where_it_is_wanted(wanted):
    args = make(2, 3, 70)
    weight = torch.randn_like(args[0])
    leaves = [x.clone().requires_grad_() for x in args]
    want = torch.autograd.grad(modal_conv(*leaves).y_BDL, leaves, weight)
    some = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(args)]
    got = torch.autograd.grad(modal_conv(*some).y_BDL, [some[i] for i in wanted], weight)
    for g, i in zip(got, wanted):
        torch.testing.assert_close(g, want[i])


@pytest.mark.parametrize("L", [1, 64, 509])
def test_gradient_of_the_state_alone(L):
    args = [x.requires_grad_() for x in make(2, 3, L)]
    weight = torch.randn_like(args[-1])
    got = torch.autograd.grad(modal_conv(*args).state_BDN, args, weight, materialize_grads=True)
    want = torch.autograd.grad(modal_conv_ref(*args)[1], args, weight, materialize_grads=True)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("cuts", [(1,), (31, 32, 33), (128, 300), (7, 200, 201)])
def test_continuing_equals_one_call(cuts):
    x_BDL, *modes, _ = make(2, 3, 400)
    want = modal_conv(x_BDL, *modes)
    pieces, state_BDN = [], None
    for piece_BDL in x_BDL.tensor_split(cuts, dim=-1):
        y_BDL, state_BDN = modal_conv(piece_BDL, *modes, state_BDN)
        pieces.append(y_BDL)
    torch.testing.assert_close(torch.cat(pieces, dim=-1), want.y_BDL)
    torch.testing.assert_close(state_BDN, want.state_BDN)


def test_stepping_equals_convolving():
    x_BDL, log_pole_DN, residue_DN, skip_D, start_BDN = make(2, 3, 150)
    want = modal_conv(x_BDL, log_pole_DN, residue_DN, skip_D, start_BDN)
    state_BDN = start_BDN.clone()
    steps = [modal_step(x_BD, log_pole_DN.exp(), residue_DN, skip_D, state_BDN) for x_BD in x_BDL.unbind(-1)]
    torch.testing.assert_close(torch.stack(steps, dim=-1), want.y_BDL)
    torch.testing.assert_close(state_BDN, want.state_BDN)


def test_the_given_state_is_not_changed():
    *args, state_BDN = make(2, 3, 50)
    before = state_BDN.clone()
    modal_conv(*args, state_BDN)
    modal_state(args[0], args[1], state_BDN)
    assert torch.equal(state_BDN, before)


@pytest.mark.parametrize("L", [*LENGTHS, 512, 1100])
def test_modal_state(agree, L):
    x_BDL, log_pole_DN, residue_DN, skip_D, state_BDN = make(2, 3, L, N=4)

    def want(x_BDL, log_pole_DN, state_BDN=None):
        return modal_conv_ref(x_BDL, log_pole_DN, residue_DN, skip_D, state_BDN)[1]

    agree(modal_state, want, [x_BDL, log_pole_DN])
    agree(modal_state, want, [x_BDL, log_pole_DN, state_BDN])


def test_published_vector():
    p, scale, residue = torch.tensor([-1.0, 0.5]), torch.tensor([0.05, 0.02]), torch.tensor([[0.3, -0.2]])
    log_pole = -torch.exp(p) * scale
    torch.testing.assert_close(log_pole, torch.tensor([-0.01839397, -0.03297443]))
    want = torch.tensor([[0.1, 0.10101959, 0.10192840, 0.10273145, 0.10343356]])
    torch.testing.assert_close(modal_filter_ref(log_pole[None], residue, 5), want)
    impulse = torch.tensor([[[1.0, 0, 0, 0, 0]]])
    torch.testing.assert_close(modal_conv(impulse, log_pole[None], residue, torch.zeros(1)).y_BDL[0], want)


@pytest.mark.parametrize("L", [1, 33, 200])
def test_impulse_gives_the_filter_plus_skip(L):
    _, log_pole_DN, residue_DN, skip_D, _ = make(1, 3, L)
    x_BDL = torch.zeros(1, 3, L, dtype=torch.float64)
    x_BDL[..., 0] = 1
    want = modal_filter_ref(log_pole_DN, residue_DN, L)
    want[:, 0] += skip_D
    torch.testing.assert_close(modal_conv(x_BDL, log_pole_DN, residue_DN, skip_D).y_BDL[0], want)


def test_it_is_causal_and_batch_mates_are_apart():
    x_BDL, *modes, _ = make(3, 3, 700)
    want = modal_conv(x_BDL, *modes).y_BDL
    other_BDL = x_BDL.clone()
    other_BDL[1, :, 300:] += 1e3
    other_BDL[2] = 1e3
    got = modal_conv(other_BDL, *modes).y_BDL
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1, :, :300], want[1, :, :300])


@pytest.mark.parametrize("log_pole", [0.0, -50.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_poles(log_pole, dtype):
    x_BDL, _, residue_DN, skip_D, _ = make(1, 2, 600, torch.float32)
    args = [x.requires_grad_() for x in (x_BDL.to(dtype), torch.full_like(residue_DN, log_pole), residue_DN, skip_D)]
    got, want = modal_conv(*args), modal_conv_ref(*(x.double() for x in args))
    weight = torch.randn_like(want[0]).to(dtype)
    got_grads = torch.autograd.grad(got.y_BDL, args, weight)
    want_grads = torch.autograd.grad(want[0], args, weight.double())
    # a running sum (log-pole 0) loses digits in single precision; the result is rounded to its dtype once
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    for g, w in zip((*got, *got_grads), (*want, *want_grads)):
        assert g.isfinite().all()
        assert (g.double() - w.double()).norm() <= tolerance * w.double().norm()


def test_error_in_single_precision_at_length():
    x_BDL, *modes, _ = make(1, 4, 20_011)
    got = modal_conv(*(x.float() for x in (x_BDL, *modes))).y_BDL
    want, _ = modal_conv_ref(x_BDL, *modes)
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_bfloat16_is_rounded_once():
    x_BDL, *modes, state_BDN = make(2, 3, 200, torch.float32)
    got = modal_conv(x_BDL.bfloat16(), *modes, state_BDN)
    want = modal_conv(x_BDL.bfloat16().double(), *(m.double() for m in modes), state_BDN.double())
    assert got.y_BDL.dtype == torch.bfloat16
    assert got.state_BDN.dtype == torch.float32
    torch.testing.assert_close(got.y_BDL, want.y_BDL.bfloat16(), rtol=2**-7, atol=1e-4)
    assert modal_state(x_BDL.bfloat16(), modes[0]).dtype == torch.float32


def test_rows_that_do_not_lie_together():
    x_BDL, *modes, _ = make(2, 3, 96)
    spread_BDL = x_BDL.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(modal_conv(spread_BDL, *modes).y_BDL, modal_conv(x_BDL, *modes).y_BDL)


@pytest.mark.gpu
@pytest.mark.parametrize("L", [1, 129, 509])
def test_on_cuda(agree, L):
    agree(modal_conv, modal_conv_ref, [x.cuda() for x in make(2, 3, L)])
    single = [x.cuda() for x in make(2, 3, L, torch.float32)]
    agree(modal_conv, modal_conv_ref, single, rtol=1e-3, atol=1e-3)
