# SPDX-License-Identifier: Apache-2.0
"""Weights in 4 bits: the rounding, the layout in blocks of rows, and products by every way."""

import pytest
import torch

from evo2_megatron.ops import int4, int8
from evo2_megatron.ops.int4 import group_size, int4_product, quantize_groups
from evo2_megatron.ops.reference import int4_product_ref

LAST_DIGIT = 2**-8
"""Half a unit in the last place of bfloat16, relative, and a little more."""

PLAIN, KERNEL, BFLOAT16 = "neither", "torch's kernel", "torch's kernel and bfloat16"


@pytest.fixture(params=[PLAIN, KERNEL, BFLOAT16])
def processor(request, monkeypatch):
    """What a processor has of the two; the kernel only where this one has it."""
    if request.param == PLAIN:
        monkeypatch.setattr(int4, "_KERNEL_ROWS", {})
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: request.param == BFLOAT16)
    return request.param


def weights(rows, columns):
    torch.manual_seed(0)
    # rows of different size, and not around zero
    return torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None] + 0.3


def test_groups():
    assert [group_size(n) for n in (64, 128, 96, 352, 11_008, 48, 127, 1)] == [64, 64, 32, 32, 64, None, None, None]


def test_blocks_are_as_large_as_may_be_wide_at_a_time():
    """Where torch has no kernel; small blocks would be as many products on a GPU."""
    for num_rows, shape in ((7, (1, 8192, 4)), (8192, (1, 8192, 4096)), (22_528, (3, 8192, 3755))):
        packed = int4.empty_weights(num_rows, 8192, 64, torch.device("meta")).packed_NHR
        assert packed.shape == shape and 2 * packed[0].numel() <= int8.wide_numbers(packed.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, columns, group", [(1, 128, 64), (7, 128, 32), (129, 192, 64)])
def test_no_weight_is_off_by_more_than_half_a_step(processor, rows, columns, group, dtype):
    weight_DH = (torch.randn(rows, columns) + 0.5).to(dtype)
    pair = quantize_groups(weight_DH, group)
    wide_DH = torch.cat([wide_HD.T for _, wide_HD in int4._wide_blocks(pair, torch.float32)]).double()
    part_DGK = weight_DH.double().unflatten(1, (-1, group))
    step_DG1 = (part_DGK.amax(2) - part_DGK.amin(2))[..., None] / 15
    error_DGK = (wide_DH - weight_DH.double()).abs().unflatten(1, (-1, group))
    # s is rounded, 7 or 8 of it lie between the middle and the ends, and so is z
    assert (error_DGK <= 0.5 * step_DG1 + 2**-9 * (8.5 * step_DG1 + part_DGK.abs().amax(2, True))).all()
    assert pair.packed_NHR.dtype == torch.uint8 and pair.scale_zero_GD2.dtype == torch.bfloat16
    assert error_DGK.mean() > 0.1 * step_DG1.mean()  # and they are rounded


def test_the_layout_is_that_of_torch():
    """Bytes as torch packs them for its kernel on this processor."""
    rows = int4._kernel_rows()
    if rows is None:
        pytest.skip("torch has no kernel for this layout on this processor")
    q_DH = torch.randint(16, (2 * rows, 64), dtype=torch.int32)
    # a range of 15 steps of one in each group, so that the levels are the numbers
    q_DH[:, 0], q_DH[:, 1] = 0, 15
    packed = torch._convert_weight_to_int4pack_for_cpu(q_DH, 1)
    assert torch.equal(quantize_groups(q_DH.float(), 64).packed_NHR.flatten(), packed.flatten())


def test_numbers_that_are_not_finite_show_in_every_result(processor):
    weight_DH = torch.ones(4, 64)
    weight_DH[0], weight_DH[1, 3], weight_DH[2, 3] = 0, torch.nan, torch.inf
    # groups of one number: what 0 / 0 is as an integer is up to the processor
    assert (quantize_groups(weight_DH, 64).scale_zero_GD2[0, [0, 3], 0] == 1).all()
    for num_tokens in (1, 100):
        y_TD = int4_product(torch.ones(num_tokens, 64), quantize_groups(weight_DH, 64))
        assert (y_TD[:, 0] == 0).all() and not y_TD[:, 1:3].isfinite().any()
        torch.testing.assert_close(y_TD[:, 3], torch.full((num_tokens,), 64.0), rtol=LAST_DIGIT, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns, group", [(1, 64, 64), (127, 128, 64), (131, 96, 32), (256, 192, 64)])
@pytest.mark.parametrize("num_tokens", [1, 2, 96, 97, 129])
def test_products(monkeypatch, processor, rows, columns, group, num_tokens, dtype):
    monkeypatch.setattr(int8, "_BLOCK_NUMBERS", 70 * columns)
    weight_DH = weights(rows, columns)
    x_TH = torch.randn(num_tokens, columns).to(dtype)
    got = int4_product(x_TH, quantize_groups(weight_DH, group))
    want = int4_product_ref(x_TH, weight_DH, group)
    assert got.dtype == dtype
    # one rounding to bfloat16, and float32 sums of terms that cancel, or of weights rounded once more
    size_TD = x_TH.double().abs() @ weight_DH.double().abs().T
    allowed_TD = LAST_DIGIT * want.abs() + (LAST_DIGIT / 2 if processor == BFLOAT16 else 1e-5) * size_TD
    assert ((got.double() - want).abs() <= allowed_TD).all()
    assert torch.equal(got, got.bfloat16().to(dtype))
    if rows > 1:  # weights that are not rounded are told apart
        plain = x_TH.double() @ weight_DH.double().T
        assert ((plain - want).abs() > allowed_TD).any()


def test_a_token_does_not_depend_on_the_others(processor):
    pair = quantize_groups(torch.randn(96, 128), 64)
    x_TH = torch.randn(160, 128)
    whole_TD = int4_product(x_TH, pair)
    for tokens in (slice(0, 1), slice(7, 31), slice(20, 150)):
        difference_TD = int4_product(x_TH[tokens], pair) - whole_TD[tokens]
        assert difference_TD.norm() <= LAST_DIGIT * whole_TD[tokens].norm()


def test_channels_that_lie_apart():
    pair = quantize_groups(torch.randn(96, 128), 64)
    x_TH = torch.randn(128, 5).T
    assert torch.equal(int4_product(x_TH, pair), int4_product(x_TH.contiguous(), pair))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns", [(1, 64), (127, 128), (131, 192)])
@pytest.mark.parametrize("num_tokens", [1, 129])
def test_gradients(monkeypatch, processor, rows, columns, num_tokens, dtype):
    """Of the inputs: straight through the roundings, those of the rounded weights."""
    monkeypatch.setattr(int8, "_BLOCK_NUMBERS", 70 * columns)
    weight_DH = torch.randn(rows, columns)
    pair = quantize_groups(weight_DH, 64)
    x_TH = torch.randn(num_tokens, columns).to(dtype).requires_grad_()
    grad_TD = torch.randn(num_tokens, rows).to(dtype)
    int4_product(x_TH, pair).backward(grad_TD)
    want = grad_TD.double() @ int4_product_ref(torch.eye(columns), weight_DH, 64).T
    # in bfloat16 what goes into the sums is rounded, too
    tolerance = 1e-5 if dtype == torch.float32 else 2 * LAST_DIGIT
    assert x_TH.grad.dtype == dtype
    assert (x_TH.grad.double() - want).norm() <= tolerance * want.norm()
    with torch.no_grad():
        assert not int4_product(x_TH, pair).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 24, 25, 129])
def test_products_on_a_gpu(num_tokens):
    weight_DH, x_TH = weights(131, 192), torch.randn(num_tokens, 192)
    got = int4_product(x_TH.cuda(), quantize_groups(weight_DH.cuda(), 64)).cpu().double()
    want = int4_product_ref(x_TH, weight_DH, 64)
    # wide weights are rounded to bfloat16 there
    size_TD = x_TH.double().abs() @ weight_DH.double().abs().T
    assert ((got - want).abs() <= LAST_DIGIT * (want.abs() + size_TD)).all()
