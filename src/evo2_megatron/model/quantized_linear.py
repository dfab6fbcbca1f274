# SPDX-License-Identifier: Apache-2.0
"""The linear layers of a loaded model with weights in 8 or 4 bits (see ``ops.int8`` and ``ops.int4``), which are not
trained; what is beside them, such as adapters, may be.

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
from evo2_megatron.ops.int4 import Int4Weights, empty_weights, group_size, int4_product, quantize_groups
from evo2_megatron.ops.int8 import int8_product, largest_of_rows, quantize_rows


class QuantizedRMSNormColumnLinear(RMSNormColumnLinear):
    """``RMSNormColumnLinear`` with a weight in 8 or 4 bits, by the model's ``quantize_weights``."""

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


class QuantizedRowLinear(RowLinear):
    """``RowLinear`` with a weight in 8 or 4 bits; its scales are those of the undivided matrix."""

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


_QuantizedLinear = QuantizedRMSNormColumnLinear | QuantizedRowLinear


class Int8Matrix(nn.Module):
    """A matrix [D, H] in 8 bits."""

    def __init__(self, layer: _QuantizedLinear) -> None:
        super().__init__()
        wide_DH = layer.weight
        self.register_buffer("q_DH", torch.empty_like(wide_DH, dtype=torch.int8), persistent=False)
        self.register_buffer("scale_D", wide_DH.new_ones(len(wide_DH), dtype=torch.bfloat16), persistent=False)

    def fill(self, layer: _QuantizedLinear) -> None:
        """Round the layer's wide weight; all tensor-parallel processes call it alike."""
        largest_D = largest_of_rows(layer.weight)
        if isinstance(layer, QuantizedRowLinear) and layer.tp_group.size() > 1:
            torch.distributed.all_reduce(largest_D, op=torch.distributed.ReduceOp.MAX, group=layer.tp_group)
        self.q_DH, self.scale_D = quantize_rows(layer.weight, largest_D)

    def forward(self, x_TH: Tensor) -> Tensor:
        return int8_product(x_TH, self.q_DH, self.scale_D)


class Int4Matrix(nn.Module):
    """A matrix [D, H] in 4 bits. ``input_size`` of the layer, which processes divide, decides about its groups."""

    def __init__(self, layer: _QuantizedLinear) -> None:
        super().__init__()
        self._num_rows, num_columns = layer.weight.shape
        self._group = group_size(layer.input_size)
        assert self._group is not None and num_columns % self._group == 0, "the provider checks this"
        self._keep(empty_weights(self._num_rows, num_columns, self._group, layer.weight.device))

    def fill(self, layer: _QuantizedLinear) -> None:
        """Round the layer's wide weight."""
        self._keep(quantize_groups(layer.weight, self._group))

    def _keep(self, weights: Int4Weights) -> None:
        self.register_buffer("packed_NHR", weights.packed_NHR, persistent=False)
        self.register_buffer("scale_zero_GD2", weights.scale_zero_GD2, persistent=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        return int4_product(x_TH, Int4Weights(self.packed_NHR, self.scale_zero_GD2, self._num_rows))


_MATRICES = {"int8": Int8Matrix, "int4": Int4Matrix}


@contextlib.contextmanager
def in_full_width(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Give quantized layers an empty weight of the model's precision, to be filled, and round it at the end.

    All tensor-parallel processes call it alike.

    Args:
        model: Any; adapters may wrap its layers.
        names: Of parameters; the layers whose weight is among them.
    """
    found = [
        module
        for path, module in model.named_modules()
        if isinstance(module, _QuantizedLinear) and f"{path}.weight" in names
    ]
    for module in found:
        wide = torch.empty(module.weight.shape, dtype=module.config.params_dtype, device=module.weight.device)
        module.weight = nn.Parameter(wide, requires_grad=False)
    yield
    with torch.no_grad():
        for module in found:
            module.matrix.fill(module)
            _hold_place(module)


def _make_narrow(module: _QuantizedLinear) -> None:
    with torch.no_grad():
        module.matrix = _MATRICES[module.config.quantize_weights](module)
    _hold_place(module)


def _hold_place(module: _QuantizedLinear) -> None:
    """In place of the weight: its name, shape and device in one number. No float, or it would be converted as one."""
    number = torch.zeros((), dtype=torch.int8, device=module.weight.device)
    module.weight = nn.Parameter(number.expand(module.weight.shape), requires_grad=False)


def _product(module: _QuantizedLinear, x_LBH: Tensor) -> Tensor:
    return module.matrix(x_LBH.flatten(0, 1)).unflatten(0, x_LBH.shape[:2])
