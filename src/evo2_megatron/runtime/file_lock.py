# SPDX-License-Identifier: Apache-2.0
"""One process at a time writes to a file or a folder; a kill ends its claim."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from pathlib import Path
from typing import IO

from evo2_megatron.config import UserError

logger = logging.getLogger(__name__)


def lock_alone(file: IO | int, what: Path, *, choose: str) -> None:
    """Lock an open file until it is closed. Where the disk has no locks, a warning says so.

    Args:
        file: Open for writing.
        what: What its lock stands for, to be named.
        choose: What the user can choose another one of.

    Raises:
        UserError: Another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing to {what}; wait for its end, or choose another {choose}") from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): let one run at a time use it", what, error.strerror)


def is_abandoned(folder: Path) -> bool:
    """Whether a folder that was locked is nobody's any more. False where the disk has no locks to tell by."""
    with contextlib.suppress(OSError):  # locked, gone, or without locks
        opened = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        finally:
            os.close(opened)
    return False
