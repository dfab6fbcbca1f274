# SPDX-License-Identifier: Apache-2.0
"""Work for which there may not be memory enough, and what its clients are told then."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from evo2_megatron.config import UserError
from evo2_megatron.runtime import distributed, out_of_memory
from evo2_megatron.tasks.server.jobs import Refused

Result = TypeVar("Result")

RETRY_SECONDS = 5
"""When to ask again while the model is loaded, or when memory ran out."""

NO_MEMORY = "not enough memory for this request; send a shorter one, or try again when the server is less busy"


_NONE_ALONE = (
    "not enough memory for what was asked for, and processes that share a model cannot go on without each other; "
    "start again with a lower --max-batch-size or --max-seq-length"
)


def attempt(work: Callable[..., Result], *arguments: Any) -> Result | Refused:
    """What ``work`` returns; if memory runs out, what to answer.

    Raises:
        UserError: Memory ran out, and other processes share the model, which wait for this one in the middle of the
            work.
    """
    if not distributed.is_one_process_per_copy():
        with out_of_memory.told(_NONE_ALONE):
            return work(*arguments)
    try:
        return work(*arguments)
    except UserError as error:  # of too little memory, for the shortest pieces
        refused = Refused(503, str(error), retry_after=RETRY_SECONDS)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory.is_out_of_memory(error):
            raise
        refused = Refused(503, NO_MEMORY, retry_after=RETRY_SECONDS)
    # here, where the error that holds what was computed is gone
    gc.collect()
    torch.cuda.empty_cache()
    return refused
