# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from evo2_megatron.ops.toeplitz import channel_slices, diagonal_sums, toeplitz


@pytest.mark.parametrize("num_taps", [1, 2, 5, 9])
@pytest.mark.parametrize("num_rows, num_columns", [(1, 1), (1, 4), (4, 4), (3, 9), (5, 6)])
def test_toeplitz(num_taps, num_rows, num_columns):
    filter_DK = torch.randn(2, num_taps)
    want = torch.zeros(2, num_rows, num_columns)
    for s in range(num_rows):
        for w in range(num_columns):
            if 0 <= w - s < num_taps:
                want[:, s, w] = filter_DK[:, w - s]
    assert torch.equal(toeplitz(filter_DK, num_rows, num_columns), want)


@pytest.mark.parametrize("num_rows, num_columns", [(1, 1), (1, 4), (4, 4), (3, 9), (5, 6)])
def test_diagonal_sums_is_the_gradient_of_toeplitz(num_rows, num_columns):
    filter_DK = torch.randn(2, num_columns, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, num_rows, num_columns, dtype=torch.float64)
    (want,) = torch.autograd.grad(toeplitz(filter_DK, num_rows, num_columns), filter_DK, weight)
    torch.testing.assert_close(diagonal_sums(weight), want)


@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 3, 1 << 17), (1, 2, 1 << 20)])
def test_slices_cover_every_channel_once(shape):
    x = torch.empty(shape, device="meta")
    channels = [c for part in channel_slices(x) for c in range(part.start, part.stop)]
    assert channels == list(range(shape[1]))
