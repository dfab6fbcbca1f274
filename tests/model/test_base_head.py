# SPDX-License-Identifier: Apache-2.0
"""A head that tells something of each base: what it sees, and that batches, padding and pieces do not show."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from evo2_megatron.data.labelled_dataset import pad
from evo2_megatron.data.nucleotides import reverse_complement
from model.test_frozen_features import count_passes, head_model

SEQUENCES = [(b"ACGGTTAC" * 50)[:length] for length in (1, 2, 31, 127, 128, 129)]


def inputs_of(sequences, length, *, both_sides):
    tokens_BL, mask_BL = pad(sequences, length)
    opposite = [pad([reverse_complement(s) for s in sequences], length)[0]] if both_sides else []
    return tokens_BL, mask_BL, *opposite


def hidden_states(model, sequence):
    """Of one sequence by itself, without head, masks or padding."""
    with torch.no_grad():
        return model.through_layers(torch.tensor([list(sequence)]))[:, 0]


def seen(model, sequence):
    """The definition: hidden states of each base, and behind them those of its partner on the other strand."""
    forward_LH = hidden_states(model, sequence)
    if not model.config.head_both_sides:
        return forward_LH
    return torch.cat((forward_LH, hidden_states(model, reverse_complement(sequence)).flip(0)), dim=1)


@pytest.fixture(params=[False, True], ids=["one side", "both sides"])
def model(one_process, request):
    return head_model(head_per_base=True, head_both_sides=request.param)


@pytest.mark.parametrize("chunk_length", [None, 1, 7, 64])
def test_what_it_sees(model, chunk_length):
    sequences = SEQUENCES[:3] if chunk_length == 1 else SEQUENCES
    given = inputs_of(sequences, 135, both_sides=model.config.head_both_sides)
    if chunk_length is None:
        got = model.features(*given).detach()
    else:
        strands = 2 if model.config.head_both_sides else 1
        got = model.features_in_pieces(*given, chunk_length=chunk_length * strands * len(sequences))
    assert got.shape[:2] == (len(sequences), 135)
    for sequence, features_LF in zip(sequences, got, strict=True):
        torch.testing.assert_close(features_LF[: len(sequence)], seen(model, sequence), rtol=1e-4, atol=1e-5)


def test_outputs_and_their_gradients(model):
    """Of a batch: those of each sequence by itself. Padding has none."""
    from evo2_megatron.model.head import summed_loss

    config = model.config
    targets_BLT = torch.full((2, 40, 1), math.nan)
    for row, sequence in enumerate(SEQUENCES[1:3]):
        targets_BLT[row, : len(sequence), 0] = torch.arange(len(sequence)) % 2
    outputs_BLC = model(*inputs_of(SEQUENCES[1:3], 40, both_sides=config.head_both_sides))
    assert outputs_BLC.shape == (2, 40, 2)
    loss, count, _ = summed_loss(config, targets_BLT.flatten(0, 1), outputs_BLC.flatten(0, 1))
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = 0.0
    for row, sequence in enumerate(SEQUENCES[1:3]):
        alone_LC = model(*inputs_of([sequence], len(sequence), both_sides=config.head_both_sides))[0]
        of_row = torch.nn.functional.cross_entropy(
            alone_LC, targets_BLT[row, : len(sequence), 0].long(), reduction="sum"
        )
        of_row.backward()
        total += of_row.item()
    assert count.item() == 33 and loss.item() == pytest.approx(total, rel=1e-5)
    assert {"prediction_head.outputs.weight", "embedding.word_embeddings.weight"} <= set(got)
    for name, parameter in model.named_parameters():
        if name in got:
            scale = parameter.grad.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(got[name] / scale, parameter.grad / scale, rtol=0, atol=1e-4)


def test_a_base_of_one_side_knows_nothing_of_what_follows(one_process):
    outputs = {}
    for both_sides in (False, True):
        model = head_model(head_per_base=True, head_both_sides=both_sides)
        with torch.no_grad():
            outputs[both_sides] = model(*inputs_of([b"ACGTTGCA", b"ACGTTGCC"], 8, both_sides=both_sides))
    torch.testing.assert_close(outputs[False][0, :7], outputs[False][1, :7])
    assert (outputs[True][0, :7] - outputs[True][1, :7]).abs().amax(1).min() > 1e-6


def test_8_bit_products_want_their_lengths(model):
    given = inputs_of(SEQUENCES[2:4], 127, both_sides=model.config.head_both_sides)
    want = model.features(*given)
    lengths = []
    model.decoder.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[0])))
    model.config.fp8 = "hybrid"
    for got in (model.features(*given), model.features_in_pieces(*given, chunk_length=100)):
        assert got.shape == want.shape
        torch.testing.assert_close(got[1], want[1])
        torch.testing.assert_close(got[0, :31], want[0, :31])
    assert len(lengths) > 2 and all(length % 32 == 0 for length in lengths)


def test_a_sequence_is_computed_once_while_there_is_room(model):
    from evo2_megatron.model.frozen_features import FrozenFeatures

    both_sides = model.config.head_both_sides
    given = partial(inputs_of, both_sides=both_sides)
    row_bytes = 4 * model.config.hidden_size * (2 if both_sides else 1)
    features = FrozenFeatures(model, max_bytes=40 * row_bytes)
    passes = count_passes(model)
    rows = [SEQUENCES[2], SEQUENCES[1]]
    for _ in range(2):
        got = features(*given(rows, 50))
        assert got.shape[1] == 31
        for sequence, features_LF in zip(rows, got, strict=True):
            torch.testing.assert_close(features_LF[: len(sequence)], seen(model, sequence), rtol=1e-4, atol=1e-5)
    strands = 2 if both_sides else 1
    alone = [1] * strands * len(rows)  # passes of seen()
    assert passes == [2 * strands, *alone, *alone]
    passes.clear()
    for _ in range(2):  # there is room for seven bases
        features(*given([b"ACGTACGTA"], 9))
    assert passes == [strands, strands]
