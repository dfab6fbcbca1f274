# SPDX-License-Identifier: Apache-2.0
"""Sums over a reference and its alternatives, whose common start goes through the model once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from evo2_megatron.data.tokenizer import PAD
from evo2_megatron.tasks.scoring.allele_scoring import SharedContext


def log_probs(tokens_BS):
    """Of each token after all before it, float32: large numbers whose last digits tell contexts apart."""
    place_S = torch.arange(1, tokens_BS.shape[1] + 1)
    return -(1000 + (tokens_BS * place_S).cumsum(1) % 97 / 97).float()[:, 1:]


class Caches:
    """What has been seen."""

    def __init__(self, tokens_BS, room):
        self.tokens_BS, self.room = tokens_BS, room

    def copies(self, row_B):
        return Caches(self.tokens_BS[row_B], self.room)


class FakeRunner:
    """A model of ``log_probs``; padding gives NaN."""

    model = torch.nn.Linear(1, 1)

    def __init__(self, multiple):
        self.multiple, self.chunk_length = multiple, 65_536
        self.shapes = []

    def new_state(self, batch_size, max_tokens):
        return Caches(torch.zeros(batch_size, 0, dtype=torch.long), max_tokens)

    def extending(self, state, tokens_BS, next_BS):
        num_before = state.tokens_BS.shape[1]
        self.shapes.append(tuple(tokens_BS.shape))
        assert tokens_BS.shape[1] % self.multiple == 0
        state.tokens_BS = torch.cat([state.tokens_BS, tokens_BS], dim=1)
        assert state.tokens_BS.shape[1] <= state.room
        result = log_probs(torch.cat([state.tokens_BS, next_BS[:, -1:]], dim=1))[:, num_before:]
        yield
        return result.masked_fill(next_BS == PAD, torch.nan)


def make_items(num_shared):
    torch.manual_seed(0)
    items = [
        SimpleNamespace(tokens=torch.randint(65, 85, (301,)), alternatives=torch.randint(65, 85, (count, 301)))
        for count in (1, 3)
    ]
    for item in items:
        item.alternatives[:, : num_shared + 1] = item.tokens[: num_shared + 1]
    return [vars(item) | {"num_shared": torch.tensor(num_shared)} for item in items]


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("num_shared", [0, 5, 102])
@pytest.mark.parametrize("max_tokens", [1, 500, 10_000])
def test_sums_are_those_of_whole_sequences(multiple, num_shared, max_tokens):
    """In float64, within 1e-9 of 3e5; a sum in float32 is off by more than 1e-3."""
    items = make_items(num_shared)
    result = SharedContext(FakeRunner(multiple), max_tokens=max_tokens)(items)
    expected = {
        "reference": torch.cat([item["tokens"].expand(len(item["alternatives"]), -1) for item in items]),
        "alternative": torch.cat([item["alternatives"] for item in items]),
    }
    for name, tokens_BN in expected.items():
        torch.testing.assert_close(result[name], log_probs(tokens_BN).double().sum(1), rtol=0, atol=1e-9)
    assert result["num_scored"].tolist() == [300] * 4


def test_fewer_rows_at_a_time_with_shorter_pieces():
    runner = FakeRunner(1)
    run = SharedContext(runner, max_tokens=10_000)
    run(make_items(100))
    run.chunk_length = 402
    run(make_items(100))
    assert runner.shapes == [(2, 100), (6, 201), (2, 100), (2, 201), (2, 201), (2, 201)]
    assert runner.chunk_length == run.chunk_length == 402
