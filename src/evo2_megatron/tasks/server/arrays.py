# SPDX-License-Identifier: Apache-2.0
"""Answers that are mostly numbers: how many may be asked for, and how they are written.

Shape legend: X what a result has per sequence.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from evo2_megatron.tasks.server.jobs import Refused

MAX_JSON_VALUES = 2**22
"""Numbers of an answer in JSON: some 90 MB of text."""

MAX_NPZ_VALUES = 2**26
"""Numbers of an answer in an NPZ archive: 256 MiB, a third more in Base64."""

_ROWS_AT_A_TIME = 64
"""Of hidden states."""

_NUMBERS_AT_A_TIME = 1 << 14


def check_values(num_values: int, limit: int, *, way_out: str) -> None:
    """Raise ``Refused`` if an answer would have more numbers than ``limit``, one of those above.

    ``way_out``: what to ask for instead.
    """
    if num_values > limit:
        raise Refused(413, f"the answer would have {num_values} numbers, more than {limit}; ask for {way_out}")


def json_in_pieces(head: Mapping[str, Any], name: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[bytes]:
    """An object of JSON with the entries of ``head``, and under ``name`` a list of dictionaries of arrays or numbers.

    In pieces, so that a large answer never exists as a whole, and so that other requests get their turn meanwhile.
    """
    yield f'{json.dumps(head)[:-1]}, "{name}": ['.encode()
    for number, row in enumerate(rows):
        yield b", {" if number else b"{"
        for place, (key, values) in enumerate(row.items()):
            yield f"{', ' * (place > 0)}{json.dumps(key)}: ".encode()
            yield from _array(np.asarray(values))
        yield b"}"
    yield b"]}"


def _array(values: np.ndarray) -> Iterator[bytes]:
    if not values.ndim:
        yield json.dumps(values.tolist()).encode()
        return
    yield b"["
    size = _ROWS_AT_A_TIME if values.ndim > 1 else _NUMBERS_AT_A_TIME
    for start in range(0, len(values), size):
        text = json.dumps(values[start : start + size].tolist())[1:-1]
        yield (", " * (start > 0) + text).encode()
    yield b"]"


def npz(arrays: Mapping[str, np.ndarray]) -> str:
    """A NumPy archive in Base64."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return base64.b64encode(buffer.getbuffer()).decode()
