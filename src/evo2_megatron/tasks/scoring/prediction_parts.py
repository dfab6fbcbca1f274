# SPDX-License-Identifier: Apache-2.0
"""Finished batches on disk, so that a job that was killed goes on where it was.

::

    <output-dir>/.parts/
      plan.json                           what the batches are made from, and which sequences each has
      batch_0000012_6d3f5e0a91b2c47d.pt   results of one batch, of the copy of the model that ran it

A name ends with the first digits of the plan's SHA-256: what another run has written is never taken for a result. The
folder must be one that all processes see. It is gone when the results are complete.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evo2_megatron.checkpoint.checksums import sha256_of_file
from evo2_megatron.checkpoint.torch_file import save_tensors
from evo2_megatron.config import UserError
from evo2_megatron.tasks.scoring.prediction_files import (
    GOES_ON,
    RESULTS,
    ResultNames,
    remove_stale_files,
    write_beside,
)
from evo2_megatron.tasks.transfer import disk_errors

logger = logging.getLogger(__name__)

FOLDER = ".parts"

_PLAN = "plan.json"
_PART = re.compile(r"batch_(\d{7})_([0-9a-f]{16})\.pt")
_PLAN_DIGITS = 16
_OPEN_PARTS = 64

Batch = dict[str, Tensor]


class Parts:
    """The results of a run's batches, by number."""

    def __init__(self, output_dir: Path, batches: Sequence[Sequence[int]]) -> None:
        """Look at what ``begin`` has prepared.

        Args:
            output_dir: Folder of the results.
            batches: Which sequences each batch has.

        Raises:
            UserError: This process does not see the folder.
        """
        self._folder = output_dir / FOLDER
        self._place = {index: (number, row) for number, batch in enumerate(batches) for row, index in enumerate(batch)}
        if not (self._folder / _PLAN).is_file():
            raise UserError(f"--output-dir {output_dir} is not the same folder for all processes; use a shared disk")
        self._plan = sha256_of_file(self._folder / _PLAN)[:_PLAN_DIGITS]
        self._load = lru_cache(maxsize=_OPEN_PARTS)(self._read)

    def done(self) -> set[int]:
        """Numbers of the batches that have been run by this plan."""
        found = [_PART.fullmatch(path.name) for path in self._folder.iterdir()]
        return {int(match[1]) for match in found if match and match[2] == self._plan}

    def add(self, number: int, results: Batch) -> None:
        """Keep the results of a batch; rows in the order of its sequences."""
        write_beside(self._path(number), lambda file: save_tensors(results, file))

    def batch(self, number: int) -> Batch:
        """Results of a batch, read from the disk as they are looked at."""
        return dict(self._load(number))

    def sequence(self, index: int) -> Batch:
        """Results of one sequence: a row of its batch."""
        number, row = self._place[index]
        return {name: values[row] for name, values in self._load(number).items()}

    def release(self) -> None:
        """Unmap what was read: on NFS, a file that a process of the machine still has keeps its folder from going."""
        self._load.cache_clear()

    def remove(self) -> None:
        """Delete all parts, which all processes have released."""
        self.release()
        shutil.rmtree(self._folder)

    def _read(self, number: int) -> Batch:
        return torch.load(self._path(number), weights_only=True, mmap=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"batch_{number:07d}_{self._plan}.pt"


def begin(
    output_dir: Path,
    settings: dict[str, Any],
    batches: Sequence[Sequence[int]],
    *,
    names: ResultNames = RESULTS,
    batch_by_batch: bool = False,
) -> None:
    """Make the folder for parts, unless it is there and belongs to the same run; one process calls this.

    Args:
        output_dir: Folder of the results; those of an earlier run are deleted.
        settings: All that decides what the results are; must survive JSON.
        batches: Which sequences each batch has.
        names: Of results.
        batch_by_batch: Results are written as batches finish: going on, keep them.

    Raises:
        UserError: The disk refuses.
    """
    folder = output_dir / FOLDER
    plan = json.dumps({"settings": settings, "batches": batches}, sort_keys=True)
    path = folder / _PLAN
    if path.is_file() and path.read_text() == plan:
        logger.info("Going on with the run that was cut off in %s", output_dir)
        # all of them are written from parts: what another number of processes, or other formats, left would stay
        remove_stale_files(output_dir, names, whole=not batch_by_batch)
        return
    if folder.exists():
        logger.info("%s is of a run with other settings; starting over", folder)
        shutil.rmtree(folder)
    remove_stale_files(output_dir, names)
    with disk_errors(folder, then=GOES_ON):
        folder.mkdir(parents=True)
    write_beside(path, lambda file: file.write(plan.encode()))


def identity(*folders: Path) -> list[list[tuple[str, int, int]]]:
    """Name, size and time of change in nanoseconds of each file below each folder: cheap, and new if anything is.

    Args:
        folders: Whatever the results come from, each as often as one likes.
    """
    # not a set, whose order is another in every process: a run that goes on would seem to be another one
    return [_files_below(folder) for folder in dict.fromkeys(folders)]


def _files_below(folder: Path) -> list[tuple[str, int, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        (str(path.relative_to(folder)), status.st_size, status.st_mtime_ns)
        for path, status in ((path, path.stat()) for path in files)
    ]


def facts_of_file(name: str, path: Path) -> dict[str, str]:
    """For the settings: where a file was, and what was in it."""
    return {name: str(path), f"{name}_sha256": sha256_of_file(path)}
