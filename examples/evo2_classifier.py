# SPDX-License-Identifier: Apache-2.0
"""Train a sequence classifier on an Evo 2 model, with LoRA adapters in the backbone or the head alone.

Lines ``{"sequence": "ACGT", "label": 0}`` go in; a checkpoint of what was trained comes out, which ``predict`` here
loads onto the backbone. Start it by torchrun; its processes share the batches. ``evo2_train_head`` does the same and
more: other tables, named classes, several labels, numbers.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evo2_megatron.checkpoint.adapter import base_checkpoint
from evo2_megatron.checkpoint.load import load_model, tensor_shapes
from evo2_megatron.checkpoint.names import is_trained, is_weight
from evo2_megatron.checkpoint.run_config import read_run_config
from evo2_megatron.cli import command, groups
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.data.tokenizer import encode_sequence
from evo2_megatron.recipes.head_options import HeadOptions
from evo2_megatron.recipes.options import LORA_TARGETS
from evo2_megatron.runtime import distributed, megatron
from evo2_megatron.tasks.heads.train_head import train_head

_PROG = "evo2_classifier.py"


def predict(
    *,
    trained_ckpt_dir: Path | str,
    sequences: Sequence[str],
    micro_batch_size: int = 8,
    return_logits: bool = False,
    base_ckpt_dir: Path | str | None = None,
) -> dict[str, Any]:
    """Classify sequences with a trained checkpoint, on one process.

    Args:
        trained_ckpt_dir: Of a run: one iteration, or the folder of all (the newest is taken).
        sequences: Bases; what is longer than the sequences in training is cut off, as there.
        micro_batch_size: Sequences of the longest length at a time.
        return_logits: Give the scores, too.
        base_ckpt_dir: Where the backbone is now; None: where it was in training.

    Returns:
        ``predictions``, int64 [N], and if asked for ``logits``, float32 [N, C]; NumPy arrays.

    Raises:
        UserError: No checkpoint, one of another kind, or text that is no sequence.
    """
    if isinstance(sequences, str):  # whose characters would be sequences of one base
        raise UserError("sequences is one text; give a list of sequences")
    megatron.enter()
    from evo2_megatron.tasks.heads.head_runner import run_head

    ids = [_encode(sequence, name=f"sequence {number}") for number, sequence in enumerate(sequences, 1)]
    with distributed.process_groups(ParallelConfig()):
        loaded = load_model(
            Path(trained_ckpt_dir),
            parallel=ParallelConfig(),
            base_ckpt_dir=base_ckpt_dir and Path(base_ckpt_dir),
            head=True,
        )
        longest = min(loaded.provider.seq_length, max(map(len, ids), default=1))
        logits_NC = run_head(loaded, ids, max_batch_tokens=micro_batch_size * longest)
    return {"predictions": logits_NC.argmax(1)} | ({"logits": logits_NC} if return_logits else {})


def _encode(sequence: Any, *, name: str) -> bytes:
    if not isinstance(sequence, str) or not sequence.strip():
        raise UserError(f"{name}: sequence is {sequence!r}; it must be text with one base or more")
    return encode_sequence(sequence.strip().upper().encode(), name=name)


def count_params_from_checkpoint(checkpoint_dir: Path | str) -> dict[str, float]:
    """Count the parameters of a classifier without loading it.

    Returns:
        ``head``, ``lora_adapters``, ``fine_tuned`` (the two together), ``total`` (these and the backbone), and
        ``fine_tuned_fraction`` of the total.
    """
    megatron.enter()
    from evo2_megatron.model.head import is_backbone
    from evo2_megatron.tasks.heads.predict_head import find_checkpoint, labels_of

    checkpoint = find_checkpoint(Path(checkpoint_dir))
    run_config = read_run_config(checkpoint)
    labels_of(run_config)
    trained, frozen = (
        {
            name: math.prod(shape)
            for name, shape in tensor_shapes(folder).items()
            if is_weight(name) and is_trained(name)
        }
        for folder in (checkpoint, base_checkpoint(checkpoint, run_config))
    )
    fine_tuned, total = sum(trained.values()), sum(trained.values()) + sum(frozen.values())
    head = sum(count for name, count in trained.items() if not is_backbone(name))
    return {
        "total": total,
        "head": head,
        "lora_adapters": fine_tuned - head,
        "fine_tuned": fine_tuned,
        "fine_tuned_fraction": fine_tuned / total,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line, with the flags of the recipe's script."""
    parser = command.Parser(_PROG, __doc__)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    path, number, count = {"type": Path, "metavar": "PATH"}, {"type": float, "metavar": "X"}, groups.non_negative_int
    some = {"type": groups.positive_int, "metavar": "N"}
    add = parser.add_argument
    add("--train-jsonl", required=True, help="sequences with labels", **path)
    add("--val-jsonl", help="the same for validation", **path)
    add("--test-jsonl", help="the same, evaluated after the last step", **path)
    add(
        "--base-ckpt-dir",
        required=True,
        help="language model to start from: a checkpoint, or a folder of them",
        **path,
    )
    add("--result-dir", required=True, help="folder of runs", **path)
    add("--experiment-name", required=True, metavar="NAME", help="folder of this run in it")
    add("--num-classes", required=True, type=int, metavar="N", help="labels are 0 to N - 1; 2 or more")
    add("--seq-length-tokens", default=512, help="sequences are cut to this", **some)
    add("--backbone-seq-length", help="longest sequence of the backbone, if not what its checkpoint says", **some)
    add("--train-iters", default=300, help="optimizer steps", **some)
    add("--global-batch-size", default=8, help="sequences of one step", **some)
    add("--micro-batch-size", default=2, help="sequences at a time on each process", **some)
    add("--lr", default=1e-3, help="highest learning rate", **number)
    add("--min-lr", default=1e-4, help="lowest", **number)
    add("--warmup-iters", default=20, type=count, metavar="N", help="steps from 0 to the highest")
    add("--decay-steps", help="step on which the lowest is reached, if not steps less warm-up", **some)
    add("--weight-decay", default=0.0, help="of matrices", **number)
    add("--eval-interval", default=50, help="steps between validations", **some)
    add("--eval-iters", default=10, type=count, metavar="N", help="global batches of each validation")
    add("--save-interval", help="steps between checkpoints, if not only after the last step", **some)
    add("--log-interval", default=10, help="steps between log lines", **some)
    add("--seed", default=1234, type=count, metavar="N", help="of everything drawn")
    add("--classifier-hidden-size", help="width of the head, if not the backbone's", **some)
    add("--classifier-dropout", default=0.1, help="in the head", **number)
    add("--pool", default="mean", choices=("mean", "last"), help="hidden states of all bases, or of the last")
    add("--lora-finetune", action="store_true", help="train adapters in the backbone, too")
    add("--lora-dim", default=16, help="rank of the adapters", **some)
    add("--lora-alpha", default=32, help="they are scaled by this over the rank", **some)
    add("--lora-dropout", default=0.1, help="on their input", **number)
    add(
        "--lora-target-modules",
        type=groups.comma_list,
        default=",".join(LORA_TARGETS),
        metavar="NAMES",
        help="modules that get one",
    )
    add("--tokenizer-path", help="folder of a nucleotide tokenizer, if not the checkpoint's", **path)
    recipes = ("fp32", "bf16_mixed", "fp16_mixed", "bf16-mixed", "fp16-mixed")
    add("--precision-recipe", choices=recipes, help="number formats, if not bf16_mixed, and fp32 without a GPU")
    add("--wandb-project", metavar="NAME", help="log to Weights & Biases")
    add("--wandb-entity", metavar="NAME", help="account or team there")
    add("--wandb-run-name", metavar="NAME", help="name there, if not --experiment-name")
    add("--wandb-save-dir", help="folder of its local files, if not the run's", **path)
    return parser


def options_of(args: argparse.Namespace) -> HeadOptions:
    """What the command line says; UserError for classes that are none."""
    if args.num_classes < 2:
        raise UserError(f"--num-classes is {args.num_classes}; it must be 2 or more")
    precision = args.precision_recipe and args.precision_recipe.replace("-", "_")
    after_warmup = max(args.train_iters - args.warmup_iters, args.warmup_iters + 1)
    same = (
        "base_ckpt_dir", "result_dir", "experiment_name", "backbone_seq_length", "global_batch_size",
        "micro_batch_size", "lr", "min_lr", "weight_decay", "eval_interval", "eval_iters", "log_interval", "seed",
        "lora_finetune", "lora_dim", "lora_alpha", "lora_dropout", "lora_target_modules", "wandb_project",
        "wandb_entity", "wandb_run_name", "wandb_save_dir",
    )  # fmt: skip
    return HeadOptions(
        train_data=args.train_jsonl,
        val_data=args.val_jsonl,
        test_data=args.test_jsonl,
        classes=tuple(map(str, range(args.num_classes))),
        seq_length=args.seq_length_tokens,
        max_steps=args.train_iters,
        warmup_steps=args.warmup_iters,
        decay_steps=args.decay_steps or after_warmup,
        save_interval=args.save_interval or max(args.train_iters, args.eval_interval),
        head_hidden_size=args.classifier_hidden_size,
        head_dropout=args.classifier_dropout,
        pooling=args.pool,
        tokenizer=args.tokenizer_path,
        precision=precision,
        **{name: getattr(args, name) for name in same},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """What torchrun starts."""
    command.run(_PROG, _train, argv)


def _train(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging()
    train_head(options_of(args))


if __name__ == "__main__":
    main()
