# SPDX-License-Identifier: Apache-2.0
"""Names and contents of what ``predict_evo2`` writes.

::

    predictions__rank_0__dp_rank_0.pt             epoch mode: one file per copy of the model
    predictions__rank_0__dp_rank_0__batch_3.pt    batch mode: one per batch; in subdir_1, subdir_2, ... if asked for
    seq_idx_map.json                              sequence name to the ``seq_idx`` of its row
    scores.tsv, scores.parquet                    one line per sequence
    bases.tsv, bases.parquet                      one line per base that is scored, or that has an embedding
    log_prob.bedgraph, .bigwig, entropy...        the same values for genome browsers, each by itself
    embeddings.parquet, .npz, .safetensors        one vector per sequence, or per base
    logits.npz, .safetensors
    manifest.json                                 what made all this; written last

A ``.pt`` file is a dict of tensors for ``torch.load``. Rows of different files belong together by ``seq_idx``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from evo2_megatron.checkpoint.torch_file import save_tensors
from evo2_megatron.tasks.transfer import disk_errors, new_files

logger = logging.getLogger(__name__)

INDEX_FILE = "seq_idx_map.json"
MANIFEST_FILE = "manifest.json"

GOES_ON = "mend that and run the same command again, which goes on from here"
"""What to do when the disk refuses: finished batches are kept."""

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class ResultNames:
    """Which files of an output folder a command takes for its results, of whatever run."""

    files: str
    """Regular expression of their names."""

    subdirs: str | None = None
    """That of folders which hold such files, too."""

    def folders(self, output_dir: Path) -> list[Path]:
        """The folder, and those in it that may hold results; none if it does not exist."""
        if not output_dir.is_dir():
            return []
        found = [path for path in output_dir.iterdir() if path.is_dir()] if self.subdirs else []
        return [output_dir, *(path for path in found if re.fullmatch(self.subdirs, path.name))]

    def find(self, output_dir: Path, *, whole: bool = True) -> list[Path]:
        """Results, and hidden ones that a kill left half-written; ``whole`` False: these alone."""
        partial = rf"\.({self.files})\.\d+\.(partial|bw)"  # names of ``transfer.new_files``, and of bigWig's library
        pattern = re.compile(f"{self.files}|{partial}" if whole else partial)
        return [
            path
            for folder in self.folders(output_dir)
            for path in folder.iterdir()
            if path.is_file() and pattern.fullmatch(path.name)
        ]


RESULTS = ResultNames(
    r"predictions__rank_\d+__dp_rank_\d+(__batch_\d+)?\.pt|seq_idx_map\.json|manifest\.json|scores\.(tsv|parquet)"
    r"|bases\.(tsv|parquet)|(log_prob|entropy)\.(bedgraph|bigwig)"
    r"|(embeddings|logits)(-\d{5}-of-\d{5})?\.(parquet|npz|safetensors|safetensors\.index\.json)",
    subdirs=r"subdir_\d+",
)


def remove_stale_files(output_dir: Path, names: ResultNames = RESULTS, *, whole: bool = True) -> None:
    """Delete what an earlier run left, by its names and nothing else; readers take every file that matches.

    Args:
        output_dir: Need not exist.
        names: Of results.
        whole: Delete results, too, and not only what a kill left half-written.
    """
    stale = names.find(output_dir, whole=whole)
    for path in stale:
        path.unlink()
    for folder in names.folders(output_dir)[1:]:
        if not any(folder.iterdir()):
            folder.rmdir()
    if stale:
        logger.info("Removed %d result files of an earlier run from %s", len(stale), output_dir)


class TensorFiles:
    """The ``.pt`` files of one copy of the model."""

    def __init__(
        self,
        output_dir: Path,
        *,
        rank: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        files_per_subdir: int | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            output_dir: Made when the first file is written.
            rank: This process among all.
            data_parallel_rank: This copy of the model among ``data_parallel_size``.
            data_parallel_size: Copies of the model.
            files_per_subdir: In batch mode, fill ``subdir_1`` with this many files of all copies, then ``subdir_2``.
        """
        self._output_dir = output_dir
        self._stem = f"predictions__rank_{rank}__dp_rank_{data_parallel_rank}"
        self._dp_rank, self._dp_size = data_parallel_rank, data_parallel_size
        self._files_per_subdir = files_per_subdir

    def write_batch(self, number: int, batch: Batch) -> None:
        """Write a file with one batch: this copy's batch ``number``, counted from 0."""
        numbered = batch | {"batch_idx": torch.tensor([number])}
        path = self._folder(number) / f"{self._stem}__batch_{number}.pt"
        write_beside(path, lambda file: save_tensors(numbered, file))

    def write_all(self, batches: Sequence[Batch]) -> None:
        """Write one file with all batches of this copy, rows by ``seq_idx``; without batches, none."""
        if batches:
            joined = _sorted(concatenate(list(batches)))
            write_beside(self._output_dir / f"{self._stem}.pt", lambda file: save_tensors(joined, file))

    def _folder(self, number: int) -> Path:
        if self._files_per_subdir is None:
            return self._output_dir
        place = number * self._dp_size + self._dp_rank
        return self._output_dir / f"subdir_{place // self._files_per_subdir + 1}"


def concatenate(batches: list[Batch]) -> Batch:
    """Join batches along axis 0; axis 1, the position, is filled with zeros on the right to the longest.

    Vectors per sequence have no positions, but one length. Empties ``batches`` as it goes, so that results which fill
    half of the memory can still be joined.
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


def _sorted(batch: Batch) -> Batch:
    order = batch["seq_idx"].argsort()
    if torch.equal(order, torch.arange(len(order))):
        return batch
    return {name: batch.pop(name)[order] for name in list(batch)}


def write_index(output_dir: Path, ids: Sequence[str]) -> None:
    """Write ``seq_idx_map.json``: ``{name: seq_idx}``, in the order of the FASTA file."""
    text = json.dumps({name: i for i, name in enumerate(ids)})
    write_beside(output_dir / INDEX_FILE, lambda file: file.write(text.encode()))


def write_manifest(output_dir: Path, facts: dict[str, Any]) -> None:
    """Write ``manifest.json``."""
    text = json.dumps(facts, indent=2) + "\n"
    write_beside(output_dir / MANIFEST_FILE, lambda file: file.write(text.encode()))


def write_beside(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside and rename: a file that exists is whole.

    Raises:
        UserError: The disk refuses.
    """
    with disk_errors(path, then=GOES_ON), new_files([path]) as (partial,), partial.open("wb") as file:
        write(file)
