# SPDX-License-Identifier: Apache-2.0
"""Processes that help another one, and have no business after it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(pid: int | None = None) -> None:
    """Have the kernel end this process when its parent ends, by whatever death.

    The parent's thread that started it counts as the parent: use it in children of the main thread.

    Args:
        pid: Of the parent. None: the one that ``multiprocessing`` knows, if any.
    """
    if pid is None and (parent := multiprocessing.parent_process()) is not None:
        pid = parent.pid
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if pid is not None and os.getppid() != pid:  # it has ended before the call
        os.kill(os.getpid(), signal.SIGKILL)
