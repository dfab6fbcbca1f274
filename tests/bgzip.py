# SPDX-License-Identifier: Apache-2.0
"""Write BGZF, as the program bgzip does."""

import struct
import zlib

END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def bgzip(data: bytes, block: int = 100) -> bytes:
    """``data`` in blocks of ``block`` bytes, and the empty block at the end."""
    parts = []
    for at in range(0, len(data), block):
        text = data[at : at + block]
        compressor = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        body = compressor.compress(text) + compressor.flush()
        size = 18 + len(body) + 8 - 1
        parts += [struct.pack("<4BI2BH2BHH", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, size), body]
        parts.append(struct.pack("<II", zlib.crc32(text), len(text)))
    return b"".join([*parts, END])
