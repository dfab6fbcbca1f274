# SPDX-License-Identifier: Apache-2.0
import pytest

from evo2_megatron import layouts
from evo2_megatron.architectures import ARCHITECTURES
from evo2_megatron.config import ParallelConfig, UserError


def sizes(key):
    arch = ARCHITECTURES[key]
    return {
        "hidden size": arch.hidden_size,
        "FFN width": arch.ffn_hidden_size,
        "attention heads": arch.num_heads,
        "groups": arch.num_groups,
    }


@pytest.mark.parametrize(
    "key, tensor, message",
    [
        ("evo2_1b_base", 2, "2 does not divide the model's 15 attention heads; use 1, and split layers"),
        ("evo2_7b", 12, "12 does not divide .*4096 hidden size and .*; use 8 or 16, and"),
        ("evo2_40b", 128, "128 does not divide the model's 64 attention heads; use 64, and"),
    ],
)
def test_tensor_sizes_that_do_not_divide(key, tensor, message):
    with pytest.raises(UserError, match=message):
        layouts.check_tensor_parallel(sizes(key), tensor)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8, 16, 32])
def test_tensor_sizes_that_divide(tensor):
    layouts.check_tensor_parallel(sizes("evo2_7b"), tensor)
    layouts.check_pipeline_parallel(25, tensor if tensor < 26 else 25)


@pytest.mark.parametrize(
    "length, layout, message",
    [
        (8191, {"context": 4}, "--seq-length 8191 .* multiple of 8, and 1032 or more; use 8184 or 8192"),
        (1000, {"context": 4}, "use 1032"),
        (1036, {"context": 4}, "use 1032 or 1040"),
        (63, {"tensor": 2}, r"tensor parallel size 2 \(sequence parallelism\): .* multiple of 2; use 62 or 64"),
        (1, {"tensor": 2}, "use 2"),
        (8196, {"tensor": 8, "context": 2}, "multiple of 16, and 528 or more; use 8192 or 8208"),
        (8192 + 12, {"tensor": 3, "context": 2}, "multiple of 12"),
    ],
)
def test_lengths_that_cannot_be_split(length, layout, message):
    with pytest.raises(UserError, match=message) as caught:
        layouts.check_sequence_length(length, ParallelConfig(**layout))
    # what it names does work
    for named in str(caught.value).rpartition("use ")[2].split(" or "):
        layouts.check_sequence_length(int(named), ParallelConfig(**layout))


@pytest.mark.parametrize(
    "length, layout",
    [(1, {}), (63, {"tensor": 2, "sequence_parallel": False}), (8192, {"context": 16}), (2**20, {"tensor": 8})],
)
def test_lengths_that_can_be_split(length, layout):
    layouts.check_sequence_length(length, ParallelConfig(**layout))


def test_the_halo_is_that_of_the_longest_finite_filter(megatron):
    from evo2_megatron.model.filters import INPUT_FILTER_LENGTH, MR_FILTER_LENGTH

    assert layouts.MIN_CHUNK_TOKENS == INPUT_FILTER_LENGTH - 1 + MR_FILTER_LENGTH - 1


def test_more_stages_than_layers():
    with pytest.raises(UserError, match="pipeline parallel size 5 for 4 layers; use 4 or less"):
        layouts.check_pipeline_parallel(4, 5)


def test_stages_hold_every_layer_once(megatron):
    from evo2_megatron.model.stack import stage_layers

    for num_layers in (4, 25, 50):
        for num_stages in range(1, min(num_layers, 9)):
            stages = [stage_layers(num_layers, stage=i, num_stages=num_stages) for i in range(num_stages)]
            assert [index for stage in stages for index in stage] == list(range(num_layers))
            assert max(map(len, stages)) - min(map(len, stages)) <= 1
            assert list(map(len, stages)) == sorted(map(len, stages))
