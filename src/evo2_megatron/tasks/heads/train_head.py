# SPDX-License-Identifier: Apache-2.0
"""Train a prediction head on an Evo 2 model, alone or with LoRA adapters in the backbone, from labelled sequences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evo2_megatron.checkpoint import load
from evo2_megatron.checkpoint.adapter import check_whole
from evo2_megatron.checkpoint.evaluations import has_stalled, read_evaluations
from evo2_megatron.checkpoint.load_weights import load_weights
from evo2_megatron.checkpoint.run_config import RunConfig, read_run_config
from evo2_megatron.config import UserError
from evo2_megatron.data import tokenizer
from evo2_megatron.data.labelled import Labelled, find_classes, read_labelled
from evo2_megatron.data.labelled_dataset import windows_with_labels
from evo2_megatron.data.labels import Labels
from evo2_megatron.data.nucleotides import look_for_no_dna
from evo2_megatron.recipes.head_options import HeadOptions, check
from evo2_megatron.recipes.options import TrainingOptions
from evo2_megatron.runtime import distributed, megatron
from evo2_megatron.tasks.training import train as training
from evo2_megatron.tasks.training import train_lora
from evo2_megatron.tasks.training.same_run import check_same_precision

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer

    from evo2_megatron.data.providers import LabelledSequencesProvider
    from evo2_megatron.model.head import HeadProvider, StripedHyenaWithHead
    from evo2_megatron.model.provider import StripedHyenaProvider

logger = logging.getLogger(__name__)

_TOLD_BY_DATA = ("head_weights", "head_target_mean", "head_target_scale")
"""Fields of the head that are computed from the training data."""


class _Data(NamedTuple):
    """What a run is told by its data."""

    labels: Labels
    seq_length: int
    num_samples: dict[str, int]
    """Of ``train``, ``val`` and ``test``; 0: none given."""

    digests: dict[str, str]
    """Of those that are given."""

    head: dict[str, Any]
    """Fields of HeadProvider."""


def train_head(options: HeadOptions) -> None:
    """Train until the last step, or until validations get no better; a second call with the same options goes on.

    Call it on every process. Of the checkpoints the newest and, with validation data, the best one stay.

    Raises:
        UserError: Options, data or a checkpoint that cannot work, before any work is done.
    """
    check(options)
    nominal = options.of_training(seq_length=1, num_train=1, num_val=0, num_test=0)
    train_lora.check_quantized(nominal)
    start = training.find_start(nominal)
    base = read_run_config(start.base)
    check_whole(base)
    data = _read_data(options, base)
    of_training = options.of_training(
        seq_length=data.seq_length, **{f"num_{split}": count for split, count in data.num_samples.items()}
    )
    evaluations = read_evaluations(of_training.checkpoint_dir, until=start.step)
    training.enter()
    from evo2_megatron.model.head import forward_step
    from evo2_megatron.tasks.heads.head_callbacks import BestCheckpoint, FittedNorm, SharedDropout, WholeTestSet

    config = _config(options, of_training, start.base, base, data)
    if start.resumes:
        _check_same_run(read_run_config(start.checkpoint), config)
    if start.step >= of_training.max_steps or has_stalled(evaluations, options.patience):
        logger.info("Nothing to do: %s has done step %s", of_training.checkpoint_dir, start.step)
        return
    _begin_with(start, config)
    _log_plan(options, of_training, start, data)
    callbacks = [WholeTestSet()] if options.test_data is not None and options.eval_iters is None else []
    # adapters move what all sequences share, which a norm that looks at what differs would blow up
    if not start.resumes and not options.lora_finetune:
        callbacks.append(FittedNorm())
    # pooled hidden states are as many everywhere, those of bases are not
    if (options.lora_finetune or options.per_base) and distributed.world_size() > 1:
        callbacks.append(SharedDropout())
    if options.val_data is not None:
        callbacks.append(BestCheckpoint(of_training.checkpoint_dir, evaluations, patience=options.patience))
    training.run(config, of_training, start, forward_step, callbacks, unit="samples")


def _read_data(options: HeadOptions, base: RunConfig) -> _Data:
    classes = options.classes or ()
    if options.task == "classification" and not classes:
        bases = options.sequence_column if options.per_base else None
        classes = find_classes(options.train_data, options.label_columns[0], sequence_column=bases)
    labels = options.labels(classes)
    paths = {"train": options.train_data, "val": options.val_data, "test": options.test_data}
    rows: dict[str, Labelled] = {}
    for split, path in paths.items():
        if path is None:
            continue
        rows[split] = read_labelled(path, labels, sequence_column=options.sequence_column)
        look_for_no_dna(rows[split].names, rows[split].ids, f"sequences of {path}")
        if rows[split].num_left_out:
            logger.warning("%s: %d rows without a label are left out", path, rows[split].num_left_out)
    if options.task == "classification" and not options.per_base:
        _look_for_labels_of_bases(rows["train"], classes, options.train_data)
    longest = options.backbone_seq_length or base.seq_length
    seq_length = options.seq_length or min(longest, max(map(len, rows["train"].ids)))
    if seq_length > longest:
        raise UserError(
            f"--seq-length {seq_length} is more than the backbone's {longest}; lower it, or say --backbone-seq-length "
            "if the backbone can do more"
        )
    num_samples = dict.fromkeys(paths, 0) | {
        split: _num_samples(of_split, seq_length, options) for split, of_split in rows.items()
    }
    _check_enough(options, num_samples["train"])
    head = {"head_task": options.task, "head_outputs": list(labels.outputs)}
    digests = {split: of_split.digest() for split, of_split in rows.items()}
    return _Data(labels, seq_length, num_samples, digests, head | _of_targets(rows["train"].targets, labels, options))


def _look_for_labels_of_bases(rows: Labelled, classes: Sequence[str], path: Path) -> None:
    """Warn if each class could be a text with a label for each base of its sequence."""
    lengths = [(len(classes[int(number)]), len(ids)) for number, ids in zip(rows.targets[:, 0], rows.ids)]
    if all(of_label == of_sequence > 1 for of_label, of_sequence in lengths):
        logger.warning(
            "%s: each label has as many characters as its sequence bases; if these are their labels, add --per-base",
            path,
        )


def _num_samples(rows: Labelled, seq_length: int, options: HeadOptions) -> int:
    """As the datasets of ``data.labelled_dataset`` count them."""
    if options.per_base:
        return len(windows_with_labels(rows, seq_length, both_sides=options.both_strands))
    return len(rows.ids) * (2 if options.both_strands else 1)


def _check_enough(options: HeadOptions, num_samples: int) -> None:
    at_once = options.micro_batch_size * distributed.world_size()
    if num_samples < at_once:
        raise UserError(
            f"{options.train_data} holds {num_samples} samples, fewer than --micro-batch-size "
            f"{options.micro_batch_size} x {distributed.world_size()} processes"
        )


def _of_targets(targets: np.ndarray, labels: Labels, options: HeadOptions) -> dict[str, Any]:
    """What the head's configuration takes from training targets [rows or bases, columns]."""
    for name, column in zip(labels.columns, targets.T):
        if len(np.unique(column[~np.isnan(column)])) < 2:
            raise UserError(
                f"{options.train_data}: column {name!r} has the same value for every {labels.unit} that has one; "
                "nothing can be learnt from it"
            )
    if labels.task == "regression":
        wide = targets.astype(np.float64)
        return {
            "head_target_mean": np.nanmean(wide, axis=0).tolist(),
            "head_target_scale": np.nanstd(wide, axis=0).tolist(),
        }
    if options.class_weights == "none":
        return {}
    if labels.task == "multilabel":
        positive = np.nansum(targets, axis=0, dtype=np.float64)  # float32 does not count beyond 2^24
        return {"head_weights": ((~np.isnan(targets)).sum(0) / positive - 1).tolist()}
    classes = targets[~np.isnan(targets[:, 0]), 0].astype(int)
    counts = np.bincount(classes, minlength=len(labels.classes))
    if not counts.all():
        raise UserError(
            f"--class-weights balanced: {options.train_data} has no {labels.unit} of class "
            f"{labels.classes[int(counts.argmin())]!r}"
        )
    return {"head_weights": (len(classes) / (len(counts) * counts)).tolist()}


def _config(
    options: HeadOptions, of_training: TrainingOptions, checkpoint: Path, base: RunConfig, data: _Data
) -> ConfigContainer:
    """Bridge's configuration: that of ``train_evo2`` with another model and other data."""
    from evo2_megatron.data.providers import LabelledSequencesProvider
    from evo2_megatron.recipes.pretrain import override, pretrain_config

    if base.model.get("vortex_style_fp8"):
        logger.warning("%s was trained with FP8 input projections; here they are computed without", checkpoint)
    rows = load.stored_shapes(checkpoint)[load.EMBEDDING][0]
    folder = options.tokenizer or load.find_tokenizer(checkpoint, checkpoint)
    tokens = tokenizer.read_vocab_size(folder)
    if tokens > rows:  # not the checkpoint's own, which is looked at as it is found
        raise UserError(
            f"the tokenizer in {folder} has {tokens} tokens, the model {rows}; leave --tokenizer-path out to use the "
            "checkpoint's"
        )
    config = pretrain_config(of_training)
    override(config.tokenizer, tokenizer_model=str(folder.absolute()))
    # Bridge counts operations of a language model that learns
    override(config.logger, log_throughput=False, log_throughput_to_tensorboard=False)
    if options.save_interval is not None:
        override(config.checkpoint, save_interval=options.save_interval)
    if options.wandb_save_dir is not None:
        override(config.logger, wandb_save_dir=str(options.wandb_save_dir.absolute()))
    config.model = _head_provider(options, base, data, vocab_size=rows)
    config.dataset = LabelledSequencesProvider(
        train_data=str(options.train_data.absolute()),
        val_data=options.val_data and str(options.val_data.absolute()),
        test_data=options.test_data and str(options.test_data.absolute()),
        seq_length=data.seq_length,
        task=options.task,
        label_columns=list(data.labels.columns),
        classes=list(data.labels.classes),
        sequence_column=options.sequence_column,
        per_base=options.per_base,
        both_strands=options.both_strands,
        samples_at_once=options.micro_batch_size * distributed.world_size(),
        global_batch_size=options.global_batch_size,
        num_samples=list(data.num_samples.values()),
        data_digests=data.digests,
        num_workers=0,  # samples are in memory
        pin_memory=megatron.on_cuda(),
    )
    return config


def _head_provider(options: HeadOptions, base: RunConfig, data: _Data, *, vocab_size: int) -> HeadProvider:
    """The head's model: the backbone's first layers, as many as are wanted, and the head."""
    from evo2_megatron.model.head import HeadProvider

    backbone: StripedHyenaProvider = base.provider()
    num_layers = backbone.num_layers
    if not -num_layers <= options.embedding_layer < num_layers:
        raise UserError(
            f"--embedding-layer {options.embedding_layer}: the model has {num_layers} layers; choose {-num_layers} to "
            f"{num_layers - 1}"
        )
    kept = options.embedding_layer % num_layers + 1
    known = {f.name: getattr(backbone, f.name) for f in fields(backbone) if f.init}
    recompute = ("full", "uniform", 1) if options.recompute else (None, None, None)
    names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    return HeadProvider(
        **known
        | dict(zip(names, recompute))
        | {
            "num_layers": kept,
            "hybrid_override_pattern": base.pattern[:kept],
            "vocab_size": vocab_size,
            "should_pad_vocab": False,
            "vortex_style_fp8": False,
            "quantize_weights": options.quantize_weights,
            "bias_dropout_fusion": False,  # compiled on a GPU, for each length again
            "seq_length": data.seq_length,
            "calculate_per_token_loss": True,
            "head_hidden_size": options.head_hidden_size,
            "head_dropout": options.head_dropout,
            "head_pooling": options.pooling,
            "head_per_base": options.per_base,
            "head_both_sides": options.per_base and options.both_strands,
        }
        | data.head
    )


def _check_same_run(own: RunConfig, config: ConfigContainer) -> None:
    """Raise UserError where a run that is to go on had another head, other data, or other batches.

    Which samples come next, Bridge finds by counting those that came before.
    """
    from evo2_megatron.model.head import HEAD_FIELDS

    check_same_precision(own, config)
    dataset = own.sections.get("dataset") or {}
    compared = [("num_layers", own.model.get("num_layers"), config.model.num_layers)]
    for field in HEAD_FIELDS:  # runs of earlier versions do not have all of them
        compared.append((field.name, own.model.get(field.name, field.default), getattr(config.model, field.name)))
    for name in ("num_samples", "both_strands", "global_batch_size", "samples_at_once", "seq_length"):
        compared.append((name, dataset.get(name), getattr(config.dataset, name)))
    changed = [entry for entry in compared if entry[1] != entry[2]]
    of_flags = [entry for entry in changed if entry[0] not in _TOLD_BY_DATA]
    if not of_flags:
        _check_same_data(own, dataset.get("data_digests"), config.dataset)
    if changed:
        name, before, now = (of_flags or changed)[0]
        raise UserError(
            f"{own.path.parent} was trained with {name} {before}, not {now}; choose another --result-dir or "
            "--experiment-name"
        )


def _check_same_data(own: RunConfig, before: dict[str, str] | None, dataset: LabelledSequencesProvider) -> None:
    if before is None:
        logger.warning("%s does not say what data it was trained with: they are not compared", own.path.parent)
        return
    for split, digest in dataset.data_digests.items():
        if before.get(split, digest) != digest:
            raise UserError(
                f"{own.path.parent} was trained with other sequences or labels than those of "
                f"{getattr(dataset, f'{split}_data')}; give the same, or choose another --result-dir or "
                "--experiment-name"
            )


def _begin_with(start: training.Start, config: ConfigContainer) -> None:
    """Have Bridge's setup fill in the backbone and then give it adapters, before it looks for what to resume."""
    from evo2_megatron.model.head import is_backbone
    from evo2_megatron.model.lora import Evo2LoRA

    dropped = range(config.model.num_layers, read_run_config(start.base).num_layers)
    stored = load.stored_shapes(start.base)

    def fill(model: list[StripedHyenaWithHead]) -> list[StripedHyenaWithHead]:
        load_weights(model[0], start.base, stored, dropped_layers=dropped, only=is_backbone)
        return model

    config.model.register_pre_wrap_hook(fill)
    if config.peft.target_modules:
        own = Evo2LoRA(target_modules=config.peft.target_modules, dim=config.peft.dim)
        train_lora.check_modules(own, config.model)
    train_lora.add_adapters(config, distributed.rank())


def _log_plan(options: HeadOptions, of_training: TrainingOptions, start: training.Start, data: _Data) -> None:
    from evo2_megatron.model.frozen_features import MAX_BYTES

    how = "LoRA adapters and head" if options.lora_finetune else "the head"
    passes = of_training.max_steps * options.global_batch_size / data.num_samples["train"]
    outputs = ", ".join(data.labels.outputs)
    logger.info("Training %s on %s: %s of %s", how, start.base, options.task, outputs)
    logger.info(
        "Steps %s to %s of %s samples x %s tokens: %.3g passes over %s samples", start.step, of_training.max_steps,
        options.global_batch_size, data.seq_length, passes, data.num_samples["train"],
    )  # fmt: skip
    if options.lora_finetune:
        return
    whole = "The language model does not learn: each sequence goes through it once, and what comes out is kept"
    if options.per_base:
        logger.info("%s, up to %d GiB on each process", whole, MAX_BYTES >> 30)
    else:
        logger.info("%s", whole)
