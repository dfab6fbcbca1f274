# SPDX-License-Identifier: Apache-2.0
"""Two processes of test_frozen_features.py: each knows then what the other has computed."""

from __future__ import annotations

import torch

from evo2_megatron.config import ParallelConfig
from evo2_megatron.data.labelled_dataset import pad
from evo2_megatron.runtime.distributed import process_groups, rank
from model.test_frozen_features import SEQUENCES, count_passes, head_model, pooled_alone
from processes import fork


def check() -> None:
    with process_groups(ParallelConfig()):
        model = head_model()
        expected = torch.stack([pooled_alone(model, sequence) for sequence in SEQUENCES])
        sizes = count_passes(model)
        mine = [[0, 1], [2, 0]][rank()]
        for rows in (mine, [2, 1], [0, 3]):
            got = model.frozen_features(*pad([SEQUENCES[row] for row in rows], 30))
            torch.testing.assert_close(got, expected[rows], rtol=1e-4, atol=1e-5)
        assert sizes == [2, 1], sizes


if __name__ == "__main__":
    fork(2, check)
