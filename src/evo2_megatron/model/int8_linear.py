# SPDX-License-Identifier: Apache-2.0
"""The linear layers of a loaded model with weights in 8 bits (see ``ops.int8``), which are not trained; what is beside
them, such as adapters, may be.

Weights come from a checkpoint wide, a layer of the model at a time, so that the wide model never exists.
Shape legend: L tokens, B batch, H and D channels of input and output, T = L * B.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from evo2_megatron.model.torch_modules import RMSNormColumnLinear, RowLinear
from evo2_megatron.ops.int8 import int8_product, largest_of_rows, quantize_rows


class Int8RMSNormColumnLinear(RMSNormColumnLinear):
    """``RMSNormColumnLinear`` with a weight in 8 bits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.bias is None
        _make_narrow(self)

    def product(self, norm_LBH: Tensor, weight: Tensor | None = None) -> tuple[Tensor, None]:
        assert weight is None
        if self.tp_group.size() > 1:
            whole = (
                gather_from_sequence_parallel_region
                if self.sequence_parallel
                else copy_to_tensor_model_parallel_region
            )
            norm_LBH = whole(norm_LBH, group=self.tp_group)
        return _product(self, norm_LBH), None


class Int8RowLinear(RowLinear):
    """``RowLinear`` with a weight in 8 bits; its scales are those of the undivided rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.bias is None or self.skip_bias_add
        _make_narrow(self)

    def forward(self, x_LBH: Tensor) -> tuple[Tensor, Tensor | None]:
        y_LBD = _product(self, x_LBH)
        if self.tp_group.size() > 1:
            scatters = self.sequence_parallel
            reduce = (
                reduce_scatter_to_sequence_parallel_region if scatters else reduce_from_tensor_model_parallel_region
            )
            y_LBD = reduce(y_LBD, group=self.tp_group)
        return y_LBD, self.bias


_Int8Linear = Int8RMSNormColumnLinear | Int8RowLinear


@contextlib.contextmanager
def in_full_width(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Give 8-bit layers an empty weight of the model's precision, to be filled, and round it to 8 bits at the end.

    All tensor-parallel processes call it alike.

    Args:
        model: Any; adapters may wrap its layers.
        names: Of parameters; the layers whose weight is among them.
    """
    found = [
        module
        for path, module in model.named_modules()
        if isinstance(module, _Int8Linear) and f"{path}.weight" in names
    ]
    for module in found:
        wide = torch.empty(module.weight.shape, dtype=module.config.params_dtype, device=module.weight.device)
        module.weight = nn.Parameter(wide, requires_grad=False)
    yield
    for module in found:
        _narrow(module)


@torch.no_grad()
def _narrow(module: _Int8Linear) -> None:
    largest_D = largest_of_rows(module.weight)
    if isinstance(module, Int8RowLinear) and module.tp_group.size() > 1:
        torch.distributed.all_reduce(largest_D, op=torch.distributed.ReduceOp.MAX, group=module.tp_group)
    q_DH, module.weight_scale = quantize_rows(module.weight, largest_D)
    module.weight = nn.Parameter(q_DH, requires_grad=False)


def _make_narrow(module: _Int8Linear) -> None:
    wide = module.weight
    module.weight = nn.Parameter(torch.empty_like(wide, dtype=torch.int8), requires_grad=False)
    module.register_buffer("weight_scale", wide.new_ones(len(wide), dtype=torch.bfloat16), persistent=False)


def _product(module: _Int8Linear, x_LBH: Tensor) -> Tensor:
    y_TD = int8_product(x_LBH.flatten(0, 1), module.weight, module.weight_scale)
    return y_TD.unflatten(0, x_LBH.shape[:2])
