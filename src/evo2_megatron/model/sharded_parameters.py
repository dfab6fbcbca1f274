# SPDX-License-Identifier: Apache-2.0
"""Base of the modules that hold convolution filters: tensors split by their first axis over tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import Tensor

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider


class ShardedParameters(MegatronModule):
    """A module whose own parameters and buffers are split by axis 0."""

    def __init__(self, config: StripedHyenaProvider) -> None:
        super().__init__(config=config)
        self.tp_group = config.process_groups().tp

    def new_parameter(self, *shape: int, init: Callable[[Tensor], object], dtype: torch.dtype) -> torch.nn.Parameter:
        """This process's share of a parameter of global ``shape``, initialised in place by ``init``.

        On the CPU every process draws the whole tensor and keeps its rows, so that the values do not depend on the
        layout; on a GPU each draws its own rows from the model-parallel random state (both as Megatron's layers do).
        """
        size, rank = self.tp_group.size(), self.tp_group.rank()
        rows = shape[0] // size
        if self.config.use_cpu_initialization:
            whole = torch.empty(shape, dtype=torch.float32)
            if self.config.perform_initialization:
                init(whole)
            value = whole[rank * rows : (rank + 1) * rows].to(dtype, copy=True)
        else:
            value = torch.empty((rows, *shape[1:]), dtype=torch.float32, device=torch.cuda.current_device())
            if self.config.perform_initialization:
                with get_cuda_rng_tracker().fork():
                    init(value)
            value = value.to(dtype)
        parameter = torch.nn.Parameter(value)
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Global shapes of the own tensors, and those of the children."""
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded = make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(own, 0), sharded_offsets, tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
        for name, child in self.named_children():
            sharded |= sharded_state_dict_default(
                child, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return sharded
