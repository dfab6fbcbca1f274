# SPDX-License-Identifier: Apache-2.0
"""Score variants with a trained model: how much less probable the genome is with each ALT."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from evo2_megatron.checkpoint.adapter import base_checkpoint
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.load import LoadedModel, language_model_config
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.data.genome import Genome
from evo2_megatron.runtime import distributed, megatron
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.forward import OUTPUT_NOT_FINITE
from evo2_megatron.tasks.scoring import prediction_parts, variant_files
from evo2_megatron.tasks.scoring.allele_scoring import (
    Batch,
    Score,
    SharedContext,
    WholeWindows,
    batch_tokens,
    make_item,
)
from evo2_megatron.tasks.scoring.batch_progress import Words
from evo2_megatron.tasks.scoring.batching import Backoff
from evo2_megatron.tasks.scoring.predict import position_range
from evo2_megatron.tasks.scoring.prediction_files import write_manifest
from evo2_megatron.tasks.scoring.prediction_folder import check_inputs, reserved
from evo2_megatron.tasks.scoring.prediction_manifest import CheckpointDigest, as_json, manifest
from evo2_megatron.tasks.scoring.prediction_parts import Parts
from evo2_megatron.tasks.scoring.prediction_runner import Runner
from evo2_megatron.tasks.scoring.prediction_settings import TRACKS, Files, ModelChanges, Output, check_window_length
from evo2_megatron.tasks.scoring.prediction_tables import write_rows
from evo2_megatron.tasks.scoring.shared_batches import SharedBatches
from evo2_megatron.tasks.scoring.variant_alleles import Allele, comparisons, read_alleles, report_skipped
from evo2_megatron.tasks.scoring.variant_sources import Saturation, VcfFile, check_source
from evo2_megatron.tasks.scoring.variant_windows import WINDOW_LENGTH, Group, WindowSettings, make_groups, plan_groups

logger = logging.getLogger(__name__)

_WORDS = Words("Scoring", "Scored", "comparisons")


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantSettings:
    """What is compared, and how."""

    window_length: int | None = None
    """Bases; None: 8,192, or what the model was trained for if that is less."""

    window_step: int = 1
    """Windows begin at multiples of this many bases."""

    score: Literal["mean", "sum"] = "mean"
    """Difference of log-likelihoods per scored token, or of their sums."""

    both_strands: bool = False
    prepend_bos: bool = False
    shared_context: bool = True
    """Compute what alleles have in common once."""

    max_seq_length: int | None = None
    """Most tokens of a window to accept; None: what the model was trained for."""

    max_batch_tokens: int | None = None
    chunk_length: int | None = None

    def windows(self, trained_for: int) -> WindowSettings:
        """Settings of the windows for a model that was trained for so many tokens.

        Raises:
            UserError: They do not fit.
        """
        limit = (self.max_seq_length or trained_for) - self.prepend_bos
        length = self.window_length or min(WINDOW_LENGTH, limit)
        check_window_length(length, limit)
        if length < 4:
            raise UserError(f"--window-length {length} leaves no context; give at least 4")
        if self.window_step > max(length // 4, 1):
            raise UserError(
                f"--window-step {self.window_step} moves variants far from the middle of {length} bases; give at "
                f"most {length // 4}"
            )
        return WindowSettings(length, self.window_step)


def score_variants(
    source: VcfFile | Saturation,
    fasta: Path,
    ckpt_dir: Path,
    *,
    output_dir: Path,
    formats: tuple[str, ...] = ("tsv",),
    settings: VariantSettings = VariantSettings(),
    changes: ModelChanges = ModelChanges(),
    parallel: ParallelConfig = ParallelConfig(),
    precision: str | None = None,
    base_ckpt_dir: Path | None = None,
    with_self_test: bool = False,
) -> None:
    """Compare, for each ALT, the window around it with the window of the reference; every process calls this.

    Copies of the model share the batches. Finished batches are kept in the output folder: a job that was killed goes
    on where it was, with the same bytes in the end. The files are described in ``scoring/variant_files.py``; what is
    compared, in ``scoring/variant_windows.py``.

    Args:
        source: Variants.
        fasta: The genome that they were called on, plain, gzip or bgzip.
        ckpt_dir: A Megatron Bridge checkpoint, or a folder of iterations.
        output_dir, formats: Where to write, and what: of ``variant_files.FORMATS``.
        settings: What to compare.
        changes: Number formats and kernels that replace the checkpoint's.
        parallel: Sizes of the layout; the rest of the processes are copies of the model.
        precision, base_ckpt_dir, with_self_test: As for ``predict``.

    Raises:
        UserError: Something about the files, the model or the settings is wrong, or the disk refuses.
    """
    parallel.check_world_size(distributed.world_size())
    if settings.shared_context and parallel.context > 1:
        raise UserError("shared context has no form that is split over processes; add --no-shared-context")
    Files(output_dir=output_dir)  # checks the folder
    check_source(source, formats)
    check_inputs(output_dir, variant_files.RESULTS, **{source.flag: source.path}, fasta=fasta)
    checkpoint = resolve_checkpoint_path(ckpt_dir)
    run_config = language_model_config(checkpoint)
    base = base_checkpoint(checkpoint, run_config, base_ckpt_dir)
    windows = settings.windows(position_range(run_config, changes))
    with Genome(fasta) as genome:
        alleles = read_alleles(source, genome, windows)
        with distributed.process_groups(parallel, seed=run_config.seed), reserved(output_dir):
            loaded = self_test.load_model_checked(
                checkpoint,
                with_self_test=with_self_test,
                parallel=parallel,
                precision=precision,
                provider_overrides=changes.overrides(changes.pattern(run_config)),
                base_ckpt_dir=base_ckpt_dir,
                fp8=changes.fp8,
            )
            run = _Scoring(loaded, genome, source, alleles, output_dir, formats, settings, windows)
            known = as_json({"variants": settings, "changes": changes, "parallel": parallel})
            known |= {"window_length": windows.length} | prediction_parts.facts_of_file(source.flag, source.path)
            known |= prediction_parts.facts_of_file("fasta", fasta)
            run.compute_and_write(known, prediction_parts.identity(checkpoint, base))


@dataclass(slots=True)
class _Scoring:
    """A loaded model, and what it is to do."""

    loaded: LoadedModel
    genome: Genome
    source: VcfFile | Saturation
    alleles: list[Allele]
    output_dir: Path
    formats: tuple[str, ...]
    settings: VariantSettings
    windows: WindowSettings

    def compute_and_write(self, known: dict[str, Any], identity: list[Any]) -> None:
        """Run what an earlier job has not, and write the files."""
        first, num_scored = distributed.rank() == 0, sum(allele.is_scored for allele in self.alleles)
        if first:
            self._log_start(num_scored)
        groups, batches = self._plan()
        jobs = [[job for index in batch for job in groups[index].jobs] for batch in batches]
        digest = CheckpointDigest(self.loaded.checkpoint) if first else None
        shared = SharedBatches(jobs, _WORDS)
        parts = shared.resume(self.output_dir, known, self.loaded, identity, names=variant_files.RESULTS)
        for number, result in self._results([[groups[index] for index in batch] for batch in batches], shared):
            if first:
                digest.check()
            if distributed.is_model_parallel_writer():
                parts.add(number, result)
        torch.distributed.barrier()
        if first:
            facts = manifest(self.loaded, digest.result(), known)
            self._write(parts)
            write_manifest(self.output_dir, facts)
            logger.info(
                "%d ALT alleles of %d scored, %d not; results in %s",
                num_scored, len(self.alleles), len(self.alleles) - num_scored, self.output_dir,
            )  # fmt: skip
        torch.distributed.barrier()
        if first:
            parts.remove()

    def _log_start(self, num_scored: int) -> None:
        report_skipped(self.alleles)
        logger.info(
            "%d ALT alleles to score of %d, windows of %d bases, %s; data parallel %d, precision %s, device %s",
            num_scored, len(self.alleles), self.windows.length,
            "both strands" if self.settings.both_strands else "forward strand",
            distributed.data_parallel_size(), self.loaded.precision, megatron.device(),
        )  # fmt: skip

    @property
    def _max_tokens(self) -> int:
        return self.settings.max_batch_tokens or batch_tokens()

    def _plan(self) -> tuple[list[Group], list[list[int]]]:
        compared = comparisons(self.alleles, both_strands=self.settings.both_strands)
        groups = make_groups(compared, self.genome.lengths, self.windows)
        return groups, plan_groups(groups, max_tokens=self._max_tokens)

    def _results(self, batches: list[list[Group]], shared: SharedBatches) -> Iterator[tuple[int, Batch]]:
        runner = Runner(
            self.loaded.model,
            Output(log_probs="sum"),
            precision=self.loaded.precision,
            chunk_length=self.settings.chunk_length,
        )
        can_split = distributed.is_one_process_per_copy()
        if self.settings.shared_context:
            run = Backoff(SharedContext(runner, max_tokens=self._max_tokens), can_split=can_split)
        else:
            run = WholeWindows(runner, max_tokens=self._max_tokens, can_split=can_split)
        return shared.run(
            lambda number: self._run_batch(run, batches[number]),
            tokens=lambda number: sum(group.length * (1 + len(group.edits)) for group in batches[number]),
            units=lambda number: sum(len(group.jobs) for group in batches[number]),
        )

    def _run_batch(self, run: Backoff | WholeWindows, batch: list[Group]) -> Batch | None:
        items = [make_item(group, self.genome, prepend_bos=self.settings.prepend_bos) for group in batch]
        result = run(items)
        if result is None:
            return None
        if not all(values.isfinite().all() for values in result.values()):
            contigs = sorted({group.contig.decode("utf-8", "backslashreplace") for group in batch})
            raise UserError(f"variants on contig {', '.join(contigs)}: {OUTPUT_NOT_FINITE}")
        return result

    def _scores(self, parts: Parts) -> Iterator[Score]:
        """Of the alleles that have one, in their order."""
        strands = 1 + self.settings.both_strands
        for number in range(sum(allele.is_scored for allele in self.alleles)):
            found = [parts.sequence(strands * number + strand) for strand in range(strands)]
            yield Score.of_strands(found, self.settings.score)

    def _write(self, parts: Parts) -> None:
        strands = ", mean of both strands" if self.settings.both_strands else ""
        how = "per token" if self.settings.score == "mean" else "in sum"
        meaning = f"log-likelihood of {self.windows.length} bases with ALT minus with REF, {how}, in nat{strands}"
        for name in self.formats:
            scores, path = self._scores(parts), self.output_dir / f"variants.{name}"
            if name in TRACKS:
                path = self.output_dir / f"{variant_files.TRACK}.{name}"
                variant_files.write_track(path, self.genome.lengths, self.alleles, scores)
            elif name.startswith("vcf"):
                lines = self.source.lines(self.genome)
                variant_files.write_vcf(path, lines, self.alleles, scores, meaning=meaning)
            else:
                write_rows(path, variant_files.Row, variant_files.rows(self.alleles, scores))
        variant_files.write_skipped(self.output_dir, self.alleles)
