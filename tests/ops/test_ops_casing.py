# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from evo2_megatron.ops.casing import is_lower, to_upper
from evo2_megatron.ops.reference import to_upper_ref

EVERY_ID = torch.arange(512)


def test_to_upper_equals_the_text_function():
    assert to_upper(EVERY_ID).tolist() == to_upper_ref(EVERY_ID.tolist())


def test_is_lower_marks_exactly_a_to_z():
    assert "".join(map(chr, EVERY_ID[is_lower(EVERY_ID)])) == "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_dtype_and_argument_are_kept(dtype):
    ids = torch.tensor([[ord("a"), ord("A"), ord("n"), 0], [1, ord("z"), ord("{"), ord("`")]], dtype=dtype)
    before = ids.clone()
    upper = to_upper(ids)
    assert upper.dtype == dtype
    assert upper.tolist() == [[ord("A"), ord("A"), ord("N"), 0], [1, ord("Z"), ord("{"), ord("`")]]
    assert torch.equal(ids, before)
