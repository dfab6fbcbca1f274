# SPDX-License-Identifier: Apache-2.0
"""Names and contents of what ``predict_evo2`` writes.

::

    predictions__rank_0__dp_rank_0.pt             epoch mode: one file per copy of the model
    predictions__rank_0__dp_rank_0__batch_3.pt    batch mode: one per batch; in subdir_1, subdir_2, ... if asked for
    seq_idx_map.json                              sequence name to the ``seq_idx`` of its row; written last
    scores.tsv                                    one line per sequence, where it has one score

A ``.pt`` file is a dict of tensors for ``torch.load``. Rows of different files belong together by ``seq_idx``.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

INDEX_FILE = "seq_idx_map.json"
SCORES_FILE = "scores.tsv"

_PREDICTION = re.compile(r"predictions__rank_\d+__dp_rank_\d+(__batch_\d+)?\.pt")
_SUBDIR = re.compile(r"subdir_\d+")

Batch = dict[str, Tensor]


def remove_stale_files(output_dir: Path) -> None:
    """Delete what an earlier run left, by the names above and nothing else; readers take every file that matches."""
    if not output_dir.is_dir():
        return
    subdirs = [path for path in output_dir.iterdir() if path.is_dir() and _SUBDIR.fullmatch(path.name)]
    stale = [
        path
        for folder in (output_dir, *subdirs)
        for path in folder.iterdir()
        if path.is_file() and (_PREDICTION.fullmatch(path.name) or path.name in (INDEX_FILE, SCORES_FILE))
    ]
    for path in stale:
        path.unlink()
    for folder in subdirs:
        if not any(folder.iterdir()):
            folder.rmdir()
    if stale:
        logger.info("Removed %d result files of an earlier run from %s", len(stale), output_dir)


class PredictionWriter:
    """Write the batches of one copy of the model, all into one file at the end or each into its own at once."""

    def __init__(
        self,
        output_dir: Path,
        *,
        interval: Literal["epoch", "batch"],
        rank: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        files_per_subdir: int | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            output_dir: Made when the first file is written.
            interval: ``epoch`` holds all results in memory until ``finish``; ``batch`` holds one batch.
            rank: This process among all.
            data_parallel_rank: This copy of the model among ``data_parallel_size``.
            data_parallel_size: Copies of the model.
            files_per_subdir: In batch mode, fill ``subdir_1`` with this many files of all copies, then ``subdir_2``.
        """
        self._output_dir = output_dir
        self._interval = interval
        self._stem = f"predictions__rank_{rank}__dp_rank_{data_parallel_rank}"
        self._dp_rank, self._dp_size = data_parallel_rank, data_parallel_size
        self._files_per_subdir = files_per_subdir
        self._num_batches = 0
        self._held: list[Batch] = []

    def add(self, batch: Batch) -> None:
        """Take one batch; its tensors must be on the CPU."""
        if self._interval == "epoch":
            self._held.append(batch)
        else:
            numbered = batch | {"batch_idx": torch.tensor([self._num_batches])}
            _write(self._folder() / f"{self._stem}__batch_{self._num_batches}.pt", _saves(numbered))
        self._num_batches += 1

    def finish(self) -> None:
        """Write what is held; a process without batches writes no file."""
        if self._held:
            _write(self._output_dir / f"{self._stem}.pt", _saves(concatenate(self._held)))
            self._held = []

    def _folder(self) -> Path:
        if self._files_per_subdir is None:
            return self._output_dir
        place = self._num_batches * self._dp_size + self._dp_rank
        return self._output_dir / f"subdir_{place // self._files_per_subdir + 1}"


def concatenate(batches: list[Batch]) -> Batch:
    """Join batches along axis 0; axis 1, the position, is filled with zeros on the right to the longest.

    Empties ``batches`` as it goes, so that results which fill half of the memory can still be joined.
    """
    return {name: _concatenate([batch.pop(name) for batch in batches]) for name in list(batches[0])}


def _concatenate(parts: list[Tensor]) -> Tensor:
    if parts[0].dim() == 1:
        return torch.cat(parts)
    longest = max(part.shape[1] for part in parts)
    joined = parts[0].new_zeros(sum(part.shape[0] for part in parts), longest, *parts[0].shape[2:])
    end = joined.shape[0]
    while parts:
        part = parts.pop()
        joined[end - part.shape[0] : end, : part.shape[1]] = part
        end -= part.shape[0]
    return joined


def write_index(output_dir: Path, ids: Sequence[str]) -> None:
    """Write ``seq_idx_map.json``: ``{name: seq_idx}``, in the order of the FASTA file."""
    text = json.dumps({name: i for i, name in enumerate(ids)})
    _write(output_dir / INDEX_FILE, lambda file: file.write(text.encode()))


def write_scores(output_dir: Path, column: str, rows: Iterable[tuple[str, int, float]]) -> None:
    """Write ``scores.tsv``: a header line, then name, length in bases and score.

    Args:
        column: ``log_likelihood`` (nat) or ``mean_log_likelihood`` (nat per base that was scored).
        rows: In the order of the FASTA file.
    """
    lines = [f"id\tlength\t{column}\n", *(f"{name}\t{length}\t{score:.9g}\n" for name, length, score in rows)]
    _write(output_dir / SCORES_FILE, lambda file: file.write("".join(lines).encode()))


def _saves(batch: Batch) -> Callable[[BinaryIO], object]:
    return lambda file: torch.save(batch, file)


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside and rename: a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
