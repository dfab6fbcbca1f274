# SPDX-License-Identifier: Apache-2.0
"""Train a model to tell classes, labels or numbers of sequences or bases: a head on it, and LoRA adapters in it.

Tables of sequences and labels go in: CSV, TSV, JSON Lines or Parquet. evo2_predict_head uses what comes out. Several
processes, by --devices or torchrun, share the batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evo2_megatron.cli import command, groups, launch_groups, model_groups

_PROG = "evo2_train_head"
_TASKS = ("classification", "multilabel", "regression")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.Parser(_PROG, __doc__)
    _add_data(parser)
    _add_model(parser)
    _add_adapters(parser)
    _add_optimizer(parser)
    _add_results(parser)
    launch_groups.add_devices(parser)
    return parser


_SOME = {"type": groups.positive_int, "metavar": "N"}
_COUNT = {"type": groups.non_negative_int, "metavar": "N"}
_NUMBER = {"type": float, "metavar": "X"}
_PATH = {"type": Path, "metavar": "PATH"}


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "data", "Tables: .csv, .tsv, .jsonl or .parquet. Rows without a label are left out."
    ).add_argument
    add("--train-data", required=True, help="sequences with labels to train on", **_PATH)
    add("--val-data", help="the same for validation; the best checkpoint by its loss is kept (default: none)", **_PATH)
    add("--test-data", help="the same, evaluated after the last step (default: none)", **_PATH)
    add(
        "--task",
        choices=_TASKS,
        help="one class of several, several labels that are 0 or 1, or numbers (default: classification)",
    )
    add("--sequence-column", metavar="NAME", help="column of the bases (default: sequence)")
    add(
        "--label-columns",
        type=_names,
        metavar="LIST",
        help="column of the class; or one for each label or number, of which some may be empty (default: label)",
    )
    add(
        "--per-base",
        action="store_true",
        default=None,
        help="each base has labels: a list, a text with spaces between, or one of a character for each base",
    )
    add("--classes", type=_names, metavar="LIST", help="the classes, in order (default: those of the training data)")
    add(
        "--class-weights",
        choices=("none", "balanced"),
        help="in the loss: all cases equal, or rare classes as much as frequent ones (default: none)",
    )
    add(
        "--both-strands",
        action="store_true",
        default=None,
        help="train on sequences and their reverse complements, and predict the mean of both; with --per-base, the "
        "head sees what the model says of a base on either strand",
    )
    add(
        "--seq-length",
        help="sequences are cut to this many bases, or with --per-base into windows of so many (default: the longest "
        "for training, as far as the model goes)",
        **_SOME,
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add(
        "--base-ckpt-dir",
        required=True,
        help="language model to start from: a checkpoint, or a folder of them",
        **_PATH,
    )
    add("--backbone-seq-length", help="longest sequence of that model (default: what its checkpoint says)", **_SOME)
    add(
        "--embedding-layer",
        type=int,
        metavar="N",
        help="the head sees hidden states after this layer, counted from 0, or from -1 backwards; later layers are "
        "left out (default: -1)",
    )
    add("--pooling", choices=("mean", "last"), help="of the hidden states of all bases, or the last's (default: mean)")
    add(
        "--head-hidden-size",
        help="width of the head's hidden layer; 0: a linear head (default: the model's width)",
        **_COUNT,
    )
    add("--head-dropout", help="in the head (default: 0.1)", **_NUMBER)
    precision = parser.add_argument_group("precision")
    groups.add_precision(precision)
    model_groups.add_quantize_weights(precision, default="none")


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("LoRA", "Without it the language model stays as it is.").add_argument
    add(
        "--lora-finetune", action="store_true", default=None, help="train low-rank adapters in the language model, too"
    )
    add("--lora-dim", help="rank of the adapters (default: 16)", **_SOME)
    add("--lora-alpha", help="they are scaled by this over the rank (default: 32)", **_SOME)
    add("--lora-dropout", help="on the adapters' input (default: 0.1)", **_NUMBER)
    add(
        "--lora-target-modules",
        type=groups.comma_list,
        metavar="LIST",
        help="modules that get an adapter "
        "(default: dense_projection,dense,linear_qkv,linear_proj,linear_fc1,linear_fc2)",
    )
    add(
        "--recompute",
        action="store_true",
        default=None,
        help="compute activations again in the backward pass: memory for long sequences, a third more time",
    )


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("duration and optimizer").add_argument
    add("--epochs", help="passes over the training data (default: 5)", **_NUMBER)
    add("--max-steps", help="optimizer steps (default: as many as --epochs take)", **_SOME)
    add("--global-batch-size", help="sequences of one step (default: 8)", **_SOME)
    add("--micro-batch-size", help="sequences at a time on each process (default: 2)", **_SOME)
    add("--lr", help="highest learning rate (default: 1e-3)", **_NUMBER)
    add("--min-lr", help="lowest (default: 1e-4)", **_NUMBER)
    add("--warmup-steps", help="steps from 0 to the highest (default: a tenth of all)", **_COUNT)
    add("--decay-steps", help="step on which the lowest is reached (default: the last)", **_SOME)
    add("--weight-decay", help="of matrices (default: 0)", **_NUMBER)
    add(
        "--eval-interval", help="steps between validations, and between checkpoints (default: a tenth of all)", **_SOME
    )
    add("--eval-iters", help="global batches of a validation (default: all of the data)", **_SOME)
    add("--patience", help="end after so many validations without a better one (default: do not)", **_SOME)
    add("--seed", help="of everything drawn (default: 1234)", **_COUNT)


def _add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("results").add_argument
    add("--result-dir", required=True, help="folder of runs", **_PATH)
    add("--experiment-name", metavar="NAME", help="folder of this run in it (default: evo2_head)")
    add("--log-interval", help="steps between log lines (default: 10)", **_SOME)
    add("--wandb-project", metavar="NAME", help="log to Weights & Biases (default: do not)")
    add("--wandb-entity", metavar="NAME", help="owner of the project (default: you)")
    add("--wandb-run-name", metavar="NAME", help="name there (default: --experiment-name)")
    add(
        "--wandb-offline",
        action="store_true",
        default=None,
        help="keep it in the run's folder, for wandb sync to send later",
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(groups.comma_list(text))


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _train, argv)


def _train(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging()
    if launch_groups.on_devices(args.devices, argv):
        return

    from evo2_megatron.tasks.heads.train_head import HeadOptions, train_head  # torch loads here, not for --help

    train_head(HeadOptions(**{name: value for name, value in _options(args).items() if value is not None}))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``HeadOptions``; None where the user did not speak, so that it says the default."""
    return {
        "train_data": args.train_data,
        "val_data": args.val_data,
        "test_data": args.test_data,
        "task": args.task,
        "sequence_column": args.sequence_column,
        "label_columns": args.label_columns,
        "classes": args.classes,
        "class_weights": args.class_weights,
        "per_base": args.per_base,
        "both_strands": args.both_strands,
        "seq_length": args.seq_length,
        "base_ckpt_dir": args.base_ckpt_dir,
        "backbone_seq_length": args.backbone_seq_length,
        "embedding_layer": args.embedding_layer,
        "pooling": args.pooling,
        "head_hidden_size": args.head_hidden_size,
        "head_dropout": args.head_dropout,
        "precision": groups.precision(args),
        "quantize_weights": args.quantize_weights,
        "lora_finetune": args.lora_finetune,
        "lora_dim": args.lora_dim,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "lora_target_modules": args.lora_target_modules,
        "recompute": args.recompute,
        "epochs": args.epochs,
        "max_steps": args.max_steps,
        "global_batch_size": args.global_batch_size,
        "micro_batch_size": args.micro_batch_size,
        "lr": args.lr,
        "min_lr": args.min_lr,
        "warmup_steps": args.warmup_steps,
        "decay_steps": args.decay_steps,
        "weight_decay": args.weight_decay,
        "eval_interval": args.eval_interval,
        "eval_iters": args.eval_iters,
        "patience": args.patience,
        "seed": args.seed,
        "result_dir": args.result_dir,
        "experiment_name": args.experiment_name,
        "log_interval": args.log_interval,
        "wandb_project": args.wandb_project,
        "wandb_entity": args.wandb_entity,
        "wandb_run_name": args.wandb_run_name,
        "wandb_offline": args.wandb_offline,
    }


if __name__ == "__main__":
    main()
