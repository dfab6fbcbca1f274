# SPDX-License-Identifier: Apache-2.0
"""FASTA to JSON Lines in two processes, each of which takes every second run of blocks of the file.

A block's text needs nothing from other blocks where lines are tidy: a record that goes on has only bases there. Its
place in the output is all that comes before it; so as soon as a process has made the texts of a run, before it writes
them, it tells the other one where the next begins. ``fasta_to_jsonl`` in one process is the reference, and does what
is not tidy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from evo2_megatron.data.fasta import BLOCK_BYTES
from evo2_megatron.tasks.preparation.two_processes import Channel, Gone, second_process, write_at

_RUN_BLOCKS = 8
"""Blocks of a run: telling the other process and waiting for it costs as much as a block, and eight fit into a
core's cache."""

_PROBE_BYTES = 1 << 12
_NEWLINE = 10
_BEGIN, _MIDDLE, _END = b'{"id": "', b'", "prompt": "', b'"}\n'


class _NotTidyError(Exception):
    """A block has something that only what comes before could explain, or that JSON or an error has to tell."""


def convert(source: Path, target: Path, json_name: Callable[[bytes], bytes], *, uppercase: bool) -> int | None:
    """Write the records and return how many there are; None if that needs one process, whatever is written then.

    Args:
        source: FASTA, neither compressed nor a pipe, that begins with a header.
        target: File to write.
        json_name: From a header to its first word as it stands in JSON.
        uppercase: Write sequences in upper case.
    """
    file = os.open(source, os.O_RDONLY)
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    blocks = _Blocks(file, out, json_name, uppercase)
    try:
        with second_process(lambda channel: channel.send(blocks.write(1, channel)[0])) as channel:
            num_records, end = blocks.write(0, channel)
            num_records += channel.receive()
        write_at(out, [_END], end)
    except (*Gone, _NotTidyError):
        return None
    finally:
        os.close(file)
        os.close(out)
    return num_records


class _Blocks:
    """The blocks of an open file and their texts."""

    def __init__(self, file: int, out: int, json_name: Callable[[bytes], bytes], uppercase: bool) -> None:
        self._file, self._out, self._json_name, self._uppercase = file, out, json_name, uppercase
        self._size = os.fstat(file).st_size

    def write(self, first: int, channel: Channel) -> tuple[int, int]:
        """Write every second run from ``first`` on; return how many records begin there and where all blocks end."""
        num_runs = -(-self._size // (_RUN_BLOCKS * BLOCK_BYTES))
        num_records = end = 0
        for run in range(first, num_runs, 2):
            texts, num_here = self._run(run)
            num_records += num_here
            place = channel.receive() if run else 0
            end = place + sum(map(len, texts))
            channel.send(end)
            write_at(self._out, texts, place)
        if num_runs % 2 == first:  # the last one was the other's
            end = channel.receive()
        return num_records, end

    def _run(self, run: int) -> tuple[list[bytes], int]:
        """The text of each block of a run, and how many records begin in them."""
        texts, num_records = [], 0
        end = self._cut(run * _RUN_BLOCKS)
        for number in range(run * _RUN_BLOCKS, (run + 1) * _RUN_BLOCKS):
            start, end = end, self._cut(number + 1)
            block = os.pread(self._file, end - start, start)
            # the file has to begin with a header; and within a long line a '>' is none
            if block.startswith(b">") != (number == 0) and start == number * BLOCK_BYTES < self._size:
                raise _NotTidyError
            of_block = self._texts(block)
            if number == 0:
                of_block[1] = _BEGIN
            num_records += len(of_block) // 4
            texts.append(b"".join(of_block))
        return texts, num_records

    def _cut(self, number: int) -> int:
        """Where a block begins: at the first line that begins in it, or, if none does, within that long line."""
        at = number * BLOCK_BYTES
        if number == 0 or at >= self._size:
            return min(at, self._size)
        for probe in range(at, at + BLOCK_BYTES, _PROBE_BYTES):
            found = os.pread(self._file, _PROBE_BYTES, probe).find(b"\n")
            if found >= 0:
                return probe + found + 1
        return at

    def _texts(self, block: bytes) -> list[bytes]:
        """Bases that come before the first header, then for each record what begins it, its name, and its bases."""
        header_at = block.find(b">")
        texts = [self._bases(block[:header_at] if header_at >= 0 else block)]
        while header_at >= 0:
            line_end = block.find(b"\n", header_at)
            next_at = block.find(b">", line_end)
            # a '>' within a line of bases, or a header that goes on in the next block
            if line_end < 0 or (header_at and block[header_at - 1] != _NEWLINE):
                raise _NotTidyError
            header = block[header_at + 1 : line_end]
            if not header.isalnum():
                if b"\r" in header or not header.strip():
                    raise _NotTidyError
                header = self._json_name(header)
            lines = block[line_end + 1 : next_at] if next_at >= 0 else block[line_end + 1 :]
            texts += (_END + _BEGIN, header, _MIDDLE, self._bases(lines))
            header_at = next_at
        return texts

    def _bases(self, lines: bytes) -> bytes:
        bases = lines.replace(b"\n", b"")
        if bases and not bases.isalpha():  # letters need no escapes, and are no white space
            raise _NotTidyError
        return bases.upper() if self._uppercase else bases
