# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out, of the machine or of a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from evo2_megatron.config import UserError

_WORDS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Of PyTorch on a CPU; of CUDA and Triton where a kernel that is loaded late finds no room; of cuBLAS for its own."""


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether that is what the error is about."""
    import torch

    # PyTorch has a class for this on GPUs only, and there for what it allots itself
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in _WORDS)


@contextlib.contextmanager
def told(message: str) -> Iterator[None]:
    """Raise a UserError with this message where memory runs out inside the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(message) from error
