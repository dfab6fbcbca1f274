# SPDX-License-Identifier: Apache-2.0
"""What a Megatron Bridge checkpoint is on disk, and which one a path means. Loads neither torch nor Megatron.

::

    <run>/checkpoints/
      latest_checkpointed_iteration.txt    number of the newest complete iteration
      latest_train_state.pt                copy of that iteration's train_state.pt
      iter_0000001/
        .metadata  __0_0.distcp ...        weights in the format of torch.distributed.checkpoint
        metadata.json                      name and version of that format
        common.pt                          small values that are the same for all processes
        run_config.yaml                    complete configuration of the run
        train_state.pt                     step and sample counters
        self_test.json                     sequences, and how probable the weights find them (tasks/self_test.py)
        SHA256SUMS                         of .metadata and *.distcp, when they were written (checkpoint/checksums.py)
        tokenizer/                         Hugging Face tokenizer files
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from evo2_megatron.config import UserError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
TRACKER = "latest_checkpointed_iteration.txt"
LATEST_TRAIN_STATE = "latest_train_state.pt"
RUN_CONFIG = "run_config.yaml"
TRAIN_STATE = "train_state.pt"
COMMON = "common.pt"
WEIGHTS_INDEX = ".metadata"
WEIGHTS_FORMAT = "metadata.json"
TOKENIZER = "tokenizer"
SELF_TEST = "self_test.json"
CHECKSUMS = "SHA256SUMS"

_ITERATION = re.compile(r"iter_(\d+)")


def iteration_name(iteration: int) -> str:
    """Folder name of one iteration: ``iter_0000001``."""
    return f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """Number of training steps in the name of a checkpoint's folder.

    Raises:
        UserError: The folder has another kind of name.
    """
    match = _ITERATION.fullmatch(checkpoint.resolve().name)
    if match is None:
        raise UserError(f"{checkpoint} is not named iter_<number>; rename it to iter_ and its number of steps")
    return int(match[1])


def replace_text(path: Path, text: str) -> None:
    """Write a small file of a run, at once: whoever reads it finds the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def resolve_checkpoint_path(path: Path, *, flag: str = "--ckpt-dir") -> Path:
    """Find the one checkpoint that a path means.

    A folder with a ``run_config.yaml`` is that checkpoint. In a folder of iterations, the tracker file decides if
    there is one and the iteration it names is complete; else it is the complete iteration with the highest number.
    Complete means that ``run_config.yaml``, which is written last, exists.

    Args:
        path: A checkpoint (``.../iter_0000100``), the folder of a run's checkpoints, or the run's folder.
        flag: Where the user gave the path, for the error.

    Raises:
        UserError: There is no such folder, or no complete checkpoint in it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"Checkpoint {path} does not exist; check {flag}")
    if not path.is_dir():
        raise UserError(f"Checkpoint {path} is a file; give the checkpoint's folder")
    if (path / RUN_CONFIG).is_file():
        return path
    found = iterations(path)
    if not found and (path / CHECKPOINTS).is_dir():
        return resolve_checkpoint_path(path / CHECKPOINTS, flag=flag)
    if not found:
        runs = sorted(folder.parent for folder in (*path.glob(f"*/{CHECKPOINTS}"), *path.glob("*/iter_*")))
        here = f" (here is {runs[0]})" if runs else ""
        raise UserError(
            f"{path} is no checkpoint: it has neither a {RUN_CONFIG} nor a folder named iter_<number>; give the "
            f"folder of a run{here}, its '{CHECKPOINTS}', or one iteration, and convert weights of other formats first"
        )
    complete = {number: folder for number, folder in found.items() if (folder / RUN_CONFIG).is_file()}
    if not complete:
        raise UserError(
            f"No complete checkpoint in {path}: {found[max(found)].name} has no {RUN_CONFIG}; "
            "its writing was interrupted, or it comes from another framework and needs converting"
        )
    tracked = _tracked_iteration(path)
    if tracked in complete:
        return complete[tracked]
    if tracked is not None:
        logger.warning("%s names iteration %s, which is not complete; taking the newest", path / TRACKER, tracked)
    return complete[max(complete)]


def check_common(checkpoint: Path) -> None:
    """Raise UserError if a checkpoint has no ``common.pt``, which says how its weights are laid out."""
    if not (checkpoint / COMMON).is_file():
        raise UserError(f"{checkpoint} has no {COMMON}, so the copy is incomplete; copy the checkpoint again")


def tokenizer_dir(checkpoint: Path) -> Path | None:
    """Folder of the tokenizer that the model was trained with; None if the checkpoint carries none."""
    folder = Path(checkpoint) / TOKENIZER
    return folder if (folder / "tokenizer.json").is_file() else None


def copy_tokenizer(source: Path, checkpoint: Path) -> None:
    """Copy the files of a tokenizer's folder into that of a checkpoint.

    Raises:
        OSError: Of the first file that cannot be copied; ``shutil.copytree`` would raise a list of all.
    """
    for path in sorted(source.rglob("*")):
        if path.is_file():
            target = checkpoint / TOKENIZER / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def iterations(path: Path) -> dict[int, Path]:
    """Number and folder of every iteration, complete or not, in a folder that need not exist."""
    matches = ((_ITERATION.fullmatch(folder.name), folder) for folder in path.glob("iter_*") if folder.is_dir())
    return {int(match[1]): folder for match, folder in matches if match}


def _tracked_iteration(path: Path) -> int | None:
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(errors="replace").strip()
    if not text.isdecimal():
        logger.warning("%s holds %r instead of a number; it is not used", tracker, text[:40])
        return None
    return int(text)
