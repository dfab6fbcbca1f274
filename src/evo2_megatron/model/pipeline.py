# SPDX-License-Identifier: Apache-2.0
"""One forward pass without gradients through all pipeline stages; training uses Megatron's own schedules.

Shape legend: B batch, L tokens of this process, H channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


def forward_through_stages(model: MegatronModule, token_BL: Tensor, **arguments: Any) -> Tensor | None:
    """Run tokens through this process's stage, between the stages before and after it.

    A stage is done with a batch when it has sent it on, so successive batches overlap.

    Args:
        model: This process's stage, or its wrapper for 16 bits.
        token_BL: The same on every stage.
        arguments: Of ``StripedHyenaModel.forward``.

    Returns:
        What the model returns on the last stage; None on the others.
    """
    inner = unwrap_model(model)
    group, config = inner.pg_collection.pp, inner.config
    stage, last = group.rank(), group.size() - 1
    if stage > 0:
        length = token_BL.shape[1]
        if config.sequence_parallel:
            length //= inner.pg_collection.tp.size()
        shape = (length, token_BL.shape[0], config.hidden_size)
        hidden_LBH = torch.empty(shape, dtype=config.pipeline_dtype, device=token_BL.device)
        dist.recv(hidden_LBH, group=group, group_src=stage - 1)
        inner.set_input_tensor(hidden_LBH)
    output = model(token_BL, **arguments)
    if stage == last:
        return output
    dist.send(output.to(config.pipeline_dtype), group=group, group_dst=stage + 1)
    return None
