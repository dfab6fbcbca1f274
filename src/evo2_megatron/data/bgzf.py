# SPDX-License-Identifier: Apache-2.0
"""Read, on several cores, and write bgzip files (BGZF, section 4.1 of the SAM specification).

A BGZF file is a gzip file of independent blocks of at most 64 KiB, whose headers say how long they are; its last block
is empty, so that a file cut off between two blocks can be told.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import BinaryIO

_HEADER = struct.Struct("<4BI2BH2BHH")
_MAGIC = (31, 139, 8, 4)
_TRAILER = struct.Struct("<II")
_BLOCK_BYTES = 0xFF00  # of text: what bgzip takes, so that incompressible text fits into a block
_GROUP = 16  # blocks that a thread takes at a time: about 1 MiB of text


def is_bgzf(start: bytes) -> bool:
    """Whether the first 18 bytes of a file are the header of a BGZF block, as bgzip writes it."""
    if len(start) < _HEADER.size:
        return False
    *magic, _, _, _, extra, first, second, length, _ = _HEADER.unpack_from(start)
    return tuple(magic) == _MAGIC and (extra, first, second, length) == (6, 66, 67, 2)


class BgzfReader(io.RawIOBase):
    """The text of a BGZF file from its start to its end.

    The threads decompress ahead of the reader, which holds a few MiB of text for each.
    """

    def __init__(self, raw: BinaryIO, *, threads: int) -> None:
        """``raw``: the file, at its start. ``threads``: how many decompress at a time."""
        self._groups = _groups(raw)
        self._pool = ThreadPoolExecutor(threads)
        self._ahead = deque(self._pool.submit(_inflate, group) for group in islice(self._groups, 2 * threads))
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer, or less of it at the end of the file.

        Raises:
            EOFError: The file ends inside a block, or without the empty one.
            zlib.error: A block is damaged.
        """
        num = 0
        while num < len(buffer) and (self._text or self._fill()):
            part = self._text[: len(buffer) - num]
            buffer[num : num + len(part)] = part
            self._text = self._text[len(part) :]
            num += len(part)
        return num

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)
        super().close()

    def _fill(self) -> bool:
        while self._ahead:
            text = self._ahead.popleft().result()
            self._ahead.extend(self._pool.submit(_inflate, group) for group in islice(self._groups, 1))
            if text:
                self._text = memoryview(text)
                return True
        return False


def _groups(raw: BinaryIO) -> Iterator[list[bytes]]:
    """Compressed blocks, a few at a time, each without its header."""
    group: list[bytes] = []
    last_is_empty = False
    while header := raw.read(_HEADER.size):
        if len(header) < _HEADER.size:
            raise EOFError("it ends inside a block")
        if not is_bgzf(header):
            raise zlib.error("a block has no BGZF header")
        size = _HEADER.unpack(header)[-1] + 1 - _HEADER.size
        block = raw.read(size)
        if len(block) < size:
            raise EOFError("it ends inside a block")
        last_is_empty = block[-4:] == b"\0\0\0\0"
        group.append(block)
        if len(group) == _GROUP:
            yield group
            group = []
    if not last_is_empty:
        raise EOFError("its last block, which is an empty one, is missing")
    if group:
        yield group


def _inflate(group: list[bytes]) -> bytes:
    texts = []
    for block in group:
        text = zlib.decompress(memoryview(block)[: -_TRAILER.size], -zlib.MAX_WBITS, 1 << 16)
        if _TRAILER.unpack(block[-_TRAILER.size :]) != (zlib.crc32(text), len(text)):
            raise zlib.error("a block does not have the checksum that it says")
        texts.append(text)
    return b"".join(texts)


class BgzfWriter:
    """Writes a BGZF file, as the program bgzip does; ``close`` adds the empty block that ends it."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._waiting = raw, bytearray()

    def write(self, data: bytes) -> None:
        """Append text."""
        self._waiting += data
        while len(self._waiting) >= _BLOCK_BYTES:
            self._raw.write(_block(bytes(self._waiting[:_BLOCK_BYTES])))
            del self._waiting[:_BLOCK_BYTES]

    def close(self) -> None:
        """Write what is left; the file stays open."""
        if self._waiting:
            self._raw.write(_block(bytes(self._waiting)))
        self._raw.write(_block(b""))


def _block(text: bytes) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = compressor.compress(text) + compressor.flush()
    size = _HEADER.size + len(body) + _TRAILER.size - 1
    header = _HEADER.pack(*_MAGIC, 0, 0, 255, 6, 66, 67, 2, size)
    return header + body + _TRAILER.pack(zlib.crc32(text), len(text))
