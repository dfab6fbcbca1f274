# SPDX-License-Identifier: Apache-2.0
"""Projections rounded to 8 bits: the numbers, and that a result stays that of its own sequence alone."""

import pytest
import torch

from helpers import tiny_model

FLOAT8 = torch.float8_e4m3fn
SCALES = (3.7, 448 / 0.61)


def to_float8(x, scale):
    return (x.float() * scale).clamp(-448, 448).to(FLOAT8).double()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def projection(one_process, request):
    model = tiny_model(fp8_emulation=True, params_dtype=request.param, bf16=request.param == torch.bfloat16)
    with torch.no_grad():
        model.decoder.layers[0].mixer.dense_projection.layer_norm_weight.uniform_(0.2, 3)
    return model.decoder.layers[0].mixer.dense_projection


@pytest.mark.parametrize("scales", [(1.0, 1.0), SCALES])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_projection_against_torchs_casts(projection, scales, with_gradients):
    from evo2_megatron.model.fp8_linear import Scales
    from evo2_megatron.model.torch_modules import rms_norm

    projection.scales = Scales(*scales)
    torch.manual_seed(0)
    x_LBH = torch.randn(7, 2, 128, dtype=projection.weight.dtype)
    norm_LBH = rms_norm(x_LBH, projection.layer_norm_weight, 1e-6)
    expected = to_float8(norm_LBH, scales[0]) @ to_float8(projection.weight, scales[1]).T / (scales[0] * scales[1])
    with torch.set_grad_enabled(with_gradients):
        got, _ = projection(x_LBH)
    assert got.dtype == x_LBH.dtype
    # float32: order of the sum; bfloat16: one rounding of the sum and one of its product with the scales
    rtol = 1e-5 if got.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=1e-5)
    plain = norm_LBH.double() @ projection.weight.double().T
    assert (expected - plain).std() > 0.01 * plain.std()  # the rounding is not lost in the tolerance


def test_rounding_the_weight_once_changes_nothing(projection):
    from evo2_megatron.model.fp8_linear import Scales

    projection.scales = Scales(*SCALES)
    x_LBH = torch.randn(7, 2, 128, dtype=projection.weight.dtype)
    with torch.no_grad():
        before, _ = projection(x_LBH)
        weight = projection.weight.clone()
        projection.round_weight()
        after, _ = projection(x_LBH)
    assert torch.equal(before, after) and not torch.equal(weight, projection.weight)


def test_gradients_are_those_of_the_rounded_product(projection):
    """Straight through the rounding: what Transformer Engine computes before it rounds the gradient itself."""
    if projection.weight.dtype != torch.float32:
        pytest.skip("gradients are compared in float32")
    norm_LBH = torch.randn(5, 1, 128, requires_grad=True)
    y_LBE, _ = projection.product(norm_LBH)
    weights = torch.randn_like(y_LBE)
    by_norm, by_weight = torch.autograd.grad((y_LBE * weights).sum(), (norm_LBH, projection.weight))
    flat = weights.flatten(0, 1).double()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(by_norm.flatten(0, 1).double(), flat @ to_float8(projection.weight, 1.0), **close)
    torch.testing.assert_close(by_weight.double(), flat.T @ to_float8(norm_LBH, 1.0).flatten(0, 1), **close)


def test_only_hyena_projections_are_rounded(one_process):
    from evo2_megatron.model.fp8_linear import E4M3ColumnLinear

    model = tiny_model(fp8_emulation=True)
    rounded = [name for name, module in model.named_modules() if isinstance(module, E4M3ColumnLinear)]
    assert rounded == [f"decoder.layers.{i}.mixer.dense_projection" for i in range(3)]
    plain = tiny_model()
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}


@pytest.fixture(scope="module")
def loaded(one_process):
    from evo2_megatron.model.fp8_linear import Scales, fix_projections

    torch.manual_seed(3)
    model = tiny_model(fp8_emulation=True)
    fix_projections(model, {0: Scales(*SCALES), 2: Scales(11.0, 300.0)})
    return model


def test_a_result_depends_neither_on_batch_mates_nor_on_padding(loaded):
    torch.manual_seed(0)
    tokens_BL = torch.randint(65, 90, (3, 200))
    with torch.no_grad():
        alone = loaded(tokens_BL[:1, :150])
        among = loaded(torch.cat([tokens_BL, torch.full((1, 200), 300)]))[:1, :150]
    torch.testing.assert_close(among, alone, rtol=0, atol=2e-4)


@pytest.mark.parametrize("lengths", [[50] * 3, [1] * 40, [100, 1, 1, 48]])
def test_pieces_and_single_steps_equal_the_whole(loaded, lengths):
    torch.manual_seed(0)
    tokens_BL = torch.randint(65, 90, (2, sum(lengths)))
    with torch.no_grad():
        whole = loaded(tokens_BL)
        state = loaded.new_inference_state(*tokens_BL.shape)
        pieces = [loaded(part, inference_context=state) for part in tokens_BL.split(lengths, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=2e-4)


@pytest.fixture
def multiplied(one_process):
    """A model whose projections multiply 8 bits, and one with the same weights and scales that rounds to them."""
    from evo2_megatron.model.fp8_linear import Scales, fix_projections

    torch.manual_seed(3)
    models = tiny_model(fp8_projections=True), tiny_model(fp8_emulation=True)
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        fix_projections(model, {0: Scales(*SCALES), 2: Scales(11.0, 300.0)})
        if torch.cuda.is_available():
            model.cuda()
    return models


@pytest.mark.any_device
@pytest.mark.parametrize("shape", [(1, 1), (7, 2), (127, 1), (129, 3)])
def test_products_of_eight_bits_are_those_of_rounded_numbers(multiplied, shape):
    hardware, emulated = (model.decoder.layers[0].mixer.dense_projection for model in multiplied)
    assert hardware.weight.dtype == FLOAT8
    x_LBH = torch.randn(*shape, 128, device=hardware.weight.device)
    with torch.no_grad():
        got, want = hardware(x_LBH)[0], emulated(x_LBH)[0]
    # a GPU's sums are shorter than float32
    close = {"rtol": 1e-2, "atol": 1e-2} if x_LBH.is_cuda else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got, want, **close)


@pytest.mark.any_device
def test_models_with_products_of_eight_bits(multiplied):
    tokens_BL = torch.randint(65, 90, (2, 100), device=next(multiplied[0].parameters()).device)
    with torch.no_grad():
        got, want = (model(tokens_BL) for model in multiplied)
        state = multiplied[0].new_inference_state(2, 100)
        pieces = [multiplied[0](part, inference_context=state) for part in tokens_BL.split([60, 1, 39], dim=1)]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)
    torch.testing.assert_close(torch.cat(pieces, dim=1), got, rtol=0, atol=2e-3)


def test_products_in_sixteen_bits():
    from evo2_megatron.ops.fp8 import e4m3_matmul, to_e4m3

    x_TH, weight_DH = torch.randn(5, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    got = e4m3_matmul(x_TH, to_e4m3(weight_DH, SCALES[1]), *torch.tensor(SCALES))
    want = to_float8(x_TH, SCALES[0]) @ to_float8(weight_DH, SCALES[1]).T / (SCALES[0] * SCALES[1])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_on_a_gpu(one_process, dtype):
    model = tiny_model(fp8_emulation=True, params_dtype=dtype, bf16=dtype == torch.bfloat16).cuda()
    projection = model.decoder.layers[0].mixer.dense_projection
    x_LBH = torch.randn(7, 2, 128, dtype=dtype, device="cuda")
    with torch.no_grad():
        got, _ = projection(x_LBH)
        projection.cpu()
        expected, _ = projection(x_LBH.cpu())
    torch.testing.assert_close(got.cpu(), expected, rtol=0.1 if dtype == torch.bfloat16 else 1e-3, atol=0.02)
