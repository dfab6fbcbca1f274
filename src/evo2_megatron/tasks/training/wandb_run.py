# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases for training: what Bridge leaves to wandb's environment variables."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from evo2_megatron.checkpoint.layout import replace_text
from evo2_megatron.config import UserError

_ID = "wandb_run_id"
_MODES_WITHOUT_ACCOUNT = ("offline", "disabled", "dryrun")


def set_up(run_dir: Path, *, offline: bool) -> None:
    """Make a run that is resumed go on in the same run there; call on the process that logs, before Bridge.

    Args:
        run_dir: Folder of the run, in which the id is kept.
        offline: Send nothing, keep everything in the folder.

    Raises:
        UserError: Nobody is logged in, or the server does not answer.
    """
    if offline:
        os.environ["WANDB_MODE"] = "offline"
    elif os.environ.get("WANDB_MODE") not in _MODES_WITHOUT_ACCOUNT:
        _log_in()
    os.environ |= {"WANDB_RUN_ID": _run_id(run_dir), "WANDB_RESUME": "allow"}


def _run_id(run_dir: Path) -> str:
    kept = run_dir / _ID
    if kept.exists() and (chosen := kept.read_text().strip()):
        return chosen
    chosen = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    replace_text(kept, chosen)
    return chosen


def _log_in() -> None:
    """Ask before the model is built: wandb itself looks for an account when it is first given something."""
    import wandb

    try:
        wandb.login()
    except wandb.errors.Error as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise UserError(
            f"Weights & Biases: {reason}; run wandb login or set WANDB_API_KEY, or give --wandb-offline and send the "
            "run later with wandb sync"
        ) from None
