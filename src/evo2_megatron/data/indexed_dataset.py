# SPDX-License-Identifier: Apache-2.0
"""Megatron's indexed dataset on disk, written without torch or NumPy.

``.bin``: the tokens of all documents, nothing else. ``.idx``, little endian: magic (9 bytes), version 1 (u64), dtype
code (u8), number of sequences n (u64), number of document boundaries d (u64), n lengths in tokens (i32), n byte
offsets (i64), d boundaries (i64). Here a document is one sequence, so d = n + 1.
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from evo2_megatron.config import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_MAX_LENGTH = 2**31 - 1
_BUFFER_BYTES = 1 << 18

# dtype name: code in the index, typecode of array.array
_DTYPES = {"uint8": (1, "B"), "int8": (2, "b"), "int16": (3, "h"), "int32": (4, "i"), "int64": (5, "q"),
           "uint16": (8, "H")}  # fmt: skip
_ITEM_SIZES = {code: array(typecode).itemsize for code, typecode in _DTYPES.values()} | {6: 8, 7: 4}  # and floats
DTYPES = tuple(_DTYPES)
"""Names of the integer types a file can hold."""


class IndexedDatasetWriter:
    """Writes ``<prefix>.bin`` and ``<prefix>.idx`` beside their final place; ``publish`` renames them.

    Memory: 4 bytes per document.
    """

    def __init__(self, prefix: Path, dtype: str) -> None:
        """Open the temporary ``.bin``. ``dtype`` is one of ``DTYPES``."""
        self._paths = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
        self._temporary = [Path(f"{path}.tmp") for path in self._paths]
        self._code, self._typecode = _DTYPES[dtype]
        self._dtype = dtype
        self._item_size = _ITEM_SIZES[self._code]
        self._lengths = array("i")
        self._bin = self._temporary[0].open("wb", buffering=_BUFFER_BYTES)
        self.num_tokens = 0
        self.document_length = 0

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    def write_bytes(self, ids: bytes) -> None:
        """Append tokens whose ids are below 128, one byte each, to the current document."""
        if self._item_size == 1:
            self._bin.write(ids)
        else:  # little endian: the byte is the low one, the rest are zero
            wide = bytearray(self._item_size * len(ids))
            wide[:: self._item_size] = ids
            self._bin.write(wide)
        self.document_length += len(ids)

    def write_ids(self, ids: Sequence[int]) -> None:
        """Append tokens to the current document.

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
        self._lengths.append(self.document_length)
        self.num_tokens += self.document_length
        self.document_length = 0

    def finish(self) -> None:
        """Close the temporary ``.bin`` and write the temporary ``.idx``."""
        self._bin.close()
        num = len(self._lengths)
        offsets = array("q", accumulate((n * self._item_size for n in self._lengths), initial=0))
        with self._temporary[1].open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, self._code, num, num + 1))
            for items in (self._lengths, offsets[:num], array("q", range(num + 1))):
                file.write(_little_endian(items))

    def publish(self) -> None:
        """Give both files their names, replacing older ones."""
        for temporary, path in zip(self._temporary, self._paths, strict=True):
            temporary.replace(path)

    def discard(self) -> None:
        """Remove the temporary files."""
        self._bin.close()
        for temporary in self._temporary:
            temporary.unlink(missing_ok=True)


def _little_endian(items: array) -> bytes:
    if sys.byteorder == "big":
        items.byteswap()
    return items.tobytes()


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
    bin_size = bin_path.stat().st_size
    with idx_path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise UserError(f"{idx_path} is not the index of a Megatron dataset; make it with preprocess_evo2")
        _, _, code, num, _ = _HEADER.unpack(header)
        if not num or not bin_size:
            raise UserError(f"{bin_path} holds no tokens; remove it from the dataset config")
        file.seek(_HEADER.size + 4 * (num - 1))
        (last_length,) = struct.unpack("<i", file.read(4).ljust(4, b"\0"))
        file.seek(_HEADER.size + 4 * num + 8 * (num - 1))
        (last_offset,) = struct.unpack("<q", file.read(8).ljust(8, b"\0"))
    expected = last_offset + last_length * _ITEM_SIZES.get(code, 0)
    if bin_size != expected:
        raise UserError(f"{bin_path} has {bin_size} bytes where its index expects {expected}; copy or make both again")
