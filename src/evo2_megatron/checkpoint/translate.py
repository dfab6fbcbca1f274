# SPDX-License-Identifier: Apache-2.0
"""Move weights between our names and another format's, as the table in ``checkpoint/names.py`` says; all or nothing.

Each form works row by row, so the tensors are read only while the result is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from evo2_megatron.architectures import ARCHITECTURES, Architecture
from evo2_megatron.checkpoint.names import EMBEDDING, Row, check_tensors, is_weight, parameter_shapes, rows
from evo2_megatron.checkpoint.tensors import (
    StoredTensor,
    as_dtype,
    each_row,
    in_memory,
    one_below_another,
    rows_of,
)
from evo2_megatron.config import UserError

Format = Literal["savanna", "vortex"]
"""A column of the name table."""


class Weights(NamedTuple):
    """A model's weights as a file has them and as we name them."""

    architecture: Architecture
    """The size asked for, with an output projection of its own if the file has one."""

    theirs: Mapping[str, StoredTensor]
    """What the model needs of the file, by the file's names."""

    ours: Mapping[str, StoredTensor]
    """The same by our names; dtypes as in the file, except where something was computed."""

    fp8_scales: Mapping[int, tuple[float, float]] = {}
    """Scales of input and weight of 8-bit input projections, by number of the layer from 0, if the file has them."""


class Form(NamedTuple):
    """Both directions take and give tensors in the order of the name table's row."""

    to_theirs: Callable[..., tuple[StoredTensor, ...]]
    to_ours: Callable[..., tuple[StoredTensor, ...]]


def _unchanged(*tensors: StoredTensor) -> tuple[StoredTensor, ...]:
    return tensors


def _halves(tensor: StoredTensor) -> tuple[StoredTensor, StoredTensor]:
    middle = tensor.shape[0] // 2
    return rows_of(tensor, 0, middle), rows_of(tensor, middle, tensor.shape[0])


def _stacked(first: StoredTensor, second: StoredTensor) -> tuple[StoredTensor]:
    dtype = torch.promote_types(first.dtype, second.dtype)
    return (one_below_another((as_dtype(first, dtype), as_dtype(second, dtype))),)


def _rowwise(*functions: Callable[..., Tensor]) -> Callable[..., tuple[StoredTensor, ...]]:
    """One result for each function, all from the same tensors."""
    return lambda *tensors: tuple(each_row(function, *tensors) for function in functions)


def _log_poles(p: Tensor, gamma: Tensor) -> Tensor:
    # Vortex evaluates exp(log_pole * t) in float32 whatever the other weights are
    return -(p.float().exp() * gamma.float().exp())[..., None]


def _p(log_poles: Tensor) -> Tensor:
    """The part of the logarithm that bfloat16 can hold; ``_gamma`` is the rest.

    A model that computes in bfloat16 rounds p and gamma. Were all of it in p, poles would move by up to 1 %.
    """
    return (-log_poles.float()).log()[..., 0].bfloat16().float()


def _gamma(log_poles: Tensor) -> Tensor:
    return ((-log_poles.double()).log()[..., 0] - _p(log_poles)).float()


FORMS = {
    "same": Form(_unchanged, _unchanged),
    "float32": Form(_rowwise(lambda x: x.float()), _unchanged),
    "duplicate": Form(lambda x: (x, x), lambda x, copy: (x,)),
    "halves": Form(_halves, _stacked),
    "middle_axis": Form(_rowwise(lambda x: x[:, None]), _rowwise(lambda x: x[:, 0])),
    # Vortex has the product only; as that times one it is the same function
    "decayed_filter": Form(
        # of 16 bits, too, in float32, which holds all of its digits; Vortex rounds it as it loads
        _rowwise(lambda h, decay: (h.float() * decay.float())[:, None]),
        _rowwise(lambda x: x[:, 0].float(), lambda x: torch.ones_like(x[:, 0], dtype=torch.float32)),
    ),
    "log_poles": Form(_rowwise(_log_poles), _rowwise(_p, _gamma)),
}
"""What the name table names."""


def named_tensors(state: Mapping[Any, Any], *, source: str, wanted: str) -> dict[str, Any]:
    """Entries of a state dict by name, of which all but FP8, optimizer and random state are tensors.

    Args:
        state: As ``read_torch_file`` gives it.
        source: The file, for messages.
        wanted: What to give instead, likewise.

    Raises:
        UserError: An entry is no tensor.
    """
    named = {str(name): value for name, value in state.items()}
    strange = [name for name, value in named.items() if is_weight(name) and not isinstance(value, StoredTensor)]
    if strange:
        raise UserError(f"{source}: {strange[0]!r} is not a tensor; give {wanted}")
    return named


def check_numbers(tensors: Mapping[str, StoredTensor], *, source: str) -> None:
    """Raise UserError unless all are floating point of 16 bits or more: others mean something else than they say."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise UserError(
                f"{source}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, which is no format of weights "
                "here; save them in bfloat16 or float32, with their scales multiplied in if they have any"
            )


def to_theirs(ours: Mapping[str, StoredTensor], architecture: Architecture, format: Format) -> dict[str, StoredTensor]:
    """Our weights under another format's names, in the order of the forward pass.

    Raises:
        UserError: A tensor is missing, unknown or of another shape.
    """
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    expected = parameter_shapes(architecture, vocab_size=shapes.get(EMBEDDING, (0,))[0])
    check_tensors(
        shapes, expected, source="weights", remedy="check that the model size is the one they were made with"
    )
    return _renamed(ours, architecture, format)


def _renamed(ours: Mapping[str, StoredTensor], architecture: Architecture, format: Format) -> dict[str, StoredTensor]:
    theirs: dict[str, StoredTensor] = {}
    for row in rows(architecture):
        names, form = _column(row, format)
        theirs.update(zip(names, form.to_theirs(*(ours[name] for name in row.megatron)), strict=True))
    return theirs


def to_ours(
    theirs: Mapping[str, StoredTensor], architecture: Architecture, format: Format, *, source: str
) -> dict[str, StoredTensor]:
    """Another format's weights under our names, in the order of the forward pass.

    Raises:
        UserError: A tensor is missing, unknown, of another shape, or not of floating point; names them, and the model
            sizes that would fit.
    """
    table = rows(architecture)
    embedding = theirs.get(_column(table[0], format)[0][0])
    vocab_size = embedding.shape[0] if embedding and embedding.shape else 0
    found = {name: tensor.shape for name, tensor in theirs.items()}
    expected = _their_shapes(architecture, format, vocab_size)
    if found != expected:
        check_tensors(found, expected, source=source, remedy=_other_sizes(found, format, vocab_size))
    check_numbers(theirs, source=source)
    ours: dict[str, StoredTensor] = {}
    for row in table:
        names, form = _column(row, format)
        ours.update(zip(row.megatron, form.to_ours(*(theirs[name] for name in names)), strict=True))
    return ours


def rounded_like(
    theirs: Mapping[str, StoredTensor], stored: Mapping[str, StoredTensor], architecture: Architecture, format: Format
) -> dict[str, StoredTensor]:
    """Another format's weights, each in the dtype of ours that it becomes.

    What is computed from these differs from what our weights give by the conversion alone, and not by the rounding.

    Args:
        theirs: A whole model by the format's names.
        stored: The same by our names, in the dtypes it is written in; those of a row of the name table are alike.
        architecture: Describes the model.
        format: The other format.
    """
    return {
        name: as_dtype(theirs[name], stored[ours].dtype)
        for row in rows(architecture)
        for ours in list(row.megatron)[:1]
        for name in _column(row, format)[0]
    }


def _column(row: Row, format: Format) -> tuple[tuple[str, ...], Form]:
    names, form = (row.savanna, row.savanna_form) if format == "savanna" else (row.vortex, row.vortex_form)
    return names, FORMS[form]


def _their_shapes(architecture: Architecture, format: Format, vocab_size: int) -> dict[str, tuple[int, ...]]:
    shapes = parameter_shapes(architecture, vocab_size=vocab_size)
    ours = {name: in_memory(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
    return {name: tensor.shape for name, tensor in _renamed(ours, architecture, format).items()}


def _other_sizes(found: Mapping[str, tuple[int, ...]], format: Format, vocab_size: int) -> str:
    fitting = [
        key
        for key, architecture in ARCHITECTURES.items()
        if not (format == "vortex" and architecture.short_conv_bias)  # not expressible
        and _their_shapes(architecture, format, vocab_size) == found
    ]
    if fitting:
        return f"they are those of --model-size {' or '.join(fitting)}"
    return "check that --model-size is the one the file was made with, and that the file is complete"
