# SPDX-License-Identifier: Apache-2.0
"""FASTA to JSON Lines: ``{"id": ..., "prompt": ...}`` for every record, in one pass and a few blocks of memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from evo2_megatron.config import UserError
from evo2_megatron.data.fasta import read_pieces, record_id
from evo2_megatron.tasks.preparation import fasta_blocks_to_jsonl
from evo2_megatron.tasks.preparation.two_processes import worth_two
from evo2_megatron.tasks.transfer import check_no_input, disk_errors, new_files

_BATCH_BYTES = 1 << 16  # as for fasta.BLOCK_BYTES
_NUMPY_BYTES = 1 << 26  # of a file from which on NumPy saves more than the 50 ms and 12 MB that its import costs
# what stands in a JSON string as it is; whoever has no other bytes has no white space either
_PLAIN = bytes(byte for byte in range(ord("!"), 0x7F) if byte not in b'"\\')


def fasta_to_jsonl(
    input_path: str | os.PathLike[str], output_path: str | os.PathLike[str], *, uppercase: bool = False
) -> int:
    """Write a JSON object for every record, in the order of the file, and return how many there are.

    Args:
        input_path: FASTA, plain or gzip. A file of 0 bytes has 0 records.
        output_path: In a folder that exists; replaced if it exists.
        uppercase: Write sequences in upper case.

    Raises:
        UserError: The input is not FASTA or not there, a sequence is not ASCII, or the output cannot be written.
    """
    source, target = Path(input_path), Path(output_path)
    if not target.parent.is_dir():
        raise UserError(f"no such folder: {target.parent}; make it first")
    check_no_input([target], [source])
    num_bytes = source.stat().st_size if source.is_file() else None
    pieces = read_pieces(source) if num_bytes != 0 else iter(())
    with disk_errors(), new_files([target]) as (partial,):
        if worth_two(source):
            num_records = fasta_blocks_to_jsonl.convert(source, partial, _json_name, uppercase=uppercase)
            if num_records is not None:
                return num_records
        needs_escapes = _numpy_check() if (num_bytes or 0) >= _NUMPY_BYTES else _needs_escapes
        with partial.open("wb", buffering=0) as out:
            return _write(pieces, out, needs_escapes, uppercase=uppercase)


def _json_name(header: bytes) -> bytes:
    """First word of a header as it stands between the quotes of a JSON string."""
    name = header.split(None, 1)[0]
    if not name.isalnum() and name.translate(None, _PLAIN):
        name = json.dumps(record_id(header))[1:-1].encode()
    return name


def _write(
    pieces: Iterator[tuple[bytes | None, bytes]],
    out: BinaryIO,
    needs_escapes: Callable[[bytes], bool],
    *,
    uppercase: bool,
) -> int:
    """Lines in batches: what a batch's bases need is found out once, and it is joined and written once."""
    num_records = num_waiting = 0
    name = b""
    texts: list[bytes] = []
    places: list[int] = []  # of bases in texts
    names: list[bytes] = []  # of the record that each has
    for header, bases in pieces:
        if header is not None:
            name = _json_name(header)
            texts += (b'"}\n{"id": "' if num_records else b'{"id": "', name, b'", "prompt": "')
            num_records += 1
        places.append(len(texts))
        names.append(name)
        texts.append(bases)
        num_waiting += len(bases) + len(name)
        if num_waiting > _BATCH_BYTES:
            _write_batch(out, texts, places, names, needs_escapes, uppercase=uppercase)
            num_waiting = 0
    if num_records:
        texts.append(b'"}\n')
    _write_batch(out, texts, places, names, needs_escapes, uppercase=uppercase)
    return num_records


def _write_batch(
    out: BinaryIO,
    texts: list[bytes],
    places: list[int],
    names: list[bytes],
    needs_escapes: Callable[[bytes], bool],
    *,
    uppercase: bool,
) -> None:
    """Write ``texts``, in which ``places`` says where bases are, and empty all three lists."""
    if uppercase:
        for place in places:
            texts[place] = texts[place].upper()
    if needs_escapes(b"".join([texts[place] for place in places])):
        for place, name in zip(places, names):
            texts[place] = _escape(texts[place], name)
    data = memoryview(b"".join(texts))
    while data:  # one call may write less, to a disk that is full for example
        data = data[out.write(data) :]
    for each in (texts, places, names):
        each.clear()


def _needs_escapes(bases: bytes) -> bool:
    """Whether bases may differ from what stands for them in a JSON string."""
    return bool(bases) and not bases.isalpha()


def _numpy_check() -> Callable[[bytes], bool]:
    """A faster ``_needs_escapes``."""
    import numpy as np

    def needs_escapes(bases: bytes) -> bool:
        if not bases:
            return False
        codes = np.frombuffer(bases, np.uint8)
        return bool(codes.min() < ord(" ") or codes.max() > ord("~") or b'"' in bases or b"\\" in bases)

    return needs_escapes


def _escape(bases: bytes, name: bytes) -> bytes:
    """Bases as they stand between the quotes of a JSON string."""
    if not bases.translate(None, _PLAIN):
        return bases
    if not bases.isascii():
        shown = json.loads(b'"%b"' % name)
        raise UserError(f"the sequence of record '{shown}' has bytes that are not ASCII; remove them")
    return json.dumps(bases.decode("ascii"))[1:-1].encode()
