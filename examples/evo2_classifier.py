# SPDX-License-Identifier: Apache-2.0
"""Train a sequence classifier on an Evo 2 model, with LoRA adapters in the backbone or the head alone.

Lines ``{"sequence": "ACGT", "label": 0}`` go in; a checkpoint of what was trained comes out, which ``predict`` here
loads onto the backbone. Start it by torchrun; its processes share the batches.
"""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evo2_megatron.checkpoint.adapter import base_checkpoint, check_whole
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.load import EMBEDDING, load_weights, stored_shapes, tensor_shapes
from evo2_megatron.checkpoint.names import is_trained, is_weight
from evo2_megatron.checkpoint.run_config import RunConfig, read_run_config
from evo2_megatron.cli import groups
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.data import tokenizer
from evo2_megatron.recipes.options import LORA_TARGETS, TrainingOptions
from evo2_megatron.runtime import distributed, megatron
from evo2_megatron.tasks import train as training
from evo2_megatron.tasks import train_lora

if TYPE_CHECKING:
    from evo2_classifier_model import EvoClassifier
    from megatron.bridge.training.config import ConfigContainer

logger = logging.getLogger(f"evo2_megatron.{__name__}")
_PROG = "evo2_classifier.py"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What may be chosen about a run, one field per flag; the defaults are those of the flags."""

    train_jsonl: Path
    base_ckpt_dir: Path
    result_dir: Path
    experiment_name: str
    num_classes: int
    val_jsonl: Path | None = None
    test_jsonl: Path | None = None
    seq_length_tokens: int = 512
    backbone_seq_length: int | None = None  # tokens; None: the checkpoint's
    train_iters: int = 300
    global_batch_size: int = 8
    micro_batch_size: int = 2
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_iters: int = 20
    decay_steps: int | None = None  # None: train_iters - warmup_iters, but after the warm-up
    weight_decay: float = 0.0
    eval_interval: int = 50
    eval_iters: int = 10  # global batches
    save_interval: int | None = None  # None: once, at the end
    log_interval: int = 10
    seed: int = 1234
    classifier_hidden_size: int | None = None
    classifier_dropout: float = 0.1
    pool: Literal["mean", "last"] = "mean"
    lora_finetune: bool = False
    lora_dim: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    lora_target_modules: list[str] = field(default_factory=LORA_TARGETS.copy)
    tokenizer_path: Path = field(default_factory=lambda: tokenizer.tokenizer_dir(512))
    precision_recipe: str | None = None  # None: bf16_mixed on a GPU, fp32 without one
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_run_name: str | None = None
    wandb_save_dir: Path | None = None

    def of_training(self) -> TrainingOptions:
        """The same for ``recipes.pretrain``, whose optimizer, logging and checkpoints a run has."""
        after_warmup = max(self.train_iters - self.warmup_iters, self.warmup_iters + 1)
        return TrainingOptions(
            seq_length=self.seq_length_tokens,
            seed=self.seed,
            tokenizer=self.tokenizer_path,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            max_steps=self.train_iters,
            eval_interval=self.eval_interval,
            eval_iters=self.eval_iters if self.val_jsonl or self.test_jsonl else 0,
            lr=self.lr,
            min_lr=self.min_lr,
            wd=self.weight_decay,
            warmup_steps=self.warmup_iters,
            decay_steps=self.decay_steps or after_warmup,
            precision=self.precision_recipe,
            result_dir=self.result_dir,
            experiment_name=self.experiment_name,
            finetune_ckpt_dir=self.base_ckpt_dir,
            # the head alone is LoRA without adapters: frozen weights, and checkpoints without them
            lora_finetune=True,
            lora_dim=self.lora_dim,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            lora_target_modules=self.lora_target_modules if self.lora_finetune else [],
            lora_skip_freeze_modules=["*classification_head*"],
            log_interval=self.log_interval,
            wandb_project=self.wandb_project,
            wandb_entity=self.wandb_entity,
            wandb_run_name=self.wandb_run_name or self.experiment_name,
        )


def check(options: Options) -> None:
    """Raise UserError for the first option that cannot work."""
    above = {
        "--num-classes": (options.num_classes, 2),
        "--lr": (options.lr, options.min_lr),
        "--min-lr": (options.min_lr, 0),
        "--weight-decay": (options.weight_decay, 0),
        "--warmup-iters": (options.warmup_iters, 0),
        "--eval-iters": (options.eval_iters, 0),
    }
    for flag, (value, least) in above.items():
        if not least <= value < math.inf:
            raise UserError(f"{flag} is {value}; it must be {least} or more")
    for flag, value in {
        "--classifier-dropout": options.classifier_dropout,
        "--lora-dropout": options.lora_dropout,
    }.items():
        if not 0 <= value < 1:
            raise UserError(f"{flag} is {value}; it must be from 0 to below 1")
    at_once = options.micro_batch_size * distributed.world_size()
    if options.global_batch_size % at_once:
        raise UserError(
            f"--global-batch-size {options.global_batch_size} is not a multiple of --micro-batch-size "
            f"{options.micro_batch_size} x {distributed.world_size()} processes; use {at_once} or a multiple"
        )
    if options.wandb_project is None and (options.wandb_entity or options.wandb_run_name or options.wandb_save_dir):
        raise UserError("--wandb-entity, --wandb-run-name and --wandb-save-dir go with --wandb-project")
    if options.decay_steps is not None and options.decay_steps <= options.warmup_iters:
        raise UserError(f"--decay-steps {options.decay_steps} is not after --warmup-iters {options.warmup_iters}")
    if not options.base_ckpt_dir.exists():
        raise UserError(f"{options.base_ckpt_dir} does not exist; check --base-ckpt-dir")
    tokenizer.read_vocab_size(options.tokenizer_path)


def train(options: Options) -> None:
    """Train until ``train_iters``; a second call with the same options goes on. Call it on every process.

    Raises:
        UserError: Options, data or a checkpoint that cannot work, before any work is done.
    """
    check(options)
    of_training = options.of_training()
    start = training.find_start(of_training)
    if start.step >= options.train_iters:
        logger.info("Nothing to do: %s has done step %s", of_training.checkpoint_dir, start.step)
        return
    training.enter()
    from evo2_classifier_model import check_same_head, forward_step

    base = read_run_config(start.base)
    check_whole(base)
    config = _config(options, base)
    if start.resumes:
        check_same_head(read_run_config(start.checkpoint), config.model)
    _check_data(options)
    _begin_with(start.base, config)
    how = "LoRA adapters and head" if options.lora_finetune else "the head"
    logger.info(
        "Training %s on %s: steps %s to %s of %s sequences x %s tokens", how, start.base, start.step,
        options.train_iters, options.global_batch_size, options.seq_length_tokens,
    )  # fmt: skip
    training.run(config, of_training, start, forward_step)


def _config(options: Options, base: RunConfig) -> ConfigContainer:
    """Bridge's configuration: that of ``train_evo2`` with another model and other data."""
    from evo2_classifier_model import LabelledSequencesProvider, classifier_provider

    from evo2_megatron.recipes.pretrain import override, pretrain_config

    longest = options.backbone_seq_length or base.seq_length
    if options.seq_length_tokens > longest:
        raise UserError(
            f"--seq-length-tokens {options.seq_length_tokens} is more than the backbone's {longest}; lower it, or say "
            "--backbone-seq-length if the backbone can do more"
        )
    if base.model.get("vortex_style_fp8"):
        logger.warning("%s was trained with FP8 input projections; here they are computed without", base.path.parent)
    rows, tokens = stored_shapes(base.path.parent)[EMBEDDING][0], tokenizer.read_vocab_size(options.tokenizer_path)
    if tokens > rows:
        raise UserError(f"--tokenizer-path {options.tokenizer_path} has {tokens} tokens, the model {rows}")
    config = pretrain_config(options.of_training())
    config.model = classifier_provider(
        base,
        vocab_size=rows,
        vortex_style_fp8=False,
        seq_length=options.seq_length_tokens,
        calculate_per_token_loss=True,
        num_classes=options.num_classes,
        classifier_hidden_size=options.classifier_hidden_size,
        classifier_dropout=options.classifier_dropout,
        classifier_pool=options.pool,
    )
    config.dataset = LabelledSequencesProvider(
        train_jsonl=str(options.train_jsonl.absolute()),
        val_jsonl=options.val_jsonl and str(options.val_jsonl.absolute()),
        test_jsonl=options.test_jsonl and str(options.test_jsonl.absolute()),
        seq_length=options.seq_length_tokens,
        num_classes=options.num_classes,
        num_workers=0,  # samples are in memory
        pin_memory=megatron.on_cuda(),
    )
    override(config.checkpoint, save_interval=options.save_interval or max(options.train_iters, options.eval_interval))
    if options.wandb_save_dir is not None:
        override(config.logger, wandb_save_dir=str(options.wandb_save_dir.absolute()))
    return config


def _check_data(options: Options) -> None:
    from evo2_classifier_model import LabelledSequences

    at_once = options.micro_batch_size * distributed.world_size()
    for path in filter(None, (options.train_jsonl, options.val_jsonl, options.test_jsonl)):
        data = LabelledSequences(path, seq_length=options.seq_length_tokens, num_classes=options.num_classes)
        if len(data) < at_once:
            raise UserError(
                f"{path} holds {len(data)} sequences, fewer than --micro-batch-size {options.micro_batch_size} x "
                f"{distributed.world_size()} processes"
            )


def _begin_with(base: Path, config: ConfigContainer) -> None:
    """Have Bridge's setup fill in the backbone and then give it adapters, before it looks for what to resume."""
    from evo2_classifier_model import is_backbone

    from evo2_megatron.model.lora import Evo2LoRA

    def fill(model: list[EvoClassifier]) -> list[EvoClassifier]:
        load_weights(model[0], base, stored_shapes(base), dropped_layers=(), only=is_backbone)
        return model

    config.model.register_pre_wrap_hook(fill)
    if config.peft.target_modules:
        own = Evo2LoRA(target_modules=config.peft.target_modules, dim=config.peft.dim)
        train_lora.check_modules(own, config.model)
    train_lora.add_adapters(config, distributed.rank())


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
        micro_batch_size: Sequences at a time.
        return_logits: Give the scores, too.
        base_ckpt_dir: Where the backbone is now; None: where it was in training.

    Returns:
        ``predictions``, int64 [N], and if asked for ``logits``, float32 [N, C]; NumPy arrays.

    Raises:
        UserError: No checkpoint, one of another kind, or text that is no sequence.
    """
    checkpoint = resolve_checkpoint_path(Path(trained_ckpt_dir), flag="trained_ckpt_dir")
    megatron.enter()
    import torch
    from evo2_classifier_model import encode, load_classifier, pad

    ids = [encode(sequence, name=f"sequence {number}") for number, sequence in enumerate(sequences, 1)]
    with distributed.process_groups(ParallelConfig()), torch.inference_mode():
        model, longest = load_classifier(checkpoint, base_ckpt_dir and Path(base_ckpt_dir))
        batches = [ids[first : first + micro_batch_size] for first in range(0, len(ids), micro_batch_size)]
        scores = [torch.empty(0, model.config.num_classes)]
        for batch in batches:
            tokens, mask = (t.to(megatron.device()) for t in pad(batch, min(longest, max(map(len, batch)))))
            scores.append(model(tokens, mask).float().cpu())
    logits_NC = torch.cat(scores).numpy()
    return {"predictions": logits_NC.argmax(1)} | ({"logits": logits_NC} if return_logits else {})


def count_params_from_checkpoint(checkpoint_dir: Path | str) -> dict[str, float]:
    """Count the parameters of a classifier without loading it.

    Returns:
        ``head``, ``lora_adapters``, ``fine_tuned`` (the two together), ``total`` (these and the backbone), and
        ``fine_tuned_fraction`` of the total.
    """
    checkpoint = resolve_checkpoint_path(Path(checkpoint_dir), flag="checkpoint_dir")
    megatron.enter()
    from evo2_classifier_model import is_backbone, read_classifier_config

    base = base_checkpoint(checkpoint, read_classifier_config(checkpoint))
    trained, frozen = (
        {
            name: math.prod(shape)
            for name, shape in tensor_shapes(folder).items()
            if is_weight(name) and is_trained(name)
        }
        for folder in (checkpoint, base)
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
    """The command line; a flag that is not given is not in the result, so that ``Options`` says the default."""
    parser = groups.Parser(_PROG, __doc__)
    parser.argument_default = argparse.SUPPRESS
    path, number, count = {"type": Path, "metavar": "PATH"}, {"type": float, "metavar": "X"}, groups.non_negative_int
    some = {"type": groups.positive_int, "metavar": "N"}
    add = parser.add_argument
    add("--train-jsonl", required=True, help="sequences with labels", **path)
    add("--val-jsonl", help="the same for validation (default: none)", **path)
    add("--test-jsonl", help="the same, evaluated after the last step (default: none)", **path)
    add(
        "--base-ckpt-dir",
        required=True,
        help="language model to start from: a checkpoint, or a folder of them",
        **path,
    )
    add("--result-dir", required=True, help="folder of runs", **path)
    add("--experiment-name", required=True, metavar="NAME", help="folder of this run in it")
    add("--num-classes", required=True, type=int, metavar="N", help="labels are 0 to N - 1; 2 or more")
    add("--seq-length-tokens", help="sequences are cut or padded to this (default: 512)", **some)
    add("--backbone-seq-length", help="longest sequence of the backbone (default: what its checkpoint says)", **some)
    add("--train-iters", help="optimizer steps (default: 300)", **some)
    add("--global-batch-size", help="sequences of one step (default: 8)", **some)
    add("--micro-batch-size", help="sequences at a time on each process (default: 2)", **some)
    add("--lr", help="highest learning rate (default: 1e-3)", **number)
    add("--min-lr", help="lowest (default: 1e-4)", **number)
    add("--warmup-iters", type=count, metavar="N", help="steps from 0 to the highest (default: 20)")
    add("--decay-steps", help="step on which the lowest is reached (default: steps less warm-up)", **some)
    add("--weight-decay", help="of matrices (default: 0)", **number)
    add("--eval-interval", help="steps between validations (default: 50)", **some)
    add("--eval-iters", type=count, metavar="N", help="global batches of each validation (default: 10)")
    add("--save-interval", help="steps between checkpoints (default: only after the last step)", **some)
    add("--log-interval", help="steps between log lines (default: 10)", **some)
    add("--seed", type=count, metavar="N", help="of everything drawn (default: 1234)")
    add("--classifier-hidden-size", help="width of the head (default: the backbone's)", **some)
    add("--classifier-dropout", help="in the head (default: 0.1)", **number)
    add("--pool", choices=("mean", "last"), help="hidden states of all bases, or of the last (default: mean)")
    add("--lora-finetune", action="store_true", help="train adapters in the backbone, too (default: the head alone)")
    add("--lora-dim", help="rank of the adapters (default: 16)", **some)
    add("--lora-alpha", help="they are scaled by this over the rank (default: 32)", **some)
    add("--lora-dropout", help="on their input (default: 0.1)", **number)
    add(
        "--lora-target-modules",
        type=groups.comma_list,
        metavar="NAMES",
        help="(default: " + ",".join(LORA_TARGETS) + ")",
    )
    add("--tokenizer-path", help="folder of a nucleotide tokenizer (default: that with 512 tokens)", **path)
    recipes = ("fp32", "bf16_mixed", "fp16_mixed", "bf16-mixed", "fp16-mixed")
    add("--precision-recipe", choices=recipes, help="number formats (default: bf16_mixed, and fp32 without a GPU)")
    add("--wandb-project", metavar="NAME", help="log to Weights & Biases (default: do not)")
    add("--wandb-entity", metavar="NAME", help="account or team there (default: yours)")
    add("--wandb-run-name", metavar="NAME", help="name there (default: --experiment-name)")
    add("--wandb-save-dir", help="folder of its local files (default: the run's)", **path)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """What torchrun starts."""
    groups.run(_PROG, _train, argv)


def _train(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    groups.set_up_logging()
    train(Options(**vars(args)))


if __name__ == "__main__":
    # under its own name, which run_config.yaml keeps, and not as __main__
    from evo2_classifier import main as _main

    _main()
