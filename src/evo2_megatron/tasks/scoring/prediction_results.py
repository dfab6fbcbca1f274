# SPDX-License-Identifier: Apache-2.0
"""From finished batches to the files that were asked for.

Shape legend: B sequences, K columns, N bases, X logits or channels, H channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evo2_megatron.config import UserError
from evo2_megatron.data.fasta_dataset import FastaDataset, WindowDataset, tag_length
from evo2_megatron.tasks.forward import OUTPUT_NOT_FINITE
from evo2_megatron.tasks.scoring.prediction_parts import Parts
from evo2_megatron.tasks.scoring.prediction_settings import TRACKS, Files, Output
from evo2_megatron.tasks.scoring.prediction_tables import (
    Array,
    Bases,
    Score,
    write_arrays,
    write_bases,
    write_rows,
    write_vectors,
)
from evo2_megatron.tasks.scoring.prediction_tracks import write_bedgraph, write_bigwig

_BLOCK_BASES = 1 << 16
"""Of a record that was cut into windows, so many bases are joined at a time."""

_COLUMNS = {"log_prob": "log_probs_seqs", "entropy": "entropy_seqs"}
"""What values of bases are called in files, and in a batch."""

_PER_BASE = (*_COLUMNS.values(), "loss_mask")
_OPPOSITE = "opposite_"

Batch = dict[str, Tensor]


def join_strands(both: Batch) -> Batch:
    """Means of two strands from a batch of forward strands followed by their opposites.

    Of values per base, those of the opposite strand are kept beside the others, until the places of all are known.
    """
    size = len(both["seq_idx"]) // 2
    joined: Batch = {}
    for name, values in both.items():
        one, other = values[:size], values[size:]
        if name in _PER_BASE:
            joined |= {name: one, _OPPOSITE + name: other}
        else:
            joined[name] = one if name in ("seq_idx", "num_scored") else (one + other) / 2
    return joined


def check_finite(results: Batch, names: Sequence[str], lengths: Sequence[int]) -> None:
    """Raise UserError for a sequence with a result that is no finite number.

    Args:
        results: Of a batch.
        names: Of its sequences.
        lengths: Their tokens; what the model makes of padding may be anything.
    """
    lengths_B = torch.tensor(lengths)
    for values in results.values():
        finite = values.isfinite()
        if values.dim() == 3:
            is_padding_BL = torch.arange(values.shape[1]) >= lengths_B[:, None]
            finite = finite.all(-1) | is_padding_BL
        finite_B = finite.reshape(len(names), -1).all(1)
        if not finite_B.all():
            raise UserError(f"sequence {names[int(finite_B.int().argmin())]!r}: {OUTPUT_NOT_FINITE}")


def tensor_record(results: Batch, output: Output) -> Batch:
    """A batch as ``.pt`` files have it: of log-probabilities, what was asked for alone, as ``log_probs_seqs``."""
    if output.log_probs is None:
        return dict(results)
    if output.log_probs == "per_token":
        return {name: results[name] for name in (*_PER_BASE, "seq_idx") if name in results}
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
    dataset: FastaDataset | WindowDataset
    output: Output
    prepended: int
    """Tokens in front of every sequence that are no bases: 0 or 1."""

    both_strands: bool = False

    def write(self, files: Files) -> None:
        """Write all but ``.pt`` files."""
        if self.output.log_probs is not None:
            # beside files that need a program to be read, there is always the table
            for table in dict.fromkeys("parquet" if suffix == "parquet" else "tsv" for suffix in files.formats):
                write_rows(files.output_dir / f"scores.{table}", Score, self._scores())
        for suffix in files.formats:
            if self.output.log_probs == "per_token" and suffix != "pt":
                self._write_bases(files.output_dir, suffix)
            elif self.output.log_probs is None and suffix != "pt":
                self._write_values(files.output_dir, suffix)

    def _write_bases(self, folder: Path, suffix: str) -> None:
        ids, columns = self.dataset.ids, self.output.columns
        in_order = range(len(ids))
        if suffix not in TRACKS:
            write_bases(folder / f"bases.{suffix}", dict.fromkeys(columns), self._bases(in_order))
            return
        by_name = sorted(in_order, key=lambda record: ids[record].encode())
        lengths = {ids[record]: self.dataset.num_bases[record] for record in by_name}
        for column in columns:
            path = folder / f"{column}.{suffix}"
            if suffix == "bigwig":
                write_bigwig(path, column, lengths, self._bases(by_name))
            else:
                write_bedgraph(path, column, self._bases(in_order))

    def _write_values(self, folder: Path, suffix: str) -> None:
        shapes = {name: tensor.shape[1:] for name, tensor in self._values(0).items()}
        if self.output.pooling is not None:
            vectors = [self._stacked(name, size) for name, (size,) in shapes.items()]
            write_vectors(folder / f"embeddings.{suffix}", self.dataset.ids, self.dataset.num_bases, vectors)
        elif suffix == "parquet":
            columns = {_column(name): size for name, (size,) in shapes.items()}
            write_bases(folder / "bases.parquet", columns, self._vectors())
        else:
            kind = "embeddings" if self.output.embedding_layers else "logits"
            arrays = [array for index in range(len(self.dataset)) for array in self._arrays(index, shapes)]
            write_arrays(folder / f"{kind}.{suffix}", arrays)

    def _scores(self) -> Iterator[Score]:
        for record, (name, length) in enumerate(zip(self.dataset.ids, self.dataset.num_bases)):
            total, count = 0.0, 0
            for index in self.dataset.samples_of(record):
                row = self.parts.sequence(index)
                total += row["log_likelihood"].item()
                count += row["num_scored"].item()
            yield Score(name, length, count, total, total / max(count, 1))

    def _bases(self, records: Iterable[int]) -> Iterator[Bases]:
        for record in records:
            num_bases = self.dataset.num_bases[record]
            step = _BLOCK_BASES if num_bases > self.dataset.windows.length else num_bases
            for start in range(0, num_bases, step):
                end = min(start + step, num_bases)
                letters = np.frombuffer(self.dataset.bases(record, start, end), np.uint8)
                values_KN, counts_N = self._joined(record, start, end, letters)
                places = counts_N.nonzero()[0]
                yield Bases(
                    self.dataset.ids[record],
                    start + 1 + places,
                    letters[places].tobytes(),
                    dict(zip(self.output.columns, values_KN[:, places])),
                )

    def _joined(self, record: int, start: int, end: int, letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Columns of the bases from ``start`` to ``end``, float32 [K, N], means of the strands that have values; how
        many these are, [N].
        """
        values_KN, counts_N = self._strand(record, start, end)
        if not self.both_strands:
            return values_KN, counts_N
        num_bases = self.dataset.num_bases[record]
        others = self._strand(record, num_bases - end, num_bases - start, prefix=_OPPOSITE)
        # only a record that is one window can have a tag, which is in front on both strands
        tag = tag_length(letters.tobytes()) if end - start == num_bases else 0
        other_KN, other_N = (np.concatenate([part[..., :tag], part[..., tag:][..., ::-1]], -1) for part in others)
        total_KN, counts_N = values_KN.astype(np.float64) + other_KN, counts_N + other_N
        return (total_KN / np.maximum(counts_N, 1)).astype(np.float32), counts_N

    def _strand(self, record: int, start: int, end: int, *, prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Columns of the bases from ``start`` to ``end`` of one strand, in its direction; 1 where there are any."""
        keys = [prefix + _COLUMNS[column] for column in self.output.columns]
        values_KN, counts_N = np.zeros((len(keys), end - start), np.float32), np.zeros(end - start, np.int8)
        windows, num_bases = self.dataset.windows, self.dataset.num_bases[record]
        first = self.dataset.samples_of(record).start
        for number in windows.covering(start, end):
            span = windows.span(number, num_bases)
            row = self.parts.sequence(first + number)
            # a value belongs to the token after its place, so that a first token has none
            shift = span.start + 1 - self.prepended
            low, high = max(start, span.start + span.num_context, shift), min(end, span.end)
            here, there = slice(low - start, high - start), slice(low - shift, high - shift)
            for values_N, key in zip(values_KN, keys):
                values_N[here] = row[key][there].numpy()
            counts_N[here] = row[prefix + "loss_mask"][there].numpy()
        return values_KN, counts_N

    def _vectors(self) -> Iterator[Bases]:
        for index, name in enumerate(self.dataset.ids):
            letters = self.dataset.bases(index, 0, self.dataset.num_bases[index])
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
        name, length = self.dataset.ids[index], self.dataset.num_bases[index]
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
