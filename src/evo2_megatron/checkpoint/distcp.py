# SPDX-License-Identifier: Apache-2.0
"""Folders of torch.distributed.checkpoint ("torch_dist"), the form that Megatron keeps weights in.

The index, ``.metadata``, is a pickle that says which bytes of which ``.distcp`` file hold which part of which tensor.
Each of these entries is a small file of ``torch.save`` and does not know its own name. So tensors are renamed, dropped
or moved to another folder by copying bytes and writing a new index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from evo2_megatron.checkpoint.layout import WEIGHTS_FORMAT, WEIGHTS_INDEX
from evo2_megatron.checkpoint.tensors import StoredTensor
from evo2_megatron.checkpoint.torch_file import UNREADABLE, JoinedFile, Span, read_torch_file, save_tensors, write_all
from evo2_megatron.config import UserError

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Contents of ``metadata.json``."""

_INDEX_MODULES = {
    f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner", "storage")
} | {"torch.distributed._shard.sharded_tensor.metadata", "torch.distributed._shard.metadata"}
_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("builtins", "set"),
    # empty classes that stand for those of Megatron Core up to 0.15
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}
_COPY_BYTES = 8 * 2**20

OnBytes = Callable[[int], Any]
"""Told the number of bytes after each piece of work."""


class _IndexReader(pickle.Unpickler):
    """Unpickle the index of torch.distributed.checkpoint and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        found = None
        if module in _INDEX_MODULES or (module, name) in _INDEX_NAMES:
            found = super().find_class(module, name)
        elif module == "torch":
            found = getattr(torch, name, None)
            found = found if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)) else None
        elif (module, name) == ("builtins", "getattr"):
            found = _enum_member
        if found is None or (module in _INDEX_MODULES and not isinstance(found, type)):
            raise UserError(
                f"the checkpoint's index of weights names {module}.{name}, which does not belong there; "
                "the file is damaged or was tampered with, and nothing was loaded"
            )
        return found


def _enum_member(kind: Any, name: str) -> Enum:
    """What ``getattr`` is for in an index: the first releases of Python 3.11 write enumerations so, as Debian 12's."""
    if not isinstance(kind, EnumMeta) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"it names {name!r} of what is no enumeration")
    return kind[name]


def read_index(folder: Path) -> Metadata:
    """Read a folder's ``.metadata`` without running anything that it names.

    Raises:
        UserError: There are no weights in this format, or the index is damaged or names what does not belong there.
    """
    _check_format(Path(folder) / WEIGHTS_FORMAT)
    index = Path(folder) / WEIGHTS_INDEX
    for path in (index, Path(folder) / WEIGHTS_FORMAT):
        if not path.is_file():
            raise UserError(
                f"{folder} has no {path.name}, so it holds no weights in Megatron's torch_dist format; "
                "the copy is incomplete, or the checkpoint needs converting"
            )
    with open(index, "rb") as file:
        try:
            metadata = _IndexReader(file).load()
        except UserError:
            raise
        except (*UNREADABLE, MemoryError) as error:
            raise UserError(f"{index} cannot be read ({error}); copy the checkpoint again") from None
    if not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise UserError(f"{index} is not an index of weights; copy the checkpoint again")
    return metadata


def _check_format(path: Path) -> None:
    if not path.is_file():
        return  # reading the index says what is missing
    try:
        described = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is not JSON; copy the checkpoint again") from None
    backend = described.get("sharded_backend") if isinstance(described, dict) else None
    if backend != "torch_dist":
        raise UserError(
            f"{path.parent} holds weights in the format {backend!r}; only torch_dist can be read: save the checkpoint "
            "again with a version of NeMo or Megatron that writes it"
        )


def tensor_entries(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors of an index, without the byte blobs that are not tensors."""
    return {name: entry for name, entry in index.state_dict_metadata.items() if hasattr(entry, "size")}


def entry_bytes(index: Metadata, name: str) -> int:
    """Bytes that one tensor takes in the ``.distcp`` files."""
    places = (MetadataIndex(name, chunk.offsets) for chunk in index.state_dict_metadata[name].chunks)
    return sum(index.storage_data[place].length for place in places if place in index.storage_data)


def stored_tensors(folder: Path, index: Metadata, names: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Tensors of a folder, to be read when they are needed.

    Args:
        folder: Holds the ``.distcp`` files.
        index: What ``read_index`` gives for it.
        names: Name in the folder: name in the result.

    Raises:
        UserError: Parts of a tensor are missing.
    """
    entries = tensor_entries(index)
    return {new: _stored_tensor(Path(folder), index, name, entries[name]) for name, new in names.items()}


def _stored_tensor(folder: Path, index: Metadata, name: str, entry: TensorStorageMetadata) -> StoredTensor:
    shape, dtype = tuple(entry.size), entry.properties.dtype
    chunks = [
        (tuple(chunk.offsets), tuple(chunk.sizes), _span(folder, index, name, chunk.offsets)) for chunk in entry.chunks
    ]
    if sum(math.prod(sizes) for _, sizes, _ in chunks) != math.prod(shape):
        raise UserError(f"{folder}: parts of {name} are missing from the index; copy the checkpoint again")

    def read_rows(start: int, stop: int) -> Tensor:
        rows = None
        for offsets, sizes, span in chunks:
            first, last = max(start - offsets[0], 0), min(stop - offsets[0], sizes[0])
            if first >= last:
                continue
            part = _read_chunk(span, f"{name} in {span.path}", first, last, sizes, dtype)
            if part.shape == (stop - start, *shape[1:]):
                return part
            if rows is None:
                rows = torch.empty((stop - start, *shape[1:]), dtype=dtype)
            place = [slice(offset, offset + size) for offset, size in zip(offsets, sizes)]
            place[0] = slice(offsets[0] + first - start, offsets[0] + last - start)
            rows[tuple(place)] = part
        return torch.empty((0, *shape[1:]), dtype=dtype) if rows is None else rows

    return StoredTensor(shape, dtype, read_rows)


def _read_chunk(span: Span, name: str, first: int, last: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with contextlib.closing(JoinedFile([span])) as file:
        chunk = read_torch_file(file, name)
        if not isinstance(chunk, StoredTensor) or (chunk.shape, chunk.dtype) != (sizes, dtype):
            raise UserError(f"{name} is not what the checkpoint's index says; copy the checkpoint again")
        return chunk.read_rows(first, last)


def _span(folder: Path, index: Metadata, name: str, offsets: torch.Size) -> Span:
    info = index.storage_data.get(MetadataIndex(name, offsets))
    if info is None or getattr(info, "transform_descriptors", None):
        raise UserError(f"{folder}: the index does not say where {name} is, or it is compressed; copy it again")
    path = folder / info.relative_path
    if path.parent != folder or not path.is_file():
        raise UserError(f"{folder} lacks the file {info.relative_path} with {name}; copy the checkpoint again")
    if path.stat().st_size < info.offset + info.length:
        raise UserError(f"{path} ends before {name}; copy the checkpoint again")
    return Span(path, info.offset, info.length)


def copy_tensors(
    source: Path, index: Metadata, names: Mapping[str, str], target: Path, *, on_bytes: OnBytes = lambda count: None
) -> None:
    """Copy some tensors to another folder, byte for byte, in the files and parts that they are in.

    Args:
        source: A folder in this format.
        index: What ``read_index`` gives for it.
        names: Name in the source: name in the target; tensors that are not in here are left out.
        target: An existing folder without weights.
        on_bytes: Called as the copy proceeds.
    """
    places = sorted(
        (_span(source, index, name, chunk.offsets), name, chunk.offsets)
        for name in names
        for chunk in tensor_entries(index)[name].chunks
    )
    storage_data = {}
    # one file at a time: each process of a large run has written its own
    for path, of_file in itertools.groupby(places, key=lambda place: place[0].path):
        with open(path, "rb", buffering=0) as source_file, open(target / path.name, "xb", buffering=0) as target_file:
            for span, name, offsets in of_file:
                info = dataclasses.replace(index.storage_data[MetadataIndex(name, offsets)], offset=target_file.tell())
                storage_data[MetadataIndex(names[name], offsets)] = info
                source_file.seek(span.start)
                _copy_bytes(source_file, target_file, span.length, on_bytes)
    entries = {names[name]: tensor_entries(index)[name] for name in sorted(names)}
    write_index(target, Metadata(entries, {name: (name,) for name in entries}, storage_data))


def _copy_bytes(source: Any, target: Any, count: int, on_bytes: OnBytes) -> None:
    buffer = memoryview(bytearray(min(count, _COPY_BYTES)))
    while count:
        length = source.readinto(buffer[:count])
        if not length:
            raise UserError(f"{source.name} became shorter while it was read; try again")
        write_all(target, buffer[:length])
        count -= length
        on_bytes(length)


def write_index(folder: Path, index: Metadata) -> None:
    """Write ``.metadata`` and ``metadata.json``, which make files of tensors a checkpoint."""
    with open(folder / WEIGHTS_INDEX, "xb") as file:
        pickle.dump(index, file)
    (folder / WEIGHTS_FORMAT).write_text(json.dumps(FORMAT))


def write_tensors(
    tensors: Mapping[str, StoredTensor], folder: Path, *, on_bytes: OnBytes = lambda count: None
) -> None:
    """Write whole tensors into an existing folder without weights, reading each piece only when its turn comes.

    torch's own writer keeps every tensor in memory until the last is written, whatever its planner does.
    """
    path = folder / "__0_0.distcp"
    entries, storage_data = {}, {}
    with _without_checksums(), open(path, "xb") as file:
        for name, tensor in tensors.items():
            properties = TensorProperties(dtype=tensor.dtype)
            entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), [])
            for start, stop in tensor.pieces():
                rows, place = tensor.read_rows(start, stop), file.tell()
                # of a view, torch would write all that lies behind it
                is_view = rows.untyped_storage().nbytes() != rows.nbytes
                save_tensors(rows.clone() if is_view else rows, file)
                offsets = torch.Size((start, *(0 for _ in tensor.shape[1:])))
                entries[name].chunks.append(ChunkStorageMetadata(offsets, rows.shape))
                # private, but a part of the format: every index names it
                storage_data[MetadataIndex(name, offsets)] = _StorageInfo(path.name, place, file.tell() - place)
                on_bytes(rows.nbytes)
    write_index(folder, Metadata(entries, {name: (name,) for name in entries}, storage_data))


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save then takes half the time; torch.load never looks at the checksums."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
