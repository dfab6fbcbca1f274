# SPDX-License-Identifier: Apache-2.0
"""The scales that Transformer Engine keeps beside a linear layer, from files of Savanna and Vortex.

Such a file has entries ``<projection>._extra_state``: each an ``io.BytesIO`` with what ``torch.save`` made of a
dictionary. Its ``scale_fwd`` are the factors of input, weight and output before their casts to 8 bits. The dictionary
also holds objects of Transformer Engine's classes; they are read as empty shells, and nothing that the file names is
run.
"""

from __future__ import annotations

import io
import logging
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evo2_megatron.checkpoint.torch_file import UNREADABLE

logger = logging.getLogger(__name__)

_DTYPES = {"FloatStorage": torch.float32, "LongStorage": torch.int64, "ByteStorage": torch.uint8}


def read_scales(state: Mapping[str, Any], names: Mapping[int, str]) -> dict[int, tuple[float, float]]:
    """Scales of input and weight of 8-bit projections.

    Args:
        state: What a file holds, by its names.
        names: By number of the layer, counted from 0, the entry of its projection; layers without 8 bits need none.

    Returns:
        By number of the layer. Empty where the file has none, or where an entry cannot be read, which is logged.
    """
    entries = {layer: state[name] for layer, name in names.items() if name in state}
    filled = {layer: entry for layer, entry in entries.items() if _num_bytes(entry)}
    scales = {}
    for layer, entry in filled.items():
        try:
            scales[layer] = _scales(entry)
        except UNREADABLE as error:
            reason = str(error).partition("\n")[0]
            logger.warning(
                "%s is not FP8 state as Transformer Engine 1 and 2 write it (%s); the scales of all layers are left "
                "out, and --fp8-emulation will use 1", names[layer], reason,
            )  # fmt: skip
            return {}
    return scales


def _num_bytes(entry: Any) -> int:
    if isinstance(entry, io.BytesIO):
        return len(entry.getbuffer())
    return math.prod(getattr(entry, "shape", (0,)))


def _scales(entry: Any) -> tuple[float, float]:
    if not isinstance(entry, io.BytesIO):
        raise pickle.UnpicklingError(f"it is a {type(entry).__name__} instead of bytes")
    with zipfile.ZipFile(entry) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        loaded = _Unpickler(archive, name.removesuffix("data.pkl")).load()
    factors = loaded["scale_fwd"].double().tolist()
    if len(factors) < 2 or not all(0 < factor < math.inf for factor in factors[:2]):
        raise ValueError(f"scale_fwd is {factors}")
    return factors[0], factors[1]


class _Shell:
    """Stands for an object of a class that is not of interest; takes whatever a pickle gives it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Shell:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Shell:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Plain values and tensors of one file of ``torch.save``; everything else is a shell."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _Shell

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a tensor of an unusual dtype")
        return torch.frombuffer(bytearray(self._archive.read(f"{self._folder}data/{key}")), dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *unused: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)
