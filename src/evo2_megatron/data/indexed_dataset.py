# SPDX-License-Identifier: Apache-2.0
"""Megatron's indexed dataset on disk, written without torch or NumPy.

``.bin``: the tokens of all documents, nothing else. ``.idx``, little endian: magic (9 bytes), version 1 (u64), dtype
code (u8), number of sequences n (u64), number of document boundaries d (u64), n lengths in tokens (i32), n byte
offsets (i64), d boundaries (i64). Here a document is one sequence, so d = n + 1.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

from evo2_megatron.config import UserError
from evo2_megatron.runtime.file_lock import lock_alone

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_MAX_LENGTH = 2**31 - 1
_BUFFER_BYTES = 1 << 18
_CHUNK = 1 << 14  # numbers of the index that are handled at a time

# dtype name: code in the index, typecode of array.array
_DTYPES = {"uint8": (1, "B"), "int8": (2, "b"), "int16": (3, "h"), "int32": (4, "i"), "int64": (5, "q"),
           "uint16": (8, "H")}  # fmt: skip
_ITEM_SIZES = {code: array(typecode).itemsize for code, typecode in _DTYPES.values()} | {6: 8, 7: 4}  # and floats
DTYPES = tuple(_DTYPES)
"""Names of the integer types a file can hold."""


class TokenCounter:
    """Counts what a writer would write."""

    def __init__(self) -> None:
        self.num_documents = 0
        """Documents ended so far."""

        self.num_tokens = 0
        """Their tokens."""

        self.document_length = 0
        """Tokens of the current document."""

    def write_bytes(self, ids: bytes) -> None:
        """Take tokens whose ids are below 128, one byte each, for the current document."""
        self.document_length += len(ids)

    def write_ids(self, ids: Sequence[int]) -> None:
        """Take tokens for the current document."""
        self.document_length += len(ids)

    def end_document(self) -> None:
        """Close the current document.

        Raises:
            UserError: It is longer than the format allows.
        """
        if self.document_length > _MAX_LENGTH:
            raise UserError(
                f"a document of {self.document_length} tokens exceeds the format's limit of {_MAX_LENGTH}; "
                "set split_window_length to cut it"
            )
        self.num_documents += 1
        self.num_tokens += self.document_length
        self.document_length = 0


class IndexedDatasetWriter(TokenCounter):
    """Writes ``<prefix>.bin`` and ``<prefix>.idx`` beside their final place; ``publish`` renames them.

    Memory does not depend on how much is written.
    """

    def __init__(self, prefix: Path, dtype: str) -> None:
        """Open the temporary files. ``dtype`` is one of ``DTYPES``.

        Raises:
            UserError: Another process is writing them.
        """
        super().__init__()
        self._paths = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
        self._temporary = [Path(f"{path}.tmp") for path in self._paths]
        self._code, self._typecode = _DTYPES[dtype]
        self._dtype = dtype
        self._item_size = _ITEM_SIZES[self._code]
        self._bin = _open_alone(self._temporary[0])
        self._idx = self._temporary[1].open("w+b", buffering=_BUFFER_BYTES)
        self._idx.write(bytes(_HEADER.size))
        self._lengths = array("i")

    def write_bytes(self, ids: bytes) -> None:
        if self._item_size == 1:
            self._bin.write(ids)
        else:  # little endian: the byte is the low one, the rest are zero
            wide = bytearray(self._item_size * len(ids))
            wide[:: self._item_size] = ids
            self._bin.write(wide)
        super().write_bytes(ids)

    def write_ids(self, ids: Sequence[int]) -> None:
        """Take tokens for the current document.

        Raises:
            UserError: The dtype cannot hold an id.
        """
        try:
            items = array(self._typecode, ids)
        except OverflowError:
            raise UserError(
                f"indexed_dataset_dtype {self._dtype} cannot hold token id {max(ids)}; use a wider one, such as uint16"
            ) from None
        self._bin.write(_little_endian(items))
        super().write_ids(ids)

    def end_document(self) -> None:
        length = self.document_length
        super().end_document()
        self._lengths.append(length)
        if len(self._lengths) == _CHUNK:
            self._idx.write(_little_endian(self._lengths))
            self._lengths = array("i")

    def finish(self) -> None:
        """Close both temporary files, complete."""
        self._bin.close()
        self._idx.write(_little_endian(self._lengths))
        num, offset = self.num_documents, 0
        for start in range(0, num, _CHUNK):
            self._idx.seek(_HEADER.size + 4 * start)
            lengths = _from_little_endian("i", self._idx.read(4 * min(_CHUNK, num - start)))
            *offsets, offset = accumulate((n * self._item_size for n in lengths), initial=offset)
            self._idx.seek(0, os.SEEK_END)
            self._idx.write(_little_endian(array("q", offsets)))
        for start in range(0, num + 1, _CHUNK):
            self._idx.write(_little_endian(array("q", range(start, min(start + _CHUNK, num + 1)))))
        self._idx.seek(0)
        self._idx.write(_HEADER.pack(_MAGIC, 1, self._code, num, num + 1))
        self._idx.close()

    def publish(self) -> None:
        """Give both files their names, replacing older ones."""
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            temporary.replace(path)

    def discard(self) -> None:
        """Remove the temporary files."""
        for file in (self._bin, self._idx):
            with contextlib.suppress(OSError):  # a full disk, again: what was not written is not wanted
                file.close()
        for temporary in self._temporary:
            temporary.unlink(missing_ok=True)


def _open_alone(path: Path) -> BinaryIO:
    """Open for writing, unless another process has it open: two runs would mix their tokens."""
    file = path.open("ab", buffering=_BUFFER_BYTES)
    with contextlib.ExitStack() as closing:
        closing.callback(file.close)
        lock_alone(file, path, choose="output_prefix")
        file.truncate(0)
        closing.pop_all()
    return file


def _from_little_endian(typecode: str, data: bytes) -> array:
    items = array(typecode, data)
    if sys.byteorder == "big":
        items.byteswap()
    return items


def _little_endian(items: array) -> bytes:
    if sys.byteorder == "big":
        items.byteswap()
    return items.tobytes()


def is_whole(prefix: str | os.PathLike[str]) -> bool:
    """Whether both files exist and belong together; they may hold no document."""
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if not bin_path.is_file() or not idx_path.is_file():
        return False
    index = _read_index(idx_path)
    return index is not None and bin_path.stat().st_size == index.num_bytes


def check_indexed_dataset(prefix: str | os.PathLike[str]) -> None:
    """Check that both files exist, hold tokens, and belong together.

    Raises:
        UserError: They do not.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise UserError(
                f"no such file: {path}; a dataset prefix is the path of a .bin and an .idx file without them"
            )
    index = _read_index(idx_path)
    if index is None:
        raise UserError(f"{idx_path} is not the index of a Megatron dataset; make it with preprocess_evo2")
    bin_size = bin_path.stat().st_size
    if not index.num_sequences or not bin_size:
        raise UserError(f"{bin_path} holds no tokens; remove it from the dataset config")
    if bin_size != index.num_bytes:
        raise UserError(
            f"{bin_path} has {bin_size} bytes where its index expects {index.num_bytes}; copy or make both again"
        )


class _Index(NamedTuple):
    num_sequences: int
    num_bytes: int  # that the .bin must have


def _read_index(path: Path) -> _Index | None:
    """What the index says about its ``.bin``; None: it is no index."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            return None
        _, _, code, num, _ = _HEADER.unpack(header)
        if not num:
            return _Index(0, 0)
        file.seek(_HEADER.size + 4 * (num - 1))
        (last_length,) = struct.unpack("<i", file.read(4).ljust(4, b"\0"))
        file.seek(_HEADER.size + 4 * num + 8 * (num - 1))
        (last_offset,) = struct.unpack("<q", file.read(8).ljust(8, b"\0"))
    return _Index(num, last_offset + last_length * _ITEM_SIZES.get(code, 0))
