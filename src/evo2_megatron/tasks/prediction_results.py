# SPDX-License-Identifier: Apache-2.0
"""From finished batches to the files that were asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evo2_megatron.data.fasta_dataset import FastaDataset
from evo2_megatron.tasks.prediction_parts import Parts
from evo2_megatron.tasks.prediction_settings import Files, Output
from evo2_megatron.tasks.prediction_tables import (
    Array,
    Bases,
    Score,
    write_arrays,
    write_bases,
    write_scores,
    write_vectors,
)

Batch = dict[str, Tensor]


def tensor_record(results: Batch, output: Output) -> Batch:
    """A batch as ``.pt`` files have it: of log-probabilities, what was asked for alone, as ``log_probs_seqs``."""
    if output.log_probs is None:
        return dict(results)
    if output.log_probs == "per_token":
        return {name: results[name] for name in ("log_probs_seqs", "loss_mask", "seq_idx")}
    total_B = results["log_likelihood"]
    if output.log_probs == "mean":
        total_B = total_B / results["num_scored"].clamp(min=1)
    return {"log_probs_seqs": total_B.float(), "seq_idx": results["seq_idx"]}


def without_tensors(results: Batch) -> Batch:
    """Of a batch whose ``.pt`` file is written, what is needed for the table of scores."""
    return {name: values for name, values in results.items() if values.dim() == 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """All results of a run, sequence by sequence."""

    parts: Parts
    dataset: FastaDataset
    output: Output
    prepended: int
    """Tokens in front of every sequence that are no bases: 0 or 1."""

    def write(self, files: Files) -> None:
        """Write all but ``.pt`` files."""
        for suffix in files.formats:
            if self.output.log_probs is not None:
                # beside .pt files, which need a program to be read, there is always the table
                table = "tsv" if suffix == "pt" else suffix
                write_scores(files.output_dir / f"scores.{table}", self._scores())
                if self.output.log_probs == "per_token" and suffix != "pt":
                    write_bases(files.output_dir / f"bases.{suffix}", {"log_prob": None}, self._log_probs())
            elif suffix != "pt":
                self._write_values(files.output_dir, suffix)

    def _write_values(self, folder: Path, suffix: str) -> None:
        shapes = {name: tensor.shape[1:] for name, tensor in self._values(0).items()}
        if self.output.pooling is not None:
            lengths = [length - self.prepended for length in self.dataset.lengths]
            vectors = [self._stacked(name, size) for name, (size,) in shapes.items()]
            write_vectors(folder / f"embeddings.{suffix}", self.dataset.ids, lengths, vectors)
        elif suffix == "parquet":
            columns = {_column(name): size for name, (size,) in shapes.items()}
            write_bases(folder / "bases.parquet", columns, self._vectors())
        else:
            kind = "embeddings" if self.output.embedding_layers else "logits"
            arrays = [array for index in range(len(self.dataset)) for array in self._arrays(index, shapes)]
            write_arrays(folder / f"{kind}.{suffix}", arrays)

    def _scores(self) -> Iterator[Score]:
        for index, (name, length) in enumerate(zip(self.dataset.ids, self.dataset.lengths)):
            row = self.parts.sequence(index)
            total, count = row["log_likelihood"].item(), row["num_scored"].item()
            yield Score(name, length - self.prepended, count, total, total / max(count, 1))

    def _log_probs(self) -> Iterator[Bases]:
        for index, name in enumerate(self.dataset.ids):
            row = self.parts.sequence(index)
            # a value belongs to the token after its place, and of the bases the first has number 1
            positions = row["loss_mask"].nonzero()[:, 0].numpy() + 2 - self.prepended
            letters = np.frombuffer(self.dataset.sequence(index), np.uint8)[positions - 1].tobytes()
            yield Bases(name, positions, letters, {"log_prob": row["log_probs_seqs"][row["loss_mask"]].numpy()})

    def _vectors(self) -> Iterator[Bases]:
        for index, name in enumerate(self.dataset.ids):
            letters = self.dataset.sequence(index)
            positions = np.arange(1, len(letters) + 1)
            values = {_column(key): tensor.numpy() for key, tensor in self._values(index).items()}
            yield Bases(name, positions, letters, values)

    def _values(self, index: int) -> Batch:
        """Logits or hidden states of one sequence: [N, X] for its N bases, or pooled, with one row."""
        row = self.parts.sequence(index)
        values = {name: tensor for name, tensor in row.items() if name.startswith(("hidden", "token_logits"))}
        if self.output.pooling is not None:
            return {name: tensor[None] for name, tensor in values.items()}
        bases = slice(self.prepended, self.dataset.lengths[index])
        return {name: tensor[bases] for name, tensor in values.items()}

    def _arrays(self, index: int, shapes: dict[str, torch.Size]) -> Iterator[Array]:
        name, length = self.dataset.ids[index], self.dataset.lengths[index] - self.prepended
        for key, shape in shapes.items():
            full = name if key == "token_logits" else f"{name}/{_column(key)}"
            yield Array(full, (length, *shape), lambda key=key: self._values(index)[key].numpy())

    def _stacked(self, key: str, size: int) -> Array:
        def load() -> np.ndarray:
            return torch.cat([self._values(index)[key] for index in range(len(self.dataset))]).numpy()

        return Array(_column(key), (len(self.dataset), size), load)


def _column(name: str) -> str:
    """``layer_3`` for the hidden states after layer 3, or ``embedding`` where there is one layer only."""
    return name.removeprefix("hidden_embeddings").removeprefix("_") or "embedding"
