# SPDX-License-Identifier: Apache-2.0
"""Classes, labels or numbers of sequences, by a trained prediction head.

Shape legend: N sequences, B those of a batch, L tokens, C outputs, T columns of labels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evo2_megatron.checkpoint import run_checkpoints
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.load import LoadedModel, check_kind, load_model
from evo2_megatron.checkpoint.run_config import RunConfig, read_run_config
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.data.fasta import read_fasta
from evo2_megatron.data.fasta_dataset import make_sample
from evo2_megatron.data.labelled import Labelled, Labels, is_table, read_labelled
from evo2_megatron.data.nucleotides import look_for_no_dna, reverse_complement
from evo2_megatron.data.tokenizer import encode_sequence
from evo2_megatron.model import pieces
from evo2_megatron.runtime import distributed, megatron
from evo2_megatron.tasks import head_tables
from evo2_megatron.tasks.batch_progress import Words
from evo2_megatron.tasks.batching import Backoff, Batch, Item, batch_tokens, plan_batches
from evo2_megatron.tasks.decoding import OUTPUT_NOT_FINITE
from evo2_megatron.tasks.head_metrics import log_metrics, metrics_of
from evo2_megatron.tasks.prediction_manifest import CheckpointDigest, manifest
from evo2_megatron.tasks.prediction_runner import collate
from evo2_megatron.tasks.shared_batches import SharedBatches
from evo2_megatron.tasks.transfer import disk_errors, new_files

if TYPE_CHECKING:
    from evo2_megatron.model.head import HeadProvider

logger = logging.getLogger(__name__)

_WORDS = Words("Predicting", "Predicted", "sequences")


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
    int8_weights: bool | None = None,
    max_batch_tokens: int | None = None,
) -> dict[str, Any] | None:
    """Predict every sequence of a file; where it has labels, too, also tell how good that is. Call on every process.

    Args:
        source: FASTA file, or a table (see ``data.labelled``).
        ckpt_dir: A checkpoint of ``train_head``; or the folder of a run, whose best checkpoint is taken, or the newest
            if no validation found one best.
        target: Table to write, by its suffix; a manifest with the metrics is written beside it.
        sequence_column: Of a table; None: that of the training data.
        id_column: Of a table, the names; None: numbers of the rows.
        both_strands: Mean of the outputs of a sequence and of its reverse complement; None: as in training.
        base_ckpt_dir: Where the backbone is now; None: where it was in training.
        precision: Recipe of number formats; None: the checkpoint's.
        int8_weights: Keep the weights of the backbone's linear layers in 8 bits; None: as in training.
        max_batch_tokens: Most tokens of a forward pass, padding included; None: what suits the device.

    Returns:
        On the first process, the metrics, or an empty dict where there are no labels; None on the others.

    Raises:
        UserError: No such checkpoint or file, a file that is damaged, or too little memory for a sequence.
    """
    beside = target.with_name(f"{target.name}.manifest.json")
    head_tables.check_target(target, beside, source)
    checkpoint = find_checkpoint(ckpt_dir)
    run_config = read_run_config(checkpoint)
    labels, trained_with = labels_of(run_config), run_config.sections["dataset"]
    rows = _read(source, labels, sequence_column or trained_with["sequence_column"], id_column)
    both_strands = trained_with["both_strands"] if both_strands is None else both_strands
    with distributed.process_groups(ParallelConfig(), seed=run_config.seed):
        first = distributed.rank() == 0
        digest = CheckpointDigest(checkpoint) if first else None
        how = {"precision": precision, "provider_overrides": _overrides(int8_weights=int8_weights)}
        loaded = load_model(checkpoint, parallel=ParallelConfig(), base_ckpt_dir=base_ckpt_dir, head=True, **how)
        _warn(rows, loaded.provider.seq_length)
        outputs_NC = run_head(loaded, rows.ids, both_strands=both_strands, max_batch_tokens=max_batch_tokens)
        _check_finite(rows.names, outputs_NC)
        if not first:
            return None
        values_NC = to_values(outputs_NC, loaded.provider)
        metrics = metrics_of(labels, rows.targets, values_NC)
        settings = {"source": str(source.absolute()), "both_strands": both_strands}
        facts = {"metrics": metrics} | manifest(loaded, digest.result(), settings)
        with disk_errors(), new_files([target, beside]) as (table, sidecar):
            head_tables.write(table, target.suffix, labels, rows, values_NC)
            sidecar.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    log_metrics(metrics)
    return metrics


def _overrides(**fields: Any) -> dict[str, Any]:
    """Of the checkpoint's model, where something was asked for."""
    return {name: value for name, value in fields.items() if value is not None}


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
        return Labels(task=section["task"], columns=tuple(section["label_columns"]), classes=tuple(section["classes"]))
    except (KeyError, TypeError):
        raise UserError(f"{run_config.path}: section 'dataset' does not say what was learnt; it is damaged") from None


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
    return Labelled(names, ids, np.full((len(ids), len(labels.columns)), np.nan, np.float32))


def _check_finite(names: Sequence[str], outputs_NC: np.ndarray) -> None:
    finite_N = np.isfinite(outputs_NC).all(1)
    if not finite_N.all():
        raise UserError(f"sequence {names[int(finite_N.argmin())]!r}: {OUTPUT_NOT_FINITE}")


def _warn(rows: Labelled, longest: int) -> None:
    look_for_no_dna(rows.names, rows.ids, "sequences")
    num_cut = sum(len(sequence) > longest for sequence in rows.ids)
    if num_cut:
        logger.warning("%d sequences are cut to the %d bases that sequences had in training", num_cut, longest)


def run_head(
    loaded: LoadedModel, ids: Sequence[bytes], *, both_strands: bool = False, max_batch_tokens: int | None = None
) -> np.ndarray:
    """Outputs of sequences, float32 [N, C], the same on all processes, which share the work.

    Args:
        loaded: A model with a head.
        ids: Token ids, one byte each; those beyond the longest of training are not read.
        both_strands: Mean of a sequence's and its reverse complement's.
        max_batch_tokens: Most tokens of a forward pass, padding included; None: what suits the device.
    """
    cut = [sequence[: loaded.provider.seq_length] for sequence in ids]
    strands = [cut, [reverse_complement(sequence) for sequence in cut]] if both_strands else [cut]
    sequences = [sequence for strand in strands for sequence in strand]
    batches = plan_batches([len(sequence) for sequence in sequences], max_tokens=max_batch_tokens or batch_tokens())
    run = Backoff(_HeadRunner(loaded), can_split=True)
    shared = SharedBatches(batches, _WORDS)

    def compute(number: int) -> Batch | None:
        return run([make_sample(sequences[index], index) for index in batches[number]])

    outputs = torch.zeros(len(sequences), len(loaded.provider.head_outputs))
    for _, batch in shared.run(
        compute,
        tokens=lambda number: sum(len(sequences[index]) for index in batches[number]),
        units=lambda number: len(batches[number]),
    ):
        outputs[batch["seq_idx"]] = batch["outputs"]
    device = megatron.device()
    outputs = outputs.to(device)
    torch.distributed.all_reduce(outputs)  # each sequence is one process's, and zero elsewhere
    return outputs.cpu().unflatten(0, (len(strands), -1)).mean(0).numpy()


class _HeadRunner:
    """Batches through the language model, in pieces where they are long, and then through the head."""

    def __init__(self, loaded: LoadedModel) -> None:
        from megatron.core.utils import unwrap_model

        self._model = unwrap_model(loaded.model)
        self.chunk_length = pieces.chunk_length()

    @torch.no_grad()
    def __call__(self, items: Sequence[Item]) -> Batch:
        batch = collate(items)
        tokens_BL, mask_BL = batch["tokens"].to(megatron.device()), batch["loss_mask"].bool().to(megatron.device())
        pooled_BH = self._model.pooled_in_pieces(tokens_BL, mask_BL, chunk_length=self.chunk_length)
        return {"outputs": self._model.prediction_head(pooled_BH).float().cpu(), "seq_idx": batch["seq_idx"]}


def to_values(outputs_NC: np.ndarray, provider: HeadProvider) -> np.ndarray:
    """What outputs mean, float64 [N, C]: probabilities of classes or labels, or numbers."""
    wide_NC = torch.from_numpy(outputs_NC).double()
    if provider.head_task == "classification":
        return wide_NC.softmax(1).numpy()
    if provider.head_task == "multilabel":
        return wide_NC.sigmoid().numpy()
    return wide_NC.numpy() * np.array(provider.head_target_scale) + np.array(provider.head_target_mean)
