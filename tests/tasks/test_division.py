# SPDX-License-Identifier: Apache-2.0
"""Over how many GPUs ``--devices auto`` divides a model: what its weights take, and what divides it."""

from __future__ import annotations

from functools import partial
from typing import get_args

import pytest

from checkpoint.tiny_adapters import write_tiny_adapters
from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.checkpoint.load import load_model, stored_shapes
from evo2_megatron.checkpoint.run_config import read_run_config
from evo2_megatron.config import ParallelConfig, UserError, WeightFormat
from evo2_megatron.tasks.division import SHARE_OF_WEIGHTS, tensor_parallel_size, weight_bytes

HEADS = 6


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    heads = {"num_attention_heads": HEADS, "hidden_size": 384, "ffn_hidden_size": 1152}
    groups = {"num_groups_hyena": 384, "num_groups_hyena_medium": 48, "num_groups_hyena_short": 48}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("division"), rows=528, **heads, **groups)


@pytest.mark.parametrize("weights_in", get_args(WeightFormat))
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_what_the_weights_take(checkpoint, precision, weights_in):
    from evo2_megatron.runtime.distributed import process_groups

    with process_groups(ParallelConfig(), seed=1):
        overrides = {"quantize_weights": weights_in}
        given = {"precision": precision, "provider_overrides": overrides}
        model = load_model(checkpoint, parallel=ParallelConfig(), **given).model
        real = sum(tensor.untyped_storage().nbytes() for tensor in [*model.parameters(), *model.buffers()])
    said = weight_bytes(
        read_run_config(checkpoint), stored_shapes(checkpoint), precision=precision, quantize_weights=weights_in
    )
    assert said == pytest.approx(real, rel=0.02)


def test_the_fewest_gpus_that_divide_the_heads(checkpoint, tmp_path, caplog):
    needed = weight_bytes(read_run_config(checkpoint), stored_shapes(checkpoint))
    adapters = write_tiny_adapters(tmp_path, checkpoint)
    for given in (checkpoint, adapters):
        size = partial(tensor_parallel_size, given, base_ckpt_dir=None, precision=None, quantize_weights=None)
        fits = needed / SHARE_OF_WEIGHTS
        assert size(num_gpus=8, gpu_bytes=int(fits) + 1) == 1
        assert size(num_gpus=8, gpu_bytes=int(fits) - 1) == 2
        assert size(num_gpus=8, gpu_bytes=int(fits / 3) + 1) == 3
        assert size(num_gpus=8, gpu_bytes=int(fits / 4) + 1) == HEADS  # four and five do not divide six heads
        with pytest.raises(UserError, match="take 0.0 GB, and 5 GPUs of 0.0 GB cannot hold them; take"):
            size(num_gpus=5, gpu_bytes=int(fits / 4) + 1)
    half = partial(tensor_parallel_size, checkpoint, base_ckpt_dir=None, precision="bf16_mixed", quantize_weights=None)
    assert half(num_gpus=8, gpu_bytes=int(fits / 2) + 1) == 1
