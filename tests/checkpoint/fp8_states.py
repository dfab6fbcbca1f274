# SPDX-License-Identifier: Apache-2.0
"""What Transformer Engine keeps beside a linear layer, as its versions 1 and 2 pickle it."""

from __future__ import annotations

import io
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Format(NamedTuple):
    """Stands for transformer_engine.common.recipe's classes: here at writing, and not to be looked up at reading."""

    forward: str = "e4m3"


@dataclass
class DelayedScaling:
    fp8_format: Format
    amax_history_len: int = 16


def fp8_state(input_scale: float, weight_scale: float, **more: Any) -> io.BytesIO:
    """An entry ``_extra_state``."""
    scale = torch.tensor([input_scale, weight_scale, 1.0])
    content = {
        "scale_fwd": scale,
        "scale_inv_fwd": 1 / scale,
        "amax_history_fwd": torch.rand(16, 3),
        "scale_bwd": torch.ones(2),
        "extra_fp8_variables": OrderedDict(
            recipe=DelayedScaling(Format()), fp8_max_fwd=448.0, num_gemms=1, shapes=[(1,)]
        ),
    }
    file = io.BytesIO()
    torch.save(content | more, file)
    file.seek(0)
    return file
