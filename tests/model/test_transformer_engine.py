# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's layers, and FP8 recipes, beside the plain layers."""

import pytest
import torch

from helpers import tiny_model

pytestmark = pytest.mark.gpu

RECIPES = {
    "bf16_with_fp8_delayed_scaling_mixed": (8, 9),
    "bf16_with_fp8_current_scaling_mixed": (8, 9),
    "nemotron_h_bf16_with_fp8_current_scaling_mixed": (8, 9),
    "nanov2_bf16_with_fp8_current_scaling_mixed": (9, 0),
    "bf16_with_fp8_subchannel_scaling_mixed": (9, 0),
    "bf16_with_mxfp8_mixed": (10, 0),
    "bf16_with_nvfp4_mixed": (10, 0),
}
"""Name to the compute capability that it needs."""


@pytest.fixture(autouse=True)
def _with_transformer_engine(one_process):
    from evo2_megatron.runtime.megatron import have_transformer_engine

    if not have_transformer_engine():
        pytest.skip("Transformer Engine is not installed")


@pytest.fixture
def without(monkeypatch):
    """Build a model as on a machine without Transformer Engine."""

    def build(**overrides):
        monkeypatch.setattr("evo2_megatron.model.layer_specs.have_transformer_engine", lambda: False)
        model = tiny_model(**overrides)
        monkeypatch.undo()
        return model.cuda()

    return build


def loss_and_gradients(model, tokens_BL):
    loss = model(tokens_BL[:, :-1], labels=tokens_BL[:, 1:]).float().mean()
    loss.backward()
    return loss.detach(), {name: weight.grad.float() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("length", [2, 129, 512])
def test_layers_equal_the_plain_ones(without, length):
    settings = {"params_dtype": torch.bfloat16, "bf16": True}
    torch.manual_seed(0)
    fused, plain = tiny_model(**settings).cuda(), without(**settings)
    weights = {name: value for name, value in fused.state_dict().items() if "_extra_state" not in name}
    plain.load_state_dict(weights)
    tokens_BL = torch.randint(65, 90, (2, length), device="cuda")
    (got, got_gradients), (want, want_gradients) = (loss_and_gradients(model, tokens_BL) for model in (fused, plain))
    tolerance = 2e-2
    torch.testing.assert_close(got, want, rtol=tolerance, atol=0)
    for name, expected in want_gradients.items():
        difference = (got_gradients[name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert difference < 5 * tolerance, name


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("length", [1, 2, 127, 129])
def test_scores_in_eight_bits(recipe, length):
    from megatron.core.fp8_utils import prepare_model_for_fp8_inference

    from evo2_megatron.runtime.precision import precision_settings
    from evo2_megatron.tasks.scoring.prediction_runner import Runner
    from evo2_megatron.tasks.scoring.prediction_settings import Output

    if torch.cuda.get_device_capability() < RECIPES[recipe]:
        pytest.skip("this GPU lacks the format")
    tokens_L = torch.randint(65, 90, (length,))
    item = {"tokens": tokens_L, "loss_mask": torch.ones_like(tokens_L), "seq_idx": torch.tensor(0)}
    weights, scores = {}, []
    for name in ("bf16_mixed", recipe):
        values = {field: value for field, value in vars(precision_settings(name)).items() if value is not None}
        known = tiny_model().config
        values = {field: value for field, value in values.items() if hasattr(known, field)}
        model = tiny_model(**values | {"fp8_param": False}).cuda().eval()  # as a checkpoint is loaded
        # random states of a GPU go on from model to model
        weights = weights or {key: value for key, value in model.state_dict().items() if "_extra_state" not in key}
        model.load_state_dict(weights, strict=False)
        if name == recipe:
            prepare_model_for_fp8_inference(model)
        scores.append(Runner(model, Output(log_probs="mean"), precision=name)([item])["log_likelihood"])
    torch.testing.assert_close(scores[1], scores[0], rtol=0.05, atol=0.1)
