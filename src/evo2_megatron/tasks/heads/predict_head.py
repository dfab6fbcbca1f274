# SPDX-License-Identifier: Apache-2.0
"""Classes, labels or numbers of sequences or of their bases, by a trained prediction head.

Shape legend: N sequences or bases, C outputs, T columns of labels.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evo2_megatron.checkpoint import run_checkpoints
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.load import load_model
from evo2_megatron.checkpoint.run_config import RunConfig, check_kind, read_run_config
from evo2_megatron.config import ParallelConfig, UserError, WeightFormat
from evo2_megatron.data.fasta import read_fasta
from evo2_megatron.data.labelled import Labelled, is_table, read_labelled
from evo2_megatron.data.labels import Labels
from evo2_megatron.data.nucleotides import look_for_no_dna
from evo2_megatron.data.tokenizer import encode_sequence
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks.forward import OUTPUT_NOT_FINITE
from evo2_megatron.tasks.heads import head_tables, head_tracks
from evo2_megatron.tasks.heads.head_metrics import log_metrics, metrics_of
from evo2_megatron.tasks.heads.head_runner import run_head, to_values
from evo2_megatron.tasks.scoring.prediction_manifest import CheckpointDigest, manifest
from evo2_megatron.tasks.transfer import disk_errors, new_files

logger = logging.getLogger(__name__)


def predict_head(
    source: Path,
    ckpt_dir: Path,
    target: Path,
    *,
    sequence_column: str | None = None,
    id_column: str | None = None,
    both_strands: bool | None = None,
    base_ckpt_dir: Path | None = None,
    precision: str | None = None,
    quantize_weights: WeightFormat | None = None,
    max_batch_tokens: int | None = None,
    tracks: head_tracks.Kind | None = None,
) -> dict[str, Any] | None:
    """Predict every sequence of a file, or every base; where there are labels, too, also tell how good that is.

    Call it on every process.

    Args:
        source: FASTA file, or a table (see ``data.labelled``).
        ckpt_dir: A checkpoint of ``train_head``; or the folder of a run, whose best checkpoint is taken, or the newest
            if no validation found one best.
        target: Table to write, by its suffix; a manifest with the metrics is written beside it.
        sequence_column: Of a table; None: that of the training data.
        id_column: Of a table, the names; None: numbers of the rows.
        both_strands: Mean of the outputs of both strands; None: as in training, all that a head of bases can do.
        base_ckpt_dir: Where the backbone is now; None: where it was in training.
        precision: Recipe of number formats; None: the checkpoint's.
        quantize_weights: What the backbone's linear layers keep their weights in; None: as in training.
        max_batch_tokens: Most tokens of a forward pass, padding included; None: what suits the device.
        tracks: Of a head of bases, also write one such file for each output, see ``head_tracks``.

    Returns:
        On the first process, the metrics, or an empty dict where there are no labels; None on the others.

    Raises:
        UserError: No such checkpoint or file, a file that is damaged, or too little memory for a sequence.
    """
    head_tables.check_target(target, source)
    checkpoint = find_checkpoint(ckpt_dir)
    run_config = read_run_config(checkpoint)
    labels, trained_with = labels_of(run_config), run_config.sections["dataset"]
    rows = _read(source, labels, sequence_column or trained_with["sequence_column"], id_column)
    head_tracks.check_tracks(tracks, target, labels, rows, source)
    both_strands = _strands(both_strands, trained_with["both_strands"], labels, checkpoint)
    with distributed.process_groups(ParallelConfig(), seed=run_config.seed):
        first = distributed.rank() == 0
        digest = CheckpointDigest(checkpoint) if first else None
        how = {"precision": precision, "base_ckpt_dir": base_ckpt_dir}
        how["provider_overrides"] = {} if quantize_weights is None else {"quantize_weights": quantize_weights}
        loaded = load_model(checkpoint, parallel=ParallelConfig(), head=True, **how)
        _warn(rows, labels, loaded.provider.seq_length)
        outputs_NC = run_head(loaded, rows.ids, both_strands=both_strands, max_batch_tokens=max_batch_tokens)
        _check_finite(rows, labels, outputs_NC)
        if not first:
            return None
        facts = manifest(loaded, digest.result(), {"source": str(source.absolute()), "both_strands": both_strands})
        values = partial(to_values, provider=loaded.provider)
        return _write(target, tracks, labels, rows, outputs_NC, values, facts)


def _write(
    target: Path,
    tracks: head_tracks.Kind | None,
    labels: Labels,
    rows: Labelled,
    outputs_NC: np.ndarray,
    values: head_tables.Values,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Tracks, table and manifest; returns the metrics."""
    if tracks is not None:
        head_tracks.write_tracks(tracks, target, labels, rows, outputs_NC, values)
    known_N = ~np.isnan(rows.targets).all(1)
    metrics = metrics_of(labels, rows.targets[known_N], values(outputs_NC[known_N]))
    with disk_errors(), new_files([target, head_tables.manifest_path(target)]) as (table, sidecar):
        head_tables.write(table, target.suffix, labels, rows, outputs_NC, values)
        sidecar.write_text(json.dumps({"metrics": metrics} | facts, indent=2, allow_nan=False) + "\n")
    log_metrics(metrics)
    return metrics


def find_checkpoint(ckpt_dir: Path) -> Path:
    """One iteration: the one that is named; of a run the best, or the newest if no validation found one best."""
    newest = resolve_checkpoint_path(ckpt_dir)
    chosen = newest if newest == ckpt_dir else run_checkpoints.best(newest.parent) or newest
    logger.info("Taking %s", chosen)
    return chosen


def labels_of(run_config: RunConfig) -> Labels:
    """What a trained head tells; UserError for another kind of checkpoint."""
    check_kind(run_config, head=True)
    section = run_config.sections.get("dataset") or {}
    try:
        return Labels(
            task=section["task"],
            columns=tuple(section["label_columns"]),
            classes=tuple(section["classes"]),
            per_base=section.get("per_base", False),  # runs of earlier versions do not say
        )
    except (KeyError, TypeError):
        raise UserError(f"{run_config.path}: section 'dataset' does not say what was learnt; it is damaged") from None


def _strands(asked: bool | None, trained: bool, labels: Labels, checkpoint: Path) -> bool:
    """Whether to use both."""
    if labels.per_base and asked not in (None, trained):
        does = "both strands" if trained else "one strand"
        raise UserError(f"the head of {checkpoint} sees {does} of a base; leave out --[no-]both-strands")
    return trained if asked is None else asked


def _read(source: Path, labels: Labels, sequence_column: str, id_column: str | None) -> Labelled:
    if is_table(source):
        return read_labelled(source, labels, sequence_column=sequence_column, id_column=id_column, needs_labels=False)
    if id_column is not None:
        raise UserError(f"--id-column is about tables, and {source} is read as FASTA")
    names, ids = [], []
    for record in read_fasta(source, unique_ids=True):
        if not record.sequence:
            raise UserError(f"record '{record.id}' of {source} has no bases; remove it")
        names.append(record.id)
        ids.append(encode_sequence(record.sequence.upper(), name=record.id))
    num_targets = sum(map(len, ids)) if labels.per_base else len(ids)
    return Labelled(names, ids, np.full((num_targets, len(labels.columns)), np.nan, np.float32))


def _check_finite(rows: Labelled, labels: Labels, outputs_NC: np.ndarray) -> None:
    finite_N = np.isfinite(outputs_NC).all(1)
    if not finite_N.all():
        place = int(finite_N.argmin())
        row = int(np.searchsorted(rows.ends, place, side="right")) if labels.per_base else place
        raise UserError(f"sequence {rows.names[row]!r}: {OUTPUT_NOT_FINITE}")


def _warn(rows: Labelled, labels: Labels, longest: int) -> None:
    look_for_no_dna(rows.names, rows.ids, "sequences")
    num_long = sum(len(sequence) > longest for sequence in rows.ids)
    if num_long and labels.per_base:
        logger.info("%d sequences go through in windows of %d bases, as long as in training", num_long, longest)
    elif num_long:
        logger.warning("%d sequences are cut to the %d bases that sequences had in training", num_long, longest)
