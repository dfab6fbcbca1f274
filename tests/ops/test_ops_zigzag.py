# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from evo2_megatron.ops.reference import zigzag_order_ref
from evo2_megatron.ops.zigzag import (
    from_zigzag,
    zigzag_inverse,
    zigzag_order,
    zigzag_split,
    zigzag_unsplit,
)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_order_and_inverse(num_ranks):
    order = zigzag_order(num_ranks)
    assert order == zigzag_order_ref(num_ranks)
    assert [order[i] for i in zigzag_inverse(num_ranks)] == list(range(2 * num_ranks))


def test_two_ranks_hold_the_ends_and_the_middle():
    x = torch.arange(8)
    assert zigzag_split(x, 0, num_ranks=2, rank=0).tolist() == [0, 1, 6, 7]
    assert zigzag_split(x, 0, num_ranks=2, rank=1).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_split_and_join(num_ranks, dim):
    x = torch.randn(12, 24, 36)
    parts = [zigzag_split(x, dim, num_ranks=num_ranks, rank=r) for r in range(num_ranks)]
    assert all(part.shape[dim] == x.shape[dim] // num_ranks for part in parts)
    assert torch.equal(from_zigzag(torch.cat(parts, dim=dim), num_ranks, dim), x)
    assert torch.equal(zigzag_unsplit(parts, dim), x)


def test_uneven_length_is_refused():
    with pytest.raises(ValueError, match="10 is not a multiple of 4"):
        zigzag_split(torch.zeros(10), 0, num_ranks=2, rank=0)
    with pytest.raises(ValueError, match="10 is not a multiple of 4"):
        from_zigzag(torch.zeros(10), 2, 0)
