# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save``, read and written without holding their tensors in memory.

Both rest on what torch offers for this: loading under ``FakeTensorMode`` yields every tensor's shape and its place in
the file but not its values, and saving under ``skip_data`` leaves room for the values in the file.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from evo2_megatron.checkpoint.tensors import StoredTensor
from evo2_megatron.config import UserError

UNREADABLE = (
    pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, LookupError, ValueError, TypeError,
    AttributeError, ImportError, OverflowError, RuntimeError,
)  # fmt: skip
"""What reading a damaged pickle, or archive of one, may raise."""


class Span(NamedTuple):
    """A range of bytes of a file."""

    path: Path
    start: int
    length: int


class JoinedFile(io.RawIOBase):
    """Spans of files, read as one file: the parts of a large download, or one entry inside a larger file."""

    def __init__(self, spans: Sequence[Span]) -> None:
        super().__init__()
        self._spans = list(spans)
        self._files: dict[Path, io.FileIO] = {}
        self._position = 0
        self._size = sum(span.length for span in spans)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the current position; fewer bytes only at the end of the last span."""
        count = self.read_at(self._position, memoryview(buffer).cast("B"))
        self._position += count
        return count

    def read_at(self, position: int, buffer: memoryview) -> int:
        """Fill a buffer of bytes from a position, whatever the current one is; returns the number of bytes."""
        done, start = 0, 0
        for span in self._spans:
            within = position + done - start
            while 0 <= within < span.length and done < len(buffer):
                wanted = buffer[done : done + span.length - within]
                count = os.preadv(self._open(span.path).fileno(), [wanted], span.start + within)
                if count == 0:
                    return done
                done, within = done + count, within + count
            start += span.length
        return done

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        super().close()

    def _open(self, path: Path) -> io.FileIO:
        if path not in self._files:
            self._files[path] = io.FileIO(path)
        return self._files[path]


def whole_files(paths: Sequence[Path]) -> JoinedFile:
    """The bytes of some files, one after another."""
    return JoinedFile([Span(path, 0, path.stat().st_size) for path in paths])


def read_torch_file(file: JoinedFile, name: str) -> Any:
    """Read what ``torch.save`` wrote, with a StoredTensor in place of every tensor. Runs no code from the file.

    Args:
        file: Stays open for as long as the tensors are read.
        name: For messages.

    Returns:
        The saved object; only its dictionaries, lists and tuples are searched for tensors.

    Raises:
        UserError: Not such a file, incomplete, or it holds something else than tensors and plain values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    file.seek(0)
    if file.read(2) != b"PK":
        raise UserError(
            f"{name} is not a file of torch.save in its zip format; if an old version of torch wrote it, load and "
            "save it again with a newer one"
        )
    try:
        _check_stored_plainly(file, name)
        file.seek(0)
        # BytesIO: where Transformer Engine keeps its FP8 history; making one runs no code of the file's choice
        with FakeTensorMode(), torch.serialization.safe_globals([io.BytesIO]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("Please file")[0].splitlines()
        detail = next((line for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0]).strip()
        raise UserError(
            f"{name} holds more than tensors and plain values, and nothing of it was run or loaded ({detail}); "
            "save its state dict alone"
        ) from None
    except UserError:
        raise
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise UserError(f"{name} is damaged or incomplete ({reason}); copy it or download it again") from None
    return _with_stored_tensors(loaded, file, name)


def _check_stored_plainly(file: JoinedFile, name: str) -> None:
    """Values are read straight from the file, so they must be there as this machine has them in memory."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    order = [_plain_bytes(file, entry) for entry in entries if entry.filename.partition("/")[2] == "byteorder"]
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if compressed or order not in ([], [b"little"]):
        raise UserError(f"{name} is compressed or from a big-endian machine; load and save it again with torch")


def _plain_bytes(file: JoinedFile, entry: zipfile.ZipInfo) -> bytes:
    """An uncompressed entry; zipfile itself would insist on a checksum, which torch may leave out."""
    file.seek(entry.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    file.seek(name_length + extra_length, io.SEEK_CUR)
    return file.read(entry.file_size)


def _with_stored_tensors(value: Any, file: JoinedFile, name: str) -> Any:
    if isinstance(value, Tensor):
        return _stored(value, file, name)
    if isinstance(value, Mapping):
        return {key: _with_stored_tensors(item, file, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return [_with_stored_tensors(item, file, name) for item in value]
    return value


def _stored(fake: Tensor, file: JoinedFile, name: str) -> StoredTensor:
    if fake.layout is not torch.strided:
        raise UserError(f"{name} holds a tensor in the layout {fake.layout}; save it again with .to_dense()")
    shape, dtype = tuple(fake.shape), fake.dtype
    place = fake.untyped_storage()._checkpoint_offset + fake.storage_offset() * dtype.itemsize
    stride, rows_apart = fake.stride(), fake.stride()[0] if shape else 0
    # numbers from the first to the last element of a row, which a view into a larger tensor may have gaps between
    row_numbers = 1 + sum((size - 1) * step for size, step in zip(shape[1:], stride[1:]))

    def read_rows(start: int, stop: int) -> Tensor:
        size = (stop - start, *shape[1:])
        if 0 in size:
            return torch.empty(size, dtype=dtype)
        numbers = torch.empty((stop - start - 1) * rows_apart + row_numbers, dtype=dtype)
        buffer = memoryview(numbers.view(torch.uint8).numpy())
        if file.read_at(place + start * rows_apart * dtype.itemsize, buffer) != len(buffer):
            raise UserError(f"{name} ends before the last of its tensors; copy it or download it again")
        return numbers.as_strided(size, stride).contiguous()

    return StoredTensor(shape, dtype, read_rows)


def write_torch_file(
    tensors: Mapping[str, StoredTensor], path: Path, *, on_bytes: Callable[[int], Any] = lambda count: None
) -> None:
    """Write a flat state dict in the format of ``torch.save``, piece by piece.

    Args:
        tensors: Entries that are the same object share their place in the file.
        path: The file to write; it is incomplete until this returns.
        on_bytes: Called with the number of bytes after each piece.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fakes = {id(tensor): torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in tensors.values()}
        with torch.serialization.skip_data(materialize_fake_tensors=True), open(path, "wb") as file:
            save_tensors({name: fakes[id(tensor)] for name, tensor in tensors.items()}, file)
        places = torch.load(path, weights_only=True)
    written: set[int] = set()
    with open(path, "r+b", buffering=0) as file:
        for name, tensor in tensors.items():
            if id(tensor) in written:
                continue
            written.add(id(tensor))
            file.seek(places[name].untyped_storage()._checkpoint_offset)
            for start, stop in tensor.pieces():
                rows = tensor.read_rows(start, stop)
                write_all(file, memoryview(rows.view(torch.uint8).numpy().reshape(-1)))
                on_bytes(rows.nbytes)
        os.fsync(file.fileno())


def save_tensors(values: Any, file: BinaryIO) -> None:
    """``torch.save``, with the error of a write that fails, or the interruption.

    torch's archive writer then finds, as it closes, that the file is too short, and says no more than that.
    """
    try:
        torch.save(values, file)
    except RuntimeError as error:
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise


def write_all(file: io.FileIO, data: memoryview) -> None:
    """Write to an unbuffered file, which may take several calls."""
    while data:
        data = data[file.write(data) :]
