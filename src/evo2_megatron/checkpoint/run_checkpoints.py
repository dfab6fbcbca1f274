# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a training run: whatever moment it is killed at, the last complete one stays and is found."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evo2_megatron.checkpoint import evaluations, layout
from evo2_megatron.config import UserError
from evo2_megatron.runtime import distributed
from evo2_megatron.runtime.file_lock import lock_alone

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_REMOVED = ".{}.removed"


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other runs out of a folder for as long as this process is in the block; a kill ends that, too.

    Raises:
        UserError: Another run writes to the folder.
    """
    with (run_dir / _LOCK).open("w") as lock:
        lock_alone(lock, run_dir, choose="--result-dir or --experiment-name")
        yield


def newest(folder: Path) -> Path | None:
    """The checkpoint that a run goes on from; None: there is no complete one, so that it starts anew.

    Raises:
        UserError: There are newer ones than the tracker names: saving would write over them.
    """
    complete = _complete(folder)
    if not complete:
        return None
    chosen = layout.resolve_checkpoint_path(folder)
    if chosen != complete[-1]:
        raise UserError(
            f"{folder} has {complete[-1].name}, newer than {chosen.name} that {layout.TRACKER} names; move the newer "
            f"ones away to go on from {chosen.name}, or remove {layout.TRACKER} to go on from the newest"
        )
    return chosen


def tidy(folder: Path, newest: Path | None) -> None:
    """Before a run goes on: remove what a kill while saving left, and make the tracker name the newest checkpoint.

    Without its index, ``.metadata``, which is written after all shards, a checkpoint is of no use to anybody.

    Args:
        folder: Of the run's checkpoints; need not exist.
        newest: The one it goes on from.
    """
    for part in [*layout.iterations(folder).values(), *folder.glob(_REMOVED.format("iter_*"))]:
        if not (part / layout.WEIGHTS_INDEX).is_file() or part.name.startswith("."):
            logger.info("Removing %s, the writing of which was interrupted", part)
            shutil.rmtree(part)
    if newest is not None:
        layout.replace_text(folder / layout.TRACKER, f"{layout.iteration_of(newest)}")


def best(folder: Path) -> Path | None:
    """Of the complete checkpoints the one that validations found best; None: they have seen none of them."""
    complete = {layout.iteration_of(part): part for part in _complete(folder)}
    seen = [evaluation for evaluation in evaluations.read_evaluations(folder) if evaluation.step in complete]
    lowest = evaluations.best(seen)
    return None if lowest is None else complete[lowest.step]


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest ``count`` complete checkpoints and the best; what is being written does not count.

    Each is renamed first, so that a checkpoint that has its name is whole.
    """
    spared = best(folder)
    for old in _complete(folder)[:-count]:
        if old == spared:
            continue
        hidden = old.with_name(_REMOVED.format(old.name))
        os.replace(old, hidden)
        shutil.rmtree(hidden)


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = sorted(layout.iterations(folder).items())
    return [part for _, part in found if (part / layout.RUN_CONFIG).is_file()]


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise UserError unless the disk of an existing folder has room for a checkpoint of so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"a checkpoint takes about {num_bytes / 1e9:.3g} GB, and the disk of {folder} has {free / 1e9:.3g} GB "
            "free; make room, or choose another --result-dir"
        )


@functools.cache
def make_saving_safe() -> None:
    """Repair how Megatron Bridge 0.3.1 saves; call after ``runtime.megatron.enter``.

    It writes ``run_config.yaml``, which says that a checkpoint is complete, bit by bit. It removes old checkpoints
    file by file, and counts those still being written as new ones: a run that keeps one and saves in the background
    has none while it saves. What the disk refuses ends in a traceback on each process.
    """
    from megatron.bridge.training import checkpointing, pretrain, train
    from megatron.bridge.training.config import ConfigContainer

    to_yaml = ConfigContainer.to_yaml

    @functools.wraps(to_yaml)
    def write_whole(self: Any, yaml_path: str) -> None:
        partial = Path(yaml_path).with_name(f".{Path(yaml_path).name}.partial")
        to_yaml(self, str(partial))
        os.replace(partial, yaml_path)

    @functools.wraps(checkpointing.cleanup_old_non_persistent_checkpoint)
    def clean_up(save_dir: str, leave_ckpt_num: int = 1, do_async: bool = False) -> None:
        if distributed.rank() == 0:
            keep_newest(Path(save_dir), leave_ckpt_num)

    ConfigContainer.to_yaml = write_whole
    checkpointing.cleanup_old_non_persistent_checkpoint = clean_up
    train.save_checkpoint = pretrain.save_checkpoint = _with_one_line(checkpointing.save_checkpoint)
    train.maybe_finalize_async_save = _with_one_line(checkpointing.maybe_finalize_async_save)


def _with_one_line(save: Callable[..., None]) -> Callable[..., None]:
    """A function of Bridge's that writes, the run's state being its first parameter; UserError where that fails."""
    from torch.distributed.checkpoint.api import CheckpointException

    signature = inspect.signature(save)

    @functools.wraps(save)
    def saving(*args: Any, **kwargs: Any) -> None:
        try:
            save(*args, **kwargs)
        except (OSError, CheckpointException) as error:
            state = next(iter(signature.bind(*args, **kwargs).arguments.values()))
            folder = Path(state.cfg.checkpoint.save)
            complete = _complete(folder)
            last = f"{complete[-1].name} is complete" if complete else "there is no complete one yet"
            free = shutil.disk_usage(folder).free
            raise UserError(
                f"a checkpoint could not be written to {folder}, whose disk has {free / 1e6:.1f} MB free "
                f"({_reason(error)}); {last}; make room and run the same command again"
            ) from error

    return saving


def _reason(error: BaseException) -> str:
    """What the disk said: Megatron's exception has one for each process that failed, as a pair with its traceback."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return (getattr(error, "strerror", None) or str(error)).partition("\n")[0]
