# SPDX-License-Identifier: Apache-2.0
"""Run a trained model over the sequences of a FASTA file: logits, log-probabilities, or embeddings."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evo2_megatron.checkpoint.adapter import base_checkpoint
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.load import LoadedModel, language_model_config
from evo2_megatron.checkpoint.run_config import RunConfig
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.data.fasta_dataset import FastaDataset, WindowDataset
from evo2_megatron.data.nucleotides import log_no_dna
from evo2_megatron.runtime import distributed, megatron
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.scoring import prediction_parts
from evo2_megatron.tasks.scoring.batch_progress import Words
from evo2_megatron.tasks.scoring.batching import Backoff, batch_tokens, plan_batches
from evo2_megatron.tasks.scoring.prediction_files import RESULTS, TensorFiles, write_index, write_manifest
from evo2_megatron.tasks.scoring.prediction_folder import check_inputs, reserved
from evo2_megatron.tasks.scoring.prediction_manifest import CheckpointDigest, as_json, manifest
from evo2_megatron.tasks.scoring.prediction_parts import Batch, Parts
from evo2_megatron.tasks.scoring.prediction_results import (
    Results,
    check_finite,
    join_strands,
    tensor_record,
    without_tensors,
)
from evo2_megatron.tasks.scoring.prediction_runner import Runner
from evo2_megatron.tasks.scoring.prediction_settings import Files, ModelChanges, Output, Sequences, Window
from evo2_megatron.tasks.scoring.prediction_tables import check_array_names
from evo2_megatron.tasks.scoring.prediction_tracks import check_num_contigs
from evo2_megatron.tasks.scoring.shared_batches import SharedBatches

logger = logging.getLogger(__name__)


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

    Sequences of similar length share a batch, and copies of the model share the batches; neither changes a result.
    Finished batches are kept in the output folder: a job that was killed goes on, with the results of one that was
    not. ``scoring/prediction_files.py`` describes the files; ``seq_idx`` is the place in the FASTA file.

    Args:
        fasta: Sequences, plain or gzip.
        ckpt_dir: A Megatron Bridge checkpoint, or a folder of iterations.
        output, files, sequences: What to compute, what to write, how to batch.
        changes: Settings of the model that replace the checkpoint's.
        parallel: Sizes of the layout; the rest of the processes are copies of the model.
        precision, base_ckpt_dir: Recipe of number formats; where LoRA's base is now. None: as in the checkpoint.
        with_self_test: Compare the model with the numbers stored in its checkpoint first.

    Raises:
        UserError: Something about the files, the model or the settings is wrong, or the disk refuses.
    """
    check_inputs(files.output_dir, RESULTS, fasta=fasta)
    parallel.check_world_size(distributed.world_size())
    sequences.check_can_make(output)
    files.check_can_hold(output, sequences)
    checkpoint = resolve_checkpoint_path(ckpt_dir)
    run_config = language_model_config(checkpoint)
    base = base_checkpoint(checkpoint, run_config, base_ckpt_dir)  # before anything takes time
    pattern = changes.pattern(run_config)
    layers = output.layers_of(len(pattern))
    with (
        _dataset(fasta, output, files, sequences, position_range(run_config, changes)) as dataset,
        distributed.process_groups(parallel, seed=run_config.seed),
        reserved(files.output_dir),
    ):
        loaded = self_test.load_model_checked(
            checkpoint,
            with_self_test=with_self_test,
            parallel=parallel,
            precision=precision,
            provider_overrides=changes.overrides(pattern[: layers[-1] + 1] if layers else pattern),
            base_ckpt_dir=base_ckpt_dir,
            fp8=changes.fp8,
        )
        _log_setup(loaded, output, len(pattern), dataset)
        run = _Prediction(loaded, dataset, output, files, sequences, layers)
        if files.output_dir is None:
            return run.compute()
        settings = _settings(fasta, output=output, sequences=sequences, changes=changes, parallel=parallel)
        run.compute_and_write(settings, prediction_parts.identity(checkpoint, base))


def check_nodes(num_nodes: int | None) -> None:
    """Raise UserError unless torchrun runs on this many machines; None: any number."""
    found = distributed.world_size() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_nodes not in (None, found):
        raise UserError(f"--num-nodes is {num_nodes}, but processes run on {found}; leave it out, torchrun decides")


def position_range(run_config: RunConfig, changes: ModelChanges) -> int:
    """Tokens whose rotary angles the model has seen in training."""
    if changes.seq_len_interpolation_factor is None:
        return run_config.seq_length
    trained = run_config.model.get("seq_len_interpolation_factor") or 1.0
    return int(run_config.seq_length * changes.seq_len_interpolation_factor / trained)


def check_lengths(dataset: FastaDataset, limit: int, *, instead: str = "cut it into pieces") -> None:
    """Raise UserError for a sequence of more tokens than ``limit``, with what to do ``instead``."""
    for name, length in zip(dataset.ids, dataset.lengths):
        if length > limit:
            raise UserError(
                f"Sequence {name!r} has {length} tokens, more than the {limit} positions the checkpoint was trained "
                f"for; {instead}, or accept worse predictions with --max-seq-length"
            )


def _settings(fasta: Path, **given: Any) -> dict[str, Any]:
    return as_json(given) | prediction_parts.facts_of_file("fasta", fasta)


@contextlib.contextmanager
def _dataset(
    fasta: Path, output: Output, files: Files, sequences: Sequences, trained_for: int
) -> Iterator[FastaDataset | WindowDataset]:
    how = {"prepend_bos": sequences.prepend_bos, "keep_tag_case": sequences.keep_tag_case}
    windows = sequences.windows(trained_for)
    if windows is None:
        dataset = FastaDataset(fasta, mask_tags=sequences.mask_phylogenetic_tags, **how)
        instead = "cut it into pieces" if output.log_probs is None else "score it in windows with --window-length"
        check_lengths(dataset, sequences.max_seq_length or trained_for, instead=instead)
        _check_window(dataset, output, masked=sequences.mask_phylogenetic_tags)
    else:
        dataset = WindowDataset(fasta, windows, **how)
    with contextlib.nullcontext() if windows is None else dataset:
        if "bigwig" in files.formats:
            check_num_contigs(len(dataset.ids))
        if "safetensors" in files.formats and output.embedding_layers == ():
            check_array_names(dataset.ids)
        yield dataset


def _check_window(dataset: FastaDataset, output: Output, *, masked: bool) -> None:
    if not isinstance(output.pooling, Window):
        return
    for index, (name, num_bases) in enumerate(zip(dataset.ids, dataset.num_bases)):
        if masked:  # lineage tags, and what else is no base
            num_bases = int(dataset[index]["loss_mask"].sum())
        if num_bases < output.pooling.last:
            raise UserError(
                f"Sequence {name!r} has {num_bases} bases, fewer than the {output.pooling.last} that "
                "--pooling-window reaches to; leave it out, or move the window"
            )


@dataclass(slots=True)
class _Prediction:
    """A loaded model, and what it is to do."""

    loaded: LoadedModel
    dataset: FastaDataset | WindowDataset
    output: Output
    files: Files
    sequences: Sequences
    layers: list[int]

    def compute(self) -> None:
        """Run everything, and keep nothing."""
        if distributed.rank() == 0:
            logger.info("No --output-dir was given: results are computed and dropped")
        batches = self._batches()
        for _ in self._results(batches, self._shared(batches)):
            pass

    def compute_and_write(self, settings: dict[str, Any], identity: list[Any]) -> None:
        """Run what an earlier job has not, and write the files."""
        first, batches = distributed.rank() == 0, self._batches()
        digest = CheckpointDigest(self.loaded.checkpoint) if first else None
        shared, copies = self._shared(batches), distributed.data_parallel_size()
        key = dict(settings)
        batch_by_batch = self.files.write_interval == "batch"
        if batch_by_batch:
            key |= {"copies": copies, "files": as_json(self.files)}  # whose batch it is stands in a file's name
        parts = shared.resume(self.files.output_dir, key, self.loaded, identity, batch_by_batch=batch_by_batch)
        tensor_files = _tensor_files(self.files) if "pt" in self.files.formats else None
        for number, result in self._results(batches, shared):
            if first:
                digest.check()
            if distributed.is_model_parallel_writer():
                self._keep(number // copies, number, result, parts, tensor_files)
        torch.distributed.barrier()
        if (
            tensor_files is not None
            and self.files.write_interval == "epoch"
            and distributed.is_model_parallel_writer()
        ):
            tensor_files.write_all([tensor_record(parts.batch(number), self.output) for number in shared.mine])
        if first:
            facts = manifest(self.loaded, digest.result(), settings)
            results = Results(
                parts=parts,
                dataset=self.dataset,
                output=self.output,
                prepended=int(self.sequences.prepend_bos),
                both_strands=self.sequences.both_strands,
            )
            results.write(self.files)
            write_index(self.files.output_dir, self.dataset.ids)
            write_manifest(self.files.output_dir, facts)
        parts.release()
        torch.distributed.barrier()
        if first:
            parts.remove()

    def _keep(
        self, number_here: int, number: int, result: Batch, parts: Parts, tensor_files: TensorFiles | None
    ) -> None:
        if tensor_files is not None and self.files.write_interval == "batch":
            tensor_files.write_batch(number_here, tensor_record(result, self.output))
            if self.files.formats == ("pt",):
                result = without_tensors(result)
        parts.add(number, result)  # last: a batch that is here is written

    def _shared(self, batches: list[list[int]]) -> SharedBatches:
        unit = "sequences" if self.sequences.window_length is None else "windows"
        return SharedBatches(batches, Words("Predicting", "Predicted", unit))

    def _batches(self) -> list[list[int]]:
        tokens = self.sequences.max_batch_tokens or batch_tokens()
        strands = 1 + self.sequences.both_strands
        return plan_batches(
            [max(length, self.sequences.min_length) for length in self.dataset.lengths],
            max_tokens=tokens // strands,
            max_sequences=self.sequences.micro_batch_size,
        )

    def _results(self, batches: list[list[int]], shared: SharedBatches) -> Iterator[tuple[int, Batch]]:
        runner = Runner(
            self.loaded.model,
            self.output,
            precision=self.loaded.precision,
            layers=self.layers,
            min_length=self.sequences.min_length,
            chunk_length=self.sequences.chunk_length,
        )
        run = Backoff(runner, can_split=distributed.is_one_process_per_copy())
        return shared.run(
            lambda number: self._run_batch(run, batches[number]),
            tokens=lambda number: sum(self.dataset.lengths[index] for index in batches[number]),
            units=lambda number: len(batches[number]),
        )

    def _run_batch(self, run: Backoff, batch: Sequence[int]) -> Batch | None:
        items = [self.dataset[index] for index in batch]
        if self.sequences.both_strands:
            items += [self.dataset.opposite_strand(index) for index in batch]
        results = run(items)
        if results is None:
            return None
        if self.sequences.both_strands:
            results = join_strands(results)
        names = [self.dataset.ids[self.dataset.record_of(index)] for index in batch]
        check_finite(results, names, [self.dataset.lengths[index] for index in batch])
        return results


def _log_setup(loaded: LoadedModel, output: Output, num_layers: int, dataset: FastaDataset | WindowDataset) -> None:
    if distributed.rank() != 0:
        return
    provider = loaded.provider
    logger.info("Model initialized with %d layers", provider.num_layers)
    if output.embedding_layers:
        logger.info(
            "Embedding extraction after layer %s: using %d of %d layers",
            ", ".join(map(str, output.layers_of(num_layers))), provider.num_layers, num_layers,
        )  # fmt: skip
    logger.info(
        "%d sequences, %d tokens; tensor parallel %d, data parallel %d, precision %s, device %s",
        len(dataset.ids), sum(dataset.lengths), provider.tensor_model_parallel_size, distributed.data_parallel_size(),
        loaded.precision, megatron.device(),
    )  # fmt: skip
    log_no_dna(dataset.no_dna, len(dataset.ids), "sequences")


def _tensor_files(files: Files) -> TensorFiles:
    return TensorFiles(
        files.output_dir,
        files_per_subdir=files.files_per_subdir,
        rank=distributed.rank(),
        data_parallel_rank=distributed.data_parallel_rank(),
        data_parallel_size=distributed.data_parallel_size(),
    )
