# SPDX-License-Identifier: Apache-2.0
"""What a head sees of a backbone that does not learn: in pieces, once for each sequence, on whichever process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evo2_megatron.data.labelled_dataset import pad
from processes import launch

SEQUENCES = [b"ACGTTGCAAC", b"G", b"TTGACCA", b"ACGTTGCAACTTGACCAGGATTC"]


def head_model(**overrides):
    from dataclasses import fields

    from evo2_megatron.model.head import HeadProvider
    from evo2_megatron.model.provider import provider_for

    torch.manual_seed(0)
    backbone = provider_for("evo2_tiny", vocab_size=512, params_dtype=torch.float32, bf16=False)
    known = {field.name: getattr(backbone, field.name) for field in fields(backbone) if field.init}
    provider = HeadProvider(**known | {"head_outputs": ["a", "b"]} | overrides)
    provider.finalize()
    return provider.provide().eval()


@pytest.fixture
def model(one_process):
    return head_model()


def count_passes(model):
    """From now on, the sequences of each pass through the model."""
    sizes, through_layers = [], model.through_layers

    def counted(input_ids, *args):
        sizes.append(len(input_ids))
        return through_layers(input_ids, *args)

    model.through_layers = counted
    return sizes


@pytest.fixture
def passes(model):
    return count_passes(model)


def pooled_alone(model, sequence):
    tokens_BL, mask_BL = pad([sequence], len(sequence))
    with torch.no_grad():
        return model.features(tokens_BL, mask_BL)[0]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("chunk_length, longest", [(1, 31), (7, 129), (64, 383), (8192, 383)])
def test_pieces_do_not_show(one_process, pooling, chunk_length, longest):
    model = head_model(head_pooling=pooling)
    lengths = [length for length in (1, 2, 31, 127, 128, 129, 383) if length <= longest]
    sequences = [(b"ACGGTTAC" * 50)[:length] for length in lengths]
    got = model.features_in_pieces(*pad(sequences, longest), chunk_length=chunk_length * len(sequences))
    for sequence, vector in zip(sequences, got, strict=True):
        torch.testing.assert_close(vector, pooled_alone(model, sequence), rtol=1e-4, atol=1e-5)


def test_a_sequence_is_computed_once(model, passes):
    expected = torch.stack([pooled_alone(model, sequence) for sequence in SEQUENCES])
    passes.clear()
    model.train()
    # as often as it comes, in whatever batch, with whatever padding behind it
    for rows, length in (([0, 1, 0], 10), ([2, 1, 3], 40), ([3, 2, 1, 0], 23)):
        got = model.frozen_features(*pad([SEQUENCES[row] for row in rows], length))
        torch.testing.assert_close(got, expected[rows], rtol=1e-4, atol=1e-5)
    assert passes == [2, 2]


def test_memory_that_is_used_up(model, passes):
    from evo2_megatron.model.frozen_features import FrozenFeatures

    features = FrozenFeatures(model, max_bytes=2 * 4 * model.config.hidden_size)
    batch = pad(SEQUENCES, 23)
    first, second = features(*batch), features(*batch)
    assert passes == [4, 2]
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_what_learns(model):
    assert model.backbone_learns
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("prediction_head.")
    assert not model.backbone_learns


def test_processes_tell_each_other():
    launch(Path(__file__).with_name("frozen_features_worker.py"))


def test_padding_is_not_computed(model, monkeypatch):
    from evo2_megatron.model.frozen_features import FrozenFeatures

    through_layers, shapes = model.through_layers, []

    def noted(input_ids, *args):
        shapes.append(tuple(input_ids.shape))
        return through_layers(input_ids, *args)

    monkeypatch.setattr(model, "through_layers", noted)
    FrozenFeatures(model)(*pad([b"ACG", b"ACGTA"], 30))
    assert shapes == [(2, 5)]
