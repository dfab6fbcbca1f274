# SPDX-License-Identifier: Apache-2.0
"""Whether something can be written, asked before the work for it begins."""

from __future__ import annotations

import os
from pathlib import Path

from evo2_megatron.config import UserError


def check_may_write(target: Path, *, advice: str = "") -> None:
    """Raise UserError, with ``advice`` at its end, if this user may not make a file or folder and those it lies in."""
    existing = next(folder for folder in target.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {target}: {existing} is no folder that this user may write to{advice}")
