# SPDX-License-Identifier: Apache-2.0
"""Random training samples."""

import pytest
import torch

from evo2_megatron.data.mock import MockEvo2Dataset


def test_samples():
    dataset = MockEvo2Dataset(5, 1000, seed=1, split=0)
    sample = dataset[3]

    assert len(dataset) == 5
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
        "tokens": (torch.int64, (1000,)),
        "labels": (torch.int64, (1000,)),
        "loss_mask": (torch.float32, (1000,)),
        "position_ids": (torch.int64, (1000,)),
    }
    counts = torch.bincount(sample["tokens"])
    assert counts.nonzero().flatten().tolist() == [65, 67, 71, 84]
    assert counts[counts > 0].min() > 200
    assert sample["loss_mask"].min() == 1
    assert sample["position_ids"].tolist() == list(range(1000))


def test_seed_split_and_number_decide():
    def tokens(seed, split, idx):
        return tuple(MockEvo2Dataset(5, 50, seed=seed, split=split)[idx]["tokens"].tolist())

    assert tokens(1, 0, 0) == tokens(1, 0, 0)
    assert len({tokens(1, 0, 0), tokens(2, 0, 0), tokens(1, 1, 0), tokens(1, 0, 1), tokens(0, 1, 0)}) == 5


@pytest.mark.parametrize("idx", [-1, 5])
def test_number_out_of_range(idx):
    with pytest.raises(IndexError):
        MockEvo2Dataset(5, 10, seed=1, split=0)[idx]
