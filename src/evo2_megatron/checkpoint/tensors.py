# SPDX-License-Identifier: Apache-2.0
"""Tensors that stay on disk and are read a few rows at a time, and what can be done to them on the way.

A checkpoint of 40 billion parameters is 82 GB. Converters pass ``StoredTensor`` around and read each only while it is
written, in pieces of at most ``PIECE_BYTES``, so memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PIECE_BYTES = 16 * 2**20  # small enough that the allocator reuses memory, which is three times faster


class StoredTensor(NamedTuple):
    """Shape and dtype of a tensor, and how to read some of its rows. ``rows`` means: along the first axis."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    read_rows: Callable[[int, int], Tensor]
    """Rows from the first number to before the second, contiguous, as a tensor of its own."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The whole tensor."""
        return self.read_rows(0, self.shape[0])

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the tensor, each at most ``PIECE_BYTES`` but at least one row."""
        row_bytes = max(1, self.nbytes // max(1, self.shape[0]))
        step = max(1, PIECE_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])


class WholeTensors(Mapping[str, Tensor]):
    """Stored tensors as a mapping that reads a tensor whole each time it is looked up."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].read()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def in_memory(tensor: Tensor) -> StoredTensor:
    """A tensor that is in memory already."""
    tensor = tensor.detach()
    return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda start, stop: tensor[start:stop].contiguous())


def rows_of(tensor: StoredTensor, start: int, stop: int) -> StoredTensor:
    """A range of a tensor's rows."""
    return StoredTensor(
        (stop - start, *tensor.shape[1:]), tensor.dtype, lambda a, b: tensor.read_rows(start + a, start + b)
    )


def one_below_another(parts: Sequence[StoredTensor]) -> StoredTensor:
    """Parts joined along the first axis; of one dtype and equal in the other axes."""

    def read_rows(start: int, stop: int) -> Tensor:
        found, top = [], 0
        for part in parts:
            first, last = max(start - top, 0), min(stop - top, part.shape[0])
            if first < last:
                found.append(part.read_rows(first, last))
            top += part.shape[0]
        return found[0] if len(found) == 1 else torch.cat(found)

    _check_joinable(parts, axis=0)
    return StoredTensor((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts[0].dtype, read_rows)


def side_by_side(parts: Sequence[StoredTensor]) -> StoredTensor:
    """Parts joined along the second axis; of one dtype and equal in the other axes."""
    _check_joinable(parts, axis=1)
    rows, _, *others = parts[0].shape
    return StoredTensor(
        (rows, sum(part.shape[1] for part in parts), *others),
        parts[0].dtype,
        lambda start, stop: torch.cat([part.read_rows(start, stop) for part in parts], dim=1),
    )


def _check_joinable(parts: Sequence[StoredTensor], *, axis: int) -> None:
    kinds = {(part.dtype, part.shape[:axis], part.shape[axis + 1 :]) for part in parts}
    assert len(kinds) == 1, kinds


def each_row(function: Callable[..., Tensor], *tensors: StoredTensor) -> StoredTensor:
    """Apply a function that treats every row by itself to rows of one or several tensors as they are read."""
    # what comes out for no row has the right other axes and dtype
    nothing = function(*(torch.empty((0, *tensor.shape[1:]), dtype=tensor.dtype) for tensor in tensors))
    return StoredTensor(
        (tensors[0].shape[0], *nothing.shape[1:]),
        nothing.dtype,
        lambda start, stop: function(*(tensor.read_rows(start, stop) for tensor in tensors)).contiguous(),
    )


def as_dtype(tensor: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    """The tensor, converted as it is read."""
    return tensor if tensor.dtype is dtype else each_row(lambda rows: rows.to(dtype), tensor)
