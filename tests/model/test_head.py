# SPDX-License-Identifier: Apache-2.0
"""Parts of a prediction head: pooling, layers, and the loss of each task."""

from __future__ import annotations

import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module")
def head(megatron):
    from evo2_megatron.model import head

    return head


def config(**values):
    fields = {
        "hidden_size": 6,
        "params_dtype": torch.float32,
        "head_outputs": ["a", "b", "c"],
        "head_hidden_size": None,
        "head_dropout": 0.0,
        "head_weights": None,
        "head_both_sides": False,
    }
    return SimpleNamespace(**(fields | values))


@pytest.mark.parametrize("width, num_parameters", [(None, 6 * 7 + 3 * 7), (4, 4 * 7 + 3 * 5), (0, 3 * 7)])
def test_width_of_the_head(head, width, num_parameters):
    module = head.PredictionHead(config(head_hidden_size=width))
    assert sum(p.numel() for p in module.parameters()) == num_parameters + 2 * 6  # and the norm's
    x = torch.randn(5, 6)
    normed = torch.nn.functional.layer_norm(x, (6,))
    hidden = normed
    if width != 0:
        hidden = torch.nn.functional.gelu(normed @ module.hidden.weight.t() + module.hidden.bias)
    torch.testing.assert_close(module(x), hidden @ module.outputs.weight.t() + module.outputs.bias)


def test_its_layers_are_called(head):
    """Megatron's hooks wait there for parameters that other processes still send."""
    module, called = head.PredictionHead(config()), []
    for name, layer in module.named_children():
        layer.register_forward_pre_hook(lambda layer, arguments, name=name: called.append(name))
    module(torch.randn(5, 6))
    assert called == ["norm", "hidden", "dropout", "outputs"]


def test_the_norm_begins_with_what_it_sees(head):
    torch.manual_seed(1)
    shared_H = 100 * torch.randn(6)
    pooled_NH = shared_H + torch.randn(50, 6) * torch.tensor([1.0, 0.1, 2.0, 1.0, 1.0, 1e-5])
    module = head.PredictionHead(config(head_hidden_size=0))
    module.begin_with(pooled_NH)
    module.outputs = torch.nn.Identity()
    module.outputs.weight = torch.zeros(())
    got_NH = module(pooled_NH)
    torch.testing.assert_close(got_NH.mean(0), torch.zeros(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(got_NH[:, :5].std(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)


def test_one_sequence_has_no_spread(head):
    module = head.PredictionHead(config())
    module.begin_with(torch.randn(1, 6))
    assert all(p.isfinite().all() for p in module.parameters())


def test_cross_entropy(head):
    scores = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[0.0], [2.0]])
    each = [math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(scores.tolist(), (0, 2))]
    loss, count, report = head.summed_loss(config(head_task="classification"), targets, scores)
    assert loss.item() == pytest.approx(sum(each)) and count.item() == 2 and count.dtype == torch.int
    assert report["ce loss"].tolist() == pytest.approx([sum(each), 2])
    assert report["accuracy"].tolist() == [1, 2]
    weighted = config(head_task="classification", head_weights=[0.5, 1.0, 4.0])
    assert head.summed_loss(weighted, targets, scores)[0].item() == pytest.approx(0.5 * each[0] + 4 * each[1])


def test_binary_cross_entropy(head):
    scores = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    targets = torch.tensor([[1.0, math.nan], [0.0, 1.0]])

    def of(score, target, weight=1.0):
        p = 1 / (1 + math.exp(-score))
        return -weight * math.log(p) if target else -math.log(1 - p)

    loss, count, report = head.summed_loss(config(head_task="multilabel"), targets, scores)
    assert count.item() == 3 and report["accuracy"].tolist() == [2, 3]
    assert loss.item() == pytest.approx(of(2.0, 1) + of(0.5, 0) + of(3.0, 1))
    weighted = config(head_task="multilabel", head_weights=[3.0, 5.0])
    want = of(2.0, 1, 3.0) + of(0.5, 0) + of(3.0, 1, 5.0)
    assert head.summed_loss(weighted, targets, scores)[0].item() == pytest.approx(want)


def test_squared_error_and_that_unknown_targets_have_no_gradient(head):
    outputs = torch.tensor([[0.5, 2.0], [-1.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[12.0, math.nan], [10.0, 5.0]])
    standard = config(head_task="regression", head_target_mean=[10.0, 4.0], head_target_scale=[2.0, 0.5])
    loss, count, report = head.summed_loss(standard, targets, outputs)
    assert loss.item() == pytest.approx((0.5 - 1) ** 2 + (-1 - 0) ** 2 + (0 - 2) ** 2)
    assert count.item() == 3 and "accuracy" not in report and "mse loss" in report
    loss.backward()
    assert outputs.grad.tolist() == [[-1.0, 0.0], [-2.0, -4.0]]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_lengths_are_what_8_bit_products_want(one_process, head, pooling):
    from evo2_megatron.model.provider import provider_for

    settings = {
        f.name: getattr(provider_for("evo2_tiny"), f.name) for f in fields(head.StripedHyenaProvider) if f.init
    }
    settings |= {"vocab_size": 512, "params_dtype": torch.float32, "bf16": False}
    provider = head.HeadProvider(**settings, head_outputs=["a", "b"], head_pooling=pooling)
    provider.finalize()
    model = provider.provide().eval()
    tokens_BL, mask_BL = torch.randint(65, 90, (2, 70)), torch.ones(2, 70, dtype=torch.bool)
    want = model.features(tokens_BL, mask_BL)
    lengths = []
    model.decoder.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0])))
    model.config.fp8 = "hybrid"
    for got in (model.features(tokens_BL, mask_BL), model.features_in_pieces(tokens_BL, mask_BL, chunk_length=100)):
        torch.testing.assert_close(got, want)
    assert lengths == [96, 64, 32]
