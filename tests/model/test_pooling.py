# SPDX-License-Identifier: Apache-2.0
"""Vectors of sequences beside their definition, and that pieces and padding do not show in them."""

from __future__ import annotations

import math

import pytest
import torch

from evo2_megatron.model.pooling import Pool, without_padding

WAYS = {
    "mean": lambda own_LH: own_LH.mean(0),
    "last": lambda own_LH: own_LH[-1],
    range(2, 4): lambda own_LH: own_LH[1:3].mean(0) if len(own_LH) > 1 else torch.zeros(own_LH.shape[1]),
}


@pytest.mark.parametrize("piece", [1, 2, 5])
@pytest.mark.parametrize("lengths", [[1], [5, 3, 1], [2, 2]])
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_pool(how, lengths, piece):
    torch.manual_seed(0)
    hidden_BLH, mask_BL = torch.randn(len(lengths), 5, 7), torch.zeros(len(lengths), 5, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask_BL[row, :length] = True
    hidden_BLH[~mask_BL] = math.nan  # padding has no say, whatever is there
    pool = Pool(mask_BL, how)
    for start in range(0, 5, piece):
        pool.add(start, hidden_BLH[:, start : start + piece])
    for row, length in enumerate(lengths):
        torch.testing.assert_close(pool.vector_BH[row], WAYS[how](hidden_BLH[row, :length]))


def test_what_is_no_base_does_not_count():
    """A token in front, and tags that are masked."""
    pool = Pool(torch.tensor([[0, 1, 0, 1]]), range(2, 3))
    pool.add(0, torch.arange(4.0)[None, :, None])
    assert pool.vector_BH.tolist() == [[3.0]]


def test_sums_are_in_float32():
    pool = Pool(torch.ones(1, 1000), "mean")
    pool.add(0, torch.ones(1, 1000, 2, dtype=torch.bfloat16))  # whose sum bfloat16 does not hold
    assert pool.vector_BH.dtype == torch.float32
    torch.testing.assert_close(pool.vector_BH, torch.ones(1, 2))


def test_nothing_but_padding_is_cut_off():
    tokens_BS = torch.arange(12).view(2, 6)
    mask_BS = torch.tensor([[0, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    got = without_padding(tokens_BS, mask_BS, mask=mask_BS)
    assert [x.tolist() for x in got] == [tokens_BS[:, :4].tolist(), mask_BS[:, :4].tolist()]
