# SPDX-License-Identifier: Apache-2.0
"""What a user may choose about training a prediction head, and the defaults. Loads neither torch nor Megatron."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from evo2_megatron.config import UserError, WeightFormat
from evo2_megatron.data.labels import Labels, Task
from evo2_megatron.recipes.options import LARGEST_NUMBER, LORA_TARGETS, TrainingOptions
from evo2_megatron.runtime import distributed

HEAD_MODULES = "*prediction_head*"
"""Pattern of what is trained beside adapters, see ``model.lora.matches``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadOptions:
    """What may be chosen about a run, one field per flag; the defaults are those of the flags."""

    # data
    train_data: Path
    val_data: Path | None = None
    test_data: Path | None = None
    task: Task = "classification"
    label_columns: tuple[str, ...] = ("label",)
    classes: tuple[str, ...] | None = None  # None: those of the training data
    sequence_column: str = "sequence"
    per_base: bool = False  # labels of each base
    both_strands: bool = False  # as samples of their own; per base, the head sees the hidden states of both
    class_weights: Literal["none", "balanced"] = "none"
    seq_length: int | None = None  # tokens; None: those of the longest training sequence, up to the backbone's

    # model
    base_ckpt_dir: Path
    embedding_layer: int = -1  # hidden states after this layer, counted from 0, or from -1 backwards
    backbone_seq_length: int | None = None  # tokens; None: the checkpoint's
    pooling: Literal["mean", "last"] = "mean"  # per base there is none
    head_hidden_size: int | None = None  # None: the backbone's; 0: a linear head
    head_dropout: float = 0.1
    tokenizer: Path | None = None  # None: the checkpoint's
    precision: str | None = None  # None: bf16_mixed on a GPU, fp32 without one
    quantize_weights: WeightFormat = "none"  # of the backbone's linear layers

    # adapters
    lora_finetune: bool = False
    lora_dim: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    lora_target_modules: list[str] = field(default_factory=LORA_TARGETS.copy)
    recompute: bool = False  # activations, which adapters need for their gradients

    # duration and optimizer
    epochs: float = 5.0  # passes over the training data, unless max_steps says
    max_steps: int | None = None
    global_batch_size: int = 8
    micro_batch_size: int = 2
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int | None = None  # None: a tenth of the steps
    decay_steps: int | None = None  # None: to the last step
    weight_decay: float = 0.0
    eval_interval: int | None = None  # steps; None: a tenth of the run
    eval_iters: int | None = None  # global batches; None: as many as the data have
    save_interval: int | None = None  # steps; None: after every validation, so that the best is there
    patience: int | None = None  # validations without a better one before the run ends
    seed: int = 1234

    # results
    result_dir: Path
    experiment_name: str = "evo2_head"
    log_interval: int = 10  # steps
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_run_name: str | None = None
    wandb_offline: bool = False
    wandb_save_dir: Path | None = None  # None: the run's folder

    def labels(self, classes: tuple[str, ...]) -> Labels:
        """What is read of the tables."""
        return Labels(task=self.task, columns=tuple(self.label_columns), classes=classes, per_base=self.per_base)

    def steps(self, num_samples: int) -> int:
        """Optimizer steps of the run, with so many training samples."""
        return self.max_steps or max(1, math.ceil(self.epochs * num_samples / self.global_batch_size))

    def of_training(self, *, seq_length: int, num_train: int, num_val: int, num_test: int) -> TrainingOptions:
        """The same for ``recipes.pretrain``, whose optimizer, logging and checkpoints a run has.

        Args:
            seq_length: Tokens per sample.
            num_train, num_val, num_test: Samples; 0: no such data.
        """
        steps = self.steps(num_train)
        warmup = steps // 10 if self.warmup_steps is None else self.warmup_steps
        whole = math.ceil((num_val or num_test) / self.global_batch_size)
        return TrainingOptions(
            seq_length=seq_length,
            seed=self.seed,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            max_steps=steps,
            eval_interval=self.eval_interval or max(1, math.ceil(steps / 10)),
            eval_iters=whole if self.eval_iters is None or not whole else self.eval_iters,
            lr=self.lr,
            min_lr=self.min_lr,
            wd=self.weight_decay,
            warmup_steps=warmup,
            decay_steps=self.decay_steps or max(steps, warmup + 1),
            precision=self.precision,
            quantize_weights=self.quantize_weights,
            result_dir=self.result_dir,
            experiment_name=self.experiment_name,
            finetune_ckpt_dir=self.base_ckpt_dir,
            most_recent_k=1,  # and the best, see checkpoint.run_checkpoints
            # the head alone is LoRA without adapters: frozen weights, and checkpoints without them
            lora_finetune=True,
            lora_dim=self.lora_dim,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            lora_target_modules=self.lora_target_modules if self.lora_finetune else [],
            lora_skip_freeze_modules=[HEAD_MODULES],
            log_interval=self.log_interval,
            wandb_project=self.wandb_project,
            wandb_entity=self.wandb_entity,
            wandb_run_name=self.wandb_run_name or self.experiment_name,
            wandb_offline=self.wandb_offline,
        )


def check(options: HeadOptions) -> None:
    """Raise UserError for the first option that cannot work, whatever the data."""
    least = {
        "--lr": (options.lr, options.min_lr),
        "--min-lr": (options.min_lr, 0),
        "--weight-decay": (options.weight_decay, 0),
        "--epochs": (options.epochs, 0),
    }
    for flag, (value, smallest) in least.items():
        if not smallest <= value <= LARGEST_NUMBER:
            raise UserError(f"{flag} is {value}; it must be {smallest} or more, and at most {LARGEST_NUMBER:g}")
    for flag, value in {"--head-dropout": options.head_dropout, "--lora-dropout": options.lora_dropout}.items():
        if not 0 <= value < 1:
            raise UserError(f"{flag} is {value}; it must be from 0 to below 1")
    at_once = options.micro_batch_size * distributed.world_size()
    if options.global_batch_size % at_once:
        raise UserError(
            f"--global-batch-size {options.global_batch_size} is not a multiple of --micro-batch-size "
            f"{options.micro_batch_size} x {distributed.world_size()} processes; use {at_once} or a multiple"
        )
    if options.wandb_project is None and any(
        (options.wandb_entity, options.wandb_run_name, options.wandb_offline, options.wandb_save_dir)
    ):
        raise UserError("flags of Weights & Biases go with --wandb-project; add it, or leave them out")
    if not 1 <= options.seed < 2**32:  # Megatron takes no 0, and NumPy nothing larger
        raise UserError(f"--seed is {options.seed}; it must be from 1 to {2**32 - 1}")
    if not options.lora_finetune:
        unused = (options.lora_dim, options.lora_alpha, options.lora_dropout, options.lora_target_modules)
        if unused != (16, 32, 0.1, LORA_TARGETS) or options.recompute:
            raise UserError("--lora-... and --recompute go with --lora-finetune; add that, or leave them out")
    if options.patience is not None and options.val_data is None:
        raise UserError("--patience counts validations; give --val-data")
    if options.decay_steps is not None and options.decay_steps <= (options.warmup_steps or 0):
        raise UserError(f"--decay-steps {options.decay_steps} is not after --warmup-steps {options.warmup_steps}")
    if options.classes is not None and (options.task != "classification" or len(options.classes) < 2):
        raise UserError("--classes names the two or more classes of --task classification")
    if options.class_weights != "none" and options.task == "regression":
        raise UserError("--class-weights balances classes or labels; --task regression has none")
    if options.per_base and options.pooling != "mean":
        raise UserError(
            "--pooling makes one vector of a sequence, and --per-base tells its bases apart; leave out one"
        )
    if not options.base_ckpt_dir.exists():
        raise UserError(f"{options.base_ckpt_dir} does not exist; check --base-ckpt-dir")
