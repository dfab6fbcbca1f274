# SPDX-License-Identifier: Apache-2.0
"""A second process for work on a large file that can be cut in two. Both write to places of one file.

The second process never speaks to the user. When it meets something that it cannot do, from an odd line to a full
disk, it ends without its last message; the caller then does the whole work in one process, which is the reference for
results and for what is said about errors.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_WORTH_BYTES = 1 << 25  # of input: the second process costs some ms and as much memory again
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Gone = (EOFError, BrokenPipeError)
"""What ``Channel`` raises when the other process has ended."""


def worth_two(source: Path) -> bool:
    """Whether the file is plain (neither gzip nor a pipe), large, and there is a second core for it."""
    # a process with threads cannot be copied safely; and not every system can say which cores it may use
    if threading.active_count() > 1 or not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        return False
    if not source.is_file() or source.stat().st_size < _WORTH_BYTES or not os.access(source, os.R_OK):
        return False
    with source.open("rb") as file:
        return file.read(2) != b"\x1f\x8b"


class Channel:
    """Values of Python's basic types to the other process and from it, in order."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        """From two ends of pipes, which it closes."""
        self._incoming, self._outgoing = os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb", buffering=0)

    def send(self, value: Any) -> None:
        """Send a value; waits only while the pipe (64 KiB) is full."""
        data = memoryview(marshal.dumps(value))
        while data:
            data = data[self._outgoing.write(data) :]

    def receive(self) -> Any:
        """Wait for the next value."""
        return marshal.load(self._incoming)

    def close(self) -> None:
        """Close both ends."""
        self._incoming.close()
        self._outgoing.close()


@contextlib.contextmanager
def second_process(work: Callable[[Channel], None]) -> Iterator[Channel]:
    """Run ``work(channel)`` in a copy of this process; it is gone when the block ends, however that ends."""
    to_second, to_first = os.pipe(), os.pipe()
    # none may arrive while there are two of us that would clean up
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        pid = os.fork()
    except OSError as error:  # no room for another process: as if it had ended
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for end in (*to_second, *to_first):
            os.close(end)
        raise EOFError(error.strerror) from error
    if not pid:
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both: the first process decides
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(to_second[1])  # so that this process notices the end of the first
            os.close(to_first[0])
            work(Channel(to_second[0], to_first[1]))
        finally:
            os._exit(0)  # whatever happened: what stands above in the stack is the first process's
    channel = None
    try:
        os.close(to_second[0])
        os.close(to_first[1])
        channel = Channel(to_first[0], to_second[1])
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield channel
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if channel is not None:
            channel.close()


class PlacedWriter:
    """Writes to an open file from a place on, whatever the file's own position."""

    def __init__(self, file: int, offset: int) -> None:
        """``offset``: in bytes from the beginning of the file."""
        self._file, self._offset = file, offset

    def write(self, data: bytes) -> None:
        """Write all of it."""
        write_at(self._file, [data], self._offset)
        self._offset += len(data)


def write_at(file: int, pieces: Sequence[bytes], offset: int) -> None:
    """Write all ``pieces``, of which there are 1,024 at most, one after the other at a place of an open file."""
    num = os.pwritev(file, pieces, offset)
    if num < sum(map(len, pieces)):  # one call may write less, to a disk that is full for example
        rest = memoryview(b"".join(pieces))
        while rest := rest[num:]:
            offset += num
            num = os.pwrite(file, rest, offset)
