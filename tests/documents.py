# SPDX-License-Identifier: Apache-2.0
"""Read indexed datasets, independently of what writes them."""

import struct
from pathlib import Path


def read_back(prefix, item="B"):
    """Documents of an indexed dataset as lists of ids."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    num = struct.unpack_from("<Q", index, 18)[0]
    lengths = struct.unpack_from(f"<{num}i", index, 34)
    offsets = struct.unpack_from(f"<{num}q", index, 34 + 4 * num)
    return [list(struct.unpack_from(f"<{n}{item}", data, at)) for n, at in zip(lengths, offsets, strict=True)]
