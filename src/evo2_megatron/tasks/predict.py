# SPDX-License-Identifier: Apache-2.0
"""Run a trained model over the sequences of a FASTA file: logits, log-probabilities, or embeddings."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from evo2_megatron.checkpoint.adapter import base_checkpoint
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.load import LoadedModel, load_model
from evo2_megatron.checkpoint.run_config import RunConfig, read_run_config
from evo2_megatron.config import Fp8Choice, ParallelConfig, UserError
from evo2_megatron.data.fasta_dataset import FastaDataset
from evo2_megatron.runtime import distributed, megatron
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.prediction_files import PredictionWriter, remove_stale_files, write_index, write_scores
from evo2_megatron.tasks.prediction_runner import CHUNK_LENGTH, Output, Runner, shard

logger = logging.getLogger(__name__)

_PROGRESS_SECONDS = 10.0
_SCORE_COLUMNS = {"sum": "log_likelihood", "mean": "mean_log_likelihood"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Where results go, and how many files."""

    output_dir: Path | None = None
    """None: everything is computed, and nothing is written."""

    write_interval: Literal["epoch", "batch"] = "epoch"
    files_per_subdir: int | None = None

    def __post_init__(self) -> None:
        if self.files_per_subdir is not None and self.write_interval != "batch":
            raise UserError(
                "--files-per-subdir needs --write-interval batch: in epoch mode there is one file per rank"
            )
        if self.output_dir is not None:
            folder = self.output_dir.absolute()
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            if not existing.is_dir():
                raise UserError(f"--output-dir {self.output_dir}: {existing} is a file; give a folder")
            if not os.access(existing, os.W_OK | os.X_OK):
                raise UserError(f"--output-dir {self.output_dir}: no permission to write in {existing}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChanges:
    """How the model differs from the one in the checkpoint; None: not at all."""

    num_layers: int | None = None
    """Keep only the first layers."""

    hybrid_override_pattern: str | None = None
    """The same, as the pattern of the layers to keep."""

    seq_len_interpolation_factor: float | None = None
    """Divide positions by this before the rotary embedding; lengthens the position range in proportion."""

    vortex_style_fp8: bool | None = None
    use_subquadratic_ops: bool | None = None
    fp8: Fp8Choice = "as_asked"
    """What to do about 8-bit input projections."""

    def pattern(self, run_config: RunConfig) -> str:
        """Pattern of the layers to keep."""
        whole = run_config.pattern
        pattern = self.hybrid_override_pattern
        if pattern is None:
            pattern = whole[: self.num_layers]
        if not pattern or not whole.startswith(pattern) or self.num_layers not in (None, len(pattern)):
            raise UserError(
                f"--num-layers {self.num_layers} and --hybrid-override-pattern {self.hybrid_override_pattern} do not "
                f"name the first layers of the checkpoint's pattern {whole}; give a number up to {len(whole)}"
            )
        return pattern

    def overrides(self, pattern: str) -> dict[str, Any]:
        """Fields of the provider, for a model with the layers of ``pattern``."""
        values = {
            "num_layers": len(pattern),
            "hybrid_override_pattern": pattern,
            "seq_len_interpolation_factor": self.seq_len_interpolation_factor,
            "vortex_style_fp8": self.vortex_style_fp8,
            "use_subquadratic_ops": self.use_subquadratic_ops,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """How records become samples, and samples batches."""

    prepend_bos: bool = False
    """Put the end-of-document token, id 0, in front, as in training; then the first base is scored, too."""

    mask_phylogenetic_tags: bool = False
    """Do not score lineage tags (``|d__Bacteria;...|``) inside sequences."""

    max_seq_length: int | None = None
    """Most tokens to accept; None: what the checkpoint was trained for."""

    micro_batch_size: int = 1
    """Sequences per forward pass."""

    min_length: int = 1
    """Tokens that every batch is padded to, at least."""

    chunk_length: int = CHUNK_LENGTH
    """Longer sequences go through the model in pieces of this many tokens."""


def predict(
    fasta: Path,
    ckpt_dir: Path,
    *,
    output: Output = Output(),
    files: Files = Files(),
    sequences: Sequences = Sequences(),
    changes: ModelChanges = ModelChanges(),
    parallel: ParallelConfig = ParallelConfig(),
    precision: str | None = None,
    base_ckpt_dir: Path | None = None,
    with_self_test: bool = False,
) -> None:
    """Score or embed every record of a FASTA file; every process of the job calls this.

    Copies of the model share the sequences: of each block of ``micro_batch_size`` x copies, copy r takes the r-th
    part. A sequence's result depends neither on the others in its batch nor on padding. The files are described in
    ``tasks/prediction_files.py``; ``seq_idx`` is the place in the FASTA file.

    Args:
        fasta: Sequences, plain or gzip.
        ckpt_dir: A Megatron Bridge checkpoint, or a folder of iterations.
        output: What to compute.
        files, sequences: What to write; how to batch.
        changes: Settings of the model that replace the checkpoint's.
        parallel: Sizes of the layout; the rest of the processes are copies of the model.
        precision: Recipe of the number formats; None: the checkpoint's.
        base_ckpt_dir: Where the base of LoRA adapters is now; None: where it was in training.
        with_self_test: Compare the model with the numbers stored in its checkpoint first.

    Raises:
        UserError: Something about the files, the model or the settings is wrong; no result has been written.
    """
    parallel.check_world_size(distributed.world_size())
    checkpoint = resolve_checkpoint_path(ckpt_dir)
    run_config = read_run_config(checkpoint)
    base_checkpoint(checkpoint, run_config, base_ckpt_dir)  # before anything takes time
    pattern = changes.pattern(run_config)
    used_pattern = pattern[: _layers_needed(output, len(pattern))]
    dataset = FastaDataset(fasta, prepend_bos=sequences.prepend_bos, mask_tags=sequences.mask_phylogenetic_tags)
    _check_lengths(dataset, sequences.max_seq_length or _position_range(run_config, changes))
    with distributed.process_groups(parallel, seed=run_config.seed):
        loaded = _load(
            checkpoint,
            with_self_test,
            parallel=parallel,
            precision=precision,
            provider_overrides=changes.overrides(used_pattern),
            base_ckpt_dir=base_ckpt_dir,
            fp8=changes.fp8,
        )
        _log_setup(loaded, output, len(pattern), dataset)
        runner = _runner(loaded, output, sequences)
        scores = _run(runner, dataset, files, sequences.micro_batch_size)
        if files.output_dir is not None and distributed.rank() == 0:
            if output.log_probs in _SCORE_COLUMNS:
                num_bases = [length - sequences.prepend_bos for length in dataset.lengths]
                rows = zip(dataset.ids, num_bases, (scores[i] for i in range(len(dataset))))
                write_scores(files.output_dir, _SCORE_COLUMNS[output.log_probs], rows)
            write_index(files.output_dir, dataset.ids)


def _load(checkpoint: Path, with_self_test: bool, **settings: Any) -> LoadedModel:
    loaded = load_model(checkpoint, **settings)
    if with_self_test:
        self_test.check(loaded)
    return loaded


def check_launch(*, num_nodes: int | None, devices: int | None) -> None:
    """Raise UserError unless torchrun started this many machines, and processes on each; None: any number."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = distributed.world_size() // per_node
    for flag, asked, found in (("--num-nodes", num_nodes, nodes), ("--devices", devices, per_node)):
        if asked not in (None, found):
            raise UserError(f"{flag} is {asked}, but torchrun started {found}; leave it out, torchrun decides")


def _layers_needed(output: Output, num_layers: int) -> int:
    layer = output.embedding_layer
    if layer is None:
        return num_layers
    if not -num_layers <= layer < num_layers:
        raise UserError(
            f"Invalid embedding_layer {layer}: the model has {num_layers} layers; "
            f"choose {-num_layers} to {num_layers - 1}"
        )
    return layer % num_layers + 1


def _position_range(run_config: RunConfig, changes: ModelChanges) -> int:
    """Tokens whose rotary angles the model has seen in training."""
    if changes.seq_len_interpolation_factor is None:
        return run_config.seq_length
    trained = run_config.model.get("seq_len_interpolation_factor") or 1.0
    return int(run_config.seq_length * changes.seq_len_interpolation_factor / trained)


def _check_lengths(dataset: FastaDataset, limit: int) -> None:
    for name, length in zip(dataset.ids, dataset.lengths):
        if length > limit:
            raise UserError(
                f"Sequence {name!r} has {length} tokens, more than the {limit} positions the checkpoint was trained "
                "for; cut it into pieces, or accept worse predictions with --max-seq-length"
            )


def _log_setup(loaded: LoadedModel, output: Output, num_layers: int, dataset: FastaDataset) -> None:
    if distributed.rank() != 0:
        return
    provider = loaded.provider
    logger.info("Model initialized with %d layers", provider.num_layers)
    if output.embedding_layer is not None:
        logger.info(
            "Embedding extraction after layer %d: using %d of %d layers",
            provider.num_layers - 1, provider.num_layers, num_layers,
        )  # fmt: skip
    logger.info(
        "%d sequences, %d tokens; tensor parallel %d, data parallel %d, precision %s, device %s",
        len(dataset), sum(dataset.lengths), provider.tensor_model_parallel_size, distributed.data_parallel_size(),
        loaded.precision, megatron.device(),
    )  # fmt: skip


def _runner(loaded: LoadedModel, output: Output, sequences: Sequences) -> Runner:
    return Runner(
        loaded.model,
        output,
        precision=loaded.precision,
        min_length=sequences.min_length,
        chunk_length=sequences.chunk_length,
    )


def _run(runner: Runner, dataset: FastaDataset, files: Files, micro_batch_size: int) -> dict[int, float]:
    """Predict and write this copy's share; return the scores of all copies, if sequences have one score each."""
    copy, num_copies = distributed.data_parallel_rank(), distributed.data_parallel_size()
    writer = _writer(files)
    scores: dict[int, float] = {}
    progress = _Progress(dataset)
    for batch in shard(len(dataset), micro_batch_size, rank=copy, size=num_copies):
        result = runner([dataset[index] for index in batch])
        if writer is not None and result is not None:
            writer.add(result)
            if runner.output.log_probs in _SCORE_COLUMNS:
                scores.update(zip(result["seq_idx"].tolist(), result["log_probs_seqs"].tolist()))
        progress.show(done=batch.start + micro_batch_size * num_copies)
    if writer is not None:
        writer.finish()
    of_each: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_each, scores)
    progress.finish()
    return {index: score for of_one in of_each for index, score in of_one.items()}


def _writer(files: Files) -> PredictionWriter | None:
    """Clear the folder, and make the writer of those processes that write."""
    if files.output_dir is None:
        if distributed.rank() == 0:
            logger.info("No --output-dir was given: results are computed and dropped")
        return None
    if distributed.rank() == 0:
        remove_stale_files(files.output_dir)
    torch.distributed.barrier()
    if not distributed.is_model_parallel_writer():
        return None
    return PredictionWriter(
        files.output_dir,
        interval=files.write_interval,
        files_per_subdir=files.files_per_subdir,
        rank=distributed.rank(),
        data_parallel_rank=distributed.data_parallel_rank(),
        data_parallel_size=distributed.data_parallel_size(),
    )


class _Progress:
    """A log line every few seconds on rank 0: how far, how fast, how long still."""

    def __init__(self, dataset: FastaDataset) -> None:
        self._lengths, self._num_tokens = dataset.lengths, sum(dataset.lengths)
        self._start = self._last_shown = time.perf_counter()

    def show(self, *, done: int) -> None:
        """``done`` counts the sequences of all copies, which advance about alike."""
        now = time.perf_counter()
        if distributed.rank() != 0 or now - self._last_shown < _PROGRESS_SECONDS:
            return
        self._last_shown = now
        done = min(done, len(self._lengths))
        seconds, tokens = now - self._start, sum(self._lengths[:done])
        left = timedelta(seconds=round(seconds * (self._num_tokens - tokens) / tokens))
        logger.info(
            "Predicted %d of %d sequences, %.1f sequences/s, %.0f tokens/s, time left %s",
            done, len(self._lengths), done / seconds, tokens / seconds, left,
        )  # fmt: skip

    def finish(self) -> None:
        """Figures of the whole run; writing is part of the time, loading is not."""
        if distributed.rank() == 0:
            seconds, count = time.perf_counter() - self._start, len(self._lengths)
            logger.info(
                "Predicted %d sequences, %d tokens in %.2f s: %.1f sequences/s, %.0f tokens/s",
                count, self._num_tokens, seconds, count / seconds, self._num_tokens / seconds,
            )  # fmt: skip
