# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from helpers import tiny_model


@pytest.fixture(scope="module")
def model(one_process):
    # both styles have all parameters between them; this one has the biases of the short operator
    return tiny_model("striped_hyena_tiny_nv")


def exempt(model, *, embeddings: bool) -> set[str]:
    """Names without weight decay, as Megatron groups them."""
    from megatron.bridge.training.config import (
        OptimizerConfig,
        OptimizerConfigOverrideProviderContext,
        SchedulerConfig,
    )
    from megatron.core.optimizer import _get_param_groups

    from evo2_megatron.model.param_groups import HyenaWeightDecay

    config = OptimizerConfig(optimizer="adam", lr=1.0, min_lr=0.0)
    context = OptimizerConfigOverrideProviderContext(SchedulerConfig(), config, [model])
    overrides = HyenaWeightDecay(embeddings=embeddings).build_config_overrides(context)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = _get_param_groups([model], config, overrides)
    assert {group["wd_mult"] for group in groups} == {0.0, 1.0}
    return {names[id(p)] for group in groups if group["wd_mult"] == 0.0 for p in group["params"]}


def test_exemptions(model):
    found = exempt(model, embeddings=True)
    several = {name for name, p in model.named_parameters() if p.dim() > 1 and name in found}
    assert {name for name, p in model.named_parameters() if p.dim() == 1} <= found
    # layers 0 to 3 are S, D, H and attention
    assert several == {
        "decoder.layers.0.mixer.mixer.short_conv.short_conv_weight",
        "decoder.layers.1.mixer.mixer.filter.h",
        "decoder.layers.2.mixer.mixer.filter.p",
        "decoder.layers.2.mixer.mixer.filter.R",
        "decoder.layers.2.mixer.mixer.filter.gamma",
    }


def test_decayed(model):
    decayed = {name for name, _ in model.named_parameters()} - exempt(model, embeddings=True)
    assert "embedding.word_embeddings.weight" in decayed
    assert "decoder.layers.0.mixer.hyena_proj_conv.short_conv_weight" in decayed


def test_embeddings_on_request(model):
    added = exempt(model, embeddings=False) - exempt(model, embeddings=True)
    assert added == {"embedding.word_embeddings.weight"}


def test_both_copies_of_a_tied_table(one_process, monkeypatch):
    """The last of several pipeline stages has the embedding as its output layer, and the two must stay equal."""
    from megatron.core.models.common.language_module import language_module

    from evo2_megatron.model.provider import provider_for

    monkeypatch.setattr(language_module, "is_pp_first_stage", lambda group: False)
    provider = provider_for("evo2_tiny", vocab_size=512, pipeline_model_parallel_size=2, pipeline_dtype=torch.bfloat16)
    provider.finalize()
    last_stage = provider.provide(pre_process=False, post_process=True)
    assert "output_layer.weight" not in exempt(last_stage, embeddings=True)
    assert "output_layer.weight" in exempt(last_stage, embeddings=False)
