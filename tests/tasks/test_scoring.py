# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities against a computation in float64 that follows the definition."""

import pytest
import torch

from evo2_megatron.tasks import scoring
from evo2_megatron.tasks.scoring import collapse_log_probs, next_token_log_probs


def log_probs_ref(logits_BLV, next_BL):
    return torch.log(torch.softmax(logits_BLV.double(), -1)).gather(-1, next_BL[..., None])[..., 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 127, 128, 129])
def test_next_token_log_probs(length, dtype):
    torch.manual_seed(0)
    logits_BLV = (10 * torch.randn(3, length, 512)).to(dtype)
    before, next_BL = logits_BLV.clone(), torch.randint(512, (3, length))

    got = next_token_log_probs(logits_BLV, next_BL)

    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), log_probs_ref(logits_BLV, next_BL), rtol=1e-6, atol=1e-5)
    assert torch.equal(logits_BLV, before)


def test_pieces_make_no_difference(monkeypatch):
    torch.manual_seed(0)
    logits_BLV, next_BL = torch.randn(2, 101, 16), torch.randint(16, (2, 101))
    whole = next_token_log_probs(logits_BLV, next_BL)
    monkeypatch.setattr(scoring, "_PIECE_VALUES", 16 * 7)
    assert torch.equal(next_token_log_probs(logits_BLV, next_BL), whole)


def test_a_split_vocabulary(one_process):
    # a group of one takes the code of many; two processes are in test_predict_distributed.py
    torch.manual_seed(0)
    logits_BLV, next_BL = 10 * torch.randn(2, 50, 32), torch.randint(32, (2, 50))
    got = next_token_log_probs(logits_BLV, next_BL, vocab_group=torch.distributed.group.WORLD)
    torch.testing.assert_close(got.double(), log_probs_ref(logits_BLV, next_BL), rtol=1e-6, atol=1e-5)


def test_collapse():
    log_probs_BL = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, float("nan"), float("-inf")], [float("nan")] * 3])
    counts_BL = torch.tensor([[True, True, True], [True, False, False], [False] * 3])
    assert collapse_log_probs(log_probs_BL, counts_BL, "sum").tolist() == [-7, -8, 0]
    assert collapse_log_probs(log_probs_BL, counts_BL, "mean").tolist() == pytest.approx([-7 / 3, -8, 0])
    assert collapse_log_probs(log_probs_BL, counts_BL, "per_token").tolist() == [[-1, -2, -4], [-8, 0, 0], [0, 0, 0]]


def test_a_million_terms_lose_no_digit():
    log_probs_BL = torch.full((1, 1_000_000), -1.1)
    total = collapse_log_probs(log_probs_BL, torch.ones(1, 1_000_000, dtype=torch.bool), "sum")
    assert total.item() == torch.tensor(-1.1).double().mul(1_000_000).float().item()
