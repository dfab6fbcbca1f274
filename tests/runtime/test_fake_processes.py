# SPDX-License-Identifier: Apache-2.0
"""Tensors without memory are treated as a GPU would treat real ones."""

import pytest
import torch

from evo2_megatron.config import ParallelConfig


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_norm_keeps_its_input_and_a_number_for_each_token(megatron, dtype):
    from evo2_megatron.model.torch_modules import rms_norm
    from evo2_megatron.runtime.fake_processes import fake_processes
    from evo2_megatron.runtime.memory_tracker import MemoryTracker

    with fake_processes(ParallelConfig(), rank=0, world_size=1), MemoryTracker() as tracker:
        x_LBH = torch.empty(100, 2, 64, dtype=dtype, requires_grad=True)
        weight_H = torch.ones(64, dtype=dtype, requires_grad=True)
        before = tracker.live_bytes
        y_LBH = rms_norm(x_LBH, weight_H, 1e-6)
        assert (y_LBH.shape, y_LBH.dtype) == (x_LBH.shape, dtype)
        assert tracker.live_bytes - before == x_LBH.nbytes + 100 * 2 * 4
        y_LBH.sum().backward()
    assert (x_LBH.grad.shape, weight_H.grad.shape) == (x_LBH.shape, (64,))


def test_numbers_that_the_code_writes_down_are_known(megatron):
    from evo2_megatron.runtime.fake_processes import fake_processes

    with fake_processes(ParallelConfig(), rank=0, world_size=1):
        assert torch.tensor([7]).item() == 7
        assert torch.tensor([7], device="cuda").is_meta and torch.zeros(1).is_meta
