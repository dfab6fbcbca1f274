# SPDX-License-Identifier: Apache-2.0
"""Tensors read a few rows at a time: every combination equals what torch does with whole tensors."""

import pytest
import torch

from evo2_megatron.checkpoint import tensors
from evo2_megatron.checkpoint.tensors import (
    StoredTensor,
    WholeTensors,
    as_dtype,
    each_row,
    in_memory,
    one_below_another,
    rows_of,
    side_by_side,
)

A, B = torch.arange(21.0).reshape(7, 3), torch.arange(100.0, 112.0).reshape(4, 3)


@pytest.mark.parametrize(
    "stored, expected",
    [
        (in_memory(A), A),
        (in_memory(A.t()), A.t()),
        (rows_of(in_memory(A), 2, 6), A[2:6]),
        (one_below_another([in_memory(A), in_memory(B), in_memory(A)]), torch.cat([A, B, A])),
        (side_by_side([in_memory(A), in_memory(A + 1)]), torch.cat([A, A + 1], dim=1)),
        (each_row(lambda x, y: (x * y)[:, None, :2], in_memory(A), in_memory(A)), (A * A)[:, None, :2]),
        (as_dtype(in_memory(A), torch.bfloat16), A.bfloat16()),
    ],
)
def test_any_rows(stored, expected):
    assert (stored.shape, stored.dtype, stored.nbytes) == (tuple(expected.shape), expected.dtype, expected.nbytes)
    assert torch.equal(stored.read(), expected)
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 1):
            if start < stop:
                rows = stored.read_rows(start, stop)
                assert torch.equal(rows, expected[start:stop]) and rows.is_contiguous()


@pytest.mark.parametrize("piece_bytes, sizes", [(1, [1] * 7), (24, [2, 2, 2, 1]), (10**6, [7])])
def test_pieces(monkeypatch, piece_bytes, sizes):
    monkeypatch.setattr(tensors, "PIECE_BYTES", piece_bytes)
    pieces = list(in_memory(A).pieces())
    assert [stop - start for start, stop in pieces] == sizes
    assert torch.equal(torch.cat([A[start:stop] for start, stop in pieces]), A)
    assert list(in_memory(A[:0]).pieces()) == []


def test_parts_that_do_not_fit_are_refused():
    for join, other in ((one_below_another, A[:, :2]), (side_by_side, A[:3]), (side_by_side, A.half())):
        with pytest.raises(AssertionError):
            join([in_memory(A), in_memory(other)])


def test_whole_tensors_are_read_when_looked_up():
    reads = []

    def read_rows(start, stop):
        reads.append((start, stop))
        return A[start:stop]

    weights = WholeTensors({"a": StoredTensor((7, 3), torch.float32, read_rows)})
    assert "a" in weights and "b" not in weights and list(weights) == ["a"] and len(weights) == 1
    assert not reads
    assert torch.equal(weights["a"], A) and reads == [(0, 7)]
