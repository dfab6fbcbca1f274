# SPDX-License-Identifier: Apache-2.0
"""The folder that a run writes to: for one run at a time, and without the run's own inputs among its results."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from evo2_megatron.config import UserError
from evo2_megatron.runtime import distributed
from evo2_megatron.runtime.file_lock import lock_alone
from evo2_megatron.tasks.scoring.prediction_files import ResultNames
from evo2_megatron.tasks.scoring.prediction_parts import FOLDER as PARTS
from evo2_megatron.tasks.transfer import disk_errors

logger = logging.getLogger(__name__)

LOCK = ".lock"


def check_inputs(output_dir: Path | None, names: ResultNames, **inputs: Path) -> None:
    """Before anything is written: inputs can be read twice, and the run would not remove or replace them.

    Args:
        output_dir: Folder of the results; None: nothing is written.
        names: Of results.
        inputs: Files by their flags, without the hyphens in front; one that does not exist is for others to report.

    Raises:
        UserError: One is no regular file, or lies where results go, under whatever name.
    """
    for flag, path in inputs.items():
        if path.exists() and not path.is_file():
            raise UserError(
                f"--{flag} {path} is a folder, not a file"
                if path.is_dir()
                else f"--{flag} {path} is no regular file, and is read more than once; write what a pipe brings to a "
                "file"
            )
    if output_dir is None:
        return
    ours = [*names.find(output_dir), *(output_dir / PARTS).rglob("*"), output_dir / LOCK]
    for flag, path in inputs.items():
        for other in ours:
            if path.is_file() and other.is_file() and path.samefile(other):
                raise UserError(
                    f"--{flag} {path} is {other}, a name that results have in --output-dir: it would be removed; "
                    "choose another folder, or rename it"
                )


@contextlib.contextmanager
def reserved(output_dir: Path | None) -> Iterator[None]:
    """Keep other runs out of a folder for as long as the block lasts; a kill ends that, too.

    Every process of the job calls this, inside process groups. A folder that does not exist is made, and goes again if
    nothing was written to it.

    Args:
        output_dir: None: nothing is written.

    Raises:
        UserError: Another run writes to the folder, or the disk refuses; on all processes.
    """
    if output_dir is None:
        yield
        return
    with contextlib.ExitStack() as held:
        refusal: list[str | None] = [None]
        if distributed.rank() == 0:
            try:
                held.enter_context(_locked(output_dir))
            except UserError as error:
                refusal = [str(error)]
        # told to the others, which would wait for a process that has gone
        torch.distributed.broadcast_object_list(refusal, src=0)
        if refusal[0] is not None:
            raise UserError(refusal[0])
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a hidden file that stays, or a folder with something in it, is no harm
            path.unlink()  # before the lock ends: whoever has opened the file sees that it is not the one there
            for path in made:
                path.rmdir()
        os.close(lock)


def _lock(path: Path) -> int:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.ExitStack() as closing:
            closing.callback(os.close, lock)
            lock_alone(lock, path.parent, choose="--output-dir")
            if _is_there(lock, path):  # else it is of a run that ended between the two calls
                closing.pop_all()
                return lock


def _is_there(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
