# SPDX-License-Identifier: Apache-2.0
"""FASTA to JSON Lines: ``{"id": ..., "prompt": ...}`` for every record, in one pass and a few blocks of memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

from evo2_megatron.config import UserError
from evo2_megatron.data.fasta import read_pieces, record_id
from evo2_megatron.tasks.transfer import disk_errors, new_files

_BUFFER_BYTES = 1 << 18


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
    if source.exists() and target.exists() and source.samefile(target):
        raise UserError(f"{target} is the input; choose another output")
    pieces = read_pieces(source) if not source.is_file() or source.stat().st_size else iter(())
    num_records = 0
    with disk_errors(), new_files([target]) as (partial,), partial.open("wb", buffering=_BUFFER_BYTES) as out:
        for header, bases in pieces:
            if header is not None:
                name = record_id(header)
                end = b'"}\n' if num_records else b""
                out.write(b'%b{"id": %b, "prompt": "' % (end, json.dumps(name).encode()))
                num_records += 1
            if not bases.isalpha():
                bases = _escape(bases, name)
            out.write(bases.upper() if uppercase else bases)
        if num_records:
            out.write(b'"}\n')
    return num_records


def _escape(bases: bytes, name: str) -> bytes:
    """Bases as they stand between the quotes of a JSON string."""
    if not bases.isascii():
        raise UserError(f"the sequence of record '{name}' has bytes that are not ASCII; remove them")
    return json.dumps(bases.decode("ascii"))[1:-1].encode()
