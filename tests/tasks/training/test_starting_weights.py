# SPDX-License-Identifier: Apache-2.0
"""What is said of the weights that a fine-tuning begins with."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch

from helpers import tiny_model


@pytest.fixture
def model(one_process):
    torch.manual_seed(3)
    return tiny_model().train()


def losses(caplog) -> tuple[float, float]:
    match = re.search(r"per base: (\S+) with the loaded weights, (\S+) with random ones", caplog.text)
    return float(match[1]), float(match[2])


def knows_dna(model) -> dict[str, torch.Tensor]:
    """Weights that find A, C, G and T a hundred thousand times as probable as anything else."""
    weights = copy.deepcopy(model.state_dict())
    embedding = weights["embedding.word_embeddings.weight"]
    embedding[:] = -1.0
    embedding[list(b"ACGT")] = 1.0
    return weights


def test_weights_that_know_something(model, caplog):
    from evo2_megatron.tasks.training.starting_weights import load_and_compare

    weights = knows_dna(model)
    caplog.set_level(logging.INFO)
    load_and_compare(model, lambda: model.load_state_dict(weights), "fp32")
    loaded, random = losses(caplog)
    # the logarithms of 4 letters, and of 512 rows
    assert loaded == pytest.approx(1.386, abs=0.01) and random == pytest.approx(6.238, abs=0.2)
    assert model.training and "no better" not in caplog.text


def test_weights_that_know_nothing(model, caplog):
    from evo2_megatron.tasks.training.starting_weights import load_and_compare

    caplog.set_level(logging.INFO)
    load_and_compare(model, lambda: None, "fp32")
    loaded, random = losses(caplog)
    assert loaded == random and "no better there than random ones" in caplog.text


def test_weights_that_are_kept_in_8_bits_are_made_again(model):
    from evo2_megatron.tasks.training.starting_weights import load_and_compare

    layer = model.decoder.layers[0].mixer.dense
    model.config.fp8 = "hybrid"
    # as Transformer Engine's layers are after a first pass
    load_and_compare(model, lambda: setattr(layer, "is_first_microbatch", False), "fp32")
    assert layer.is_first_microbatch


def test_no_other_batch_goes_through_the_buffers_of_training(model, caplog):
    """Transformer Engine's products read as many tokens as its buffers hold, and made-up DNA has fewer."""
    from evo2_megatron.tasks.training.starting_weights import load_and_compare

    model.config.tp_comm_overlap = True
    caplog.set_level(logging.INFO)
    weights, passes = knows_dna(model), []
    model.register_forward_hook(lambda *_: passes.append(1))
    load_and_compare(model, lambda: model.load_state_dict(weights), "fp32")
    assert not passes and "made-up" not in caplog.text and model.training
    assert torch.equal(model.embedding.word_embeddings.weight, weights["embedding.word_embeddings.weight"])


def test_weights_in_8_bits_are_nothing_before(one_process, caplog):
    from evo2_megatron.model.quantized_linear import in_full_width
    from evo2_megatron.tasks.training.starting_weights import load_and_compare

    narrow, wide = tiny_model(quantize_weights="int8"), knows_dna(tiny_model())

    def load():
        with in_full_width(narrow, wide):
            narrow.load_state_dict(wide)

    caplog.set_level(logging.INFO)
    load_and_compare(narrow, load, "fp32")
    found = re.search(r"made-up bases with the loaded weights: (\S+) nat per base", caplog.text)
    assert float(found[1]) == pytest.approx(1.386, abs=0.01) and "random" not in caplog.text
