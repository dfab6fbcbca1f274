# SPDX-License-Identifier: Apache-2.0
"""What tasks that write large files share: a progress bar, room on the disk, and files that appear when complete."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evo2_megatron.config import UserError

logger = logging.getLogger(__name__)

_TRIM_BYTES = 256 * 2**20


@contextlib.contextmanager
def moving(num_tensors: int, num_bytes: int) -> Iterator[Callable[[int], Any]]:
    """Show how far tensors have been moved, and afterwards log how long it took.

    On a terminal there is a bar with bytes and the time left. Yields what to call with each number of bytes done.

    Every 256 MiB, what the C library keeps of freed memory is given back: pieces of many sizes leave gaps between what
    is still in use, by which a process that moves 2 GB would grow by 1 to 2 GB.
    """
    from tqdm import tqdm  # takes longer to load than everything else that splice_evo2 needs

    start = time.perf_counter()
    with tqdm(total=num_bytes, desc="weights", unit="B", unit_scale=True, disable=None) as bar:
        until_trim = _TRIM_BYTES

        def on_bytes(count: int) -> None:
            nonlocal until_trim
            bar.update(count)
            until_trim -= count
            if until_trim <= 0 and trim is not None:
                trim(0)
                until_trim = _TRIM_BYTES

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        yield on_bytes
    seconds = time.perf_counter() - start
    logger.info("%d tensors, %.2f GB in %.2f s", num_tensors, num_bytes / 1e9, seconds)


@contextlib.contextmanager
def disk_errors(path: Path | None = None, *, then: str = "no result was written") -> Iterator[None]:
    """Show what the operating system says against reading or writing a file as one line.

    Args:
        path: The file to name. None: the one that the operating system names, if it does.
        then: What that means for the user, or what to do about it.
    """
    try:
        yield
    except BrokenPipeError:  # nothing is wrong: whoever reads the output wants no more
        raise
    except OSError as error:
        name = path or error.filename2 or error.filename  # of a file that could not get its name, that name
        where = f"{name}: " if name else ""
        raise UserError(f"{where}{error.strerror or error}; {then}") from error


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise UserError unless the disk of an existing folder has room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"the disk of {folder} has {_gigabytes(free)} GB free and the result needs {_gigabytes(num_bytes)} GB; "
            "make room, or choose another disk"
        )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f}" if num_bytes >= 1e9 else f"{num_bytes / 1e9:.2g}"


def file_behind(path: Path) -> Path:
    """Where a file of this name is or will be, through symbolic links.

    Raises:
        UserError: The name is that of a folder, a device or a pipe, none of which can be replaced.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    # asked of the path itself: what /dev/stdout leads to, if it is a pipe, has no name
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a device or a pipe, which a file cannot replace; give the name of a file")
    return Path(os.path.realpath(path))


def check_no_input(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise UserError if a file that is to be written is one that is read."""
    sources = list(inputs)
    for path in outputs:
        if path.exists() and any(source.exists() and path.samefile(source) for source in sources):
            raise UserError(f"{path} is an input; choose another output")


@contextlib.contextmanager
def new_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Hidden names, beside the files' own, to write to; they become the files when the block ends without error.

    The first path gets its name last: whoever waits for it finds the others. Through a symbolic link, what it points
    to is replaced.

    Raises:
        UserError: See ``file_behind``.
    """
    files = [file_behind(path) for path in paths]
    partial = [path.with_name(f".{path.name}.{os.getpid()}.partial") for path in files]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        for old, new in reversed(list(zip(partial, files))):
            os.replace(old, new)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
