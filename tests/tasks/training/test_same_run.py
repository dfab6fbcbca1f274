# SPDX-License-Identifier: Apache-2.0
"""What a run can go on from; other settings are in test_train_resumed.py."""

import pytest
import torch

from evo2_megatron.checkpoint.distcp import write_tensors
from evo2_megatron.checkpoint.tensors import in_memory
from evo2_megatron.config import UserError


@pytest.mark.parametrize("kind", ["distributed.dp_group_idx_0.bucket_idx_0.param", "state.exp_avg.final_norm.weight"])
def test_only_with_an_optimizer(megatron, tmp_path, kind):
    from evo2_megatron.tasks.training.same_run import check_optimizer

    weights = {"embedding.word_embeddings.weight": in_memory(torch.ones(4, 2))}
    contents = {"trained": weights | {f"optimizer.{kind}": in_memory(torch.ones(8))}, "converted": weights}
    for name, tensors in contents.items():
        (tmp_path / name).mkdir()
        write_tensors(tensors, tmp_path / name)

    check_optimizer(tmp_path / "trained")
    with pytest.raises(UserError, match="converted holds weights and no optimizer state, .* --finetune-ckpt-dir"):
        check_optimizer(tmp_path / "converted")
