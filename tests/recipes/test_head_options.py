# SPDX-License-Identifier: Apache-2.0
"""Options of a prediction head: what is refused, and the defaults that depend on the data."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.recipes.head_options import HeadOptions, check

NEEDED = {"train_data": Path("t.csv"), "base_ckpt_dir": Path(), "result_dir": Path("r")}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"lr": 1e-5}, "--lr is 1e-05; it must be 0.0001 or more"),
        ({"weight_decay": float("nan")}, "--weight-decay is nan"),
        ({"epochs": -1.0}, "--epochs is -1.0"),
        ({"head_dropout": 1.0}, "--head-dropout is 1.0"),
        ({"lora_dropout": -0.1}, "--lora-dropout is -0.1"),
        ({"micro_batch_size": 3}, "--global-batch-size 8 is not a multiple of --micro-batch-size 3 x 1 processes"),
        ({"decay_steps": 20, "warmup_steps": 20}, "--decay-steps 20 is not after --warmup-steps 20"),
        ({"base_ckpt_dir": Path("none")}, "none does not exist; check --base-ckpt-dir"),
        ({"wandb_entity": "me"}, "go with --wandb-project"),
        ({"seed": 2**32}, "--seed is 4294967296; it must be from 1 to 4294967295"),
        ({"seed": 0}, "--seed is 0; it must be from 1 to 4294967295"),
        ({"lr": math.inf}, "--lr is inf; it must be 0.0001 or more, and at most 1e.30"),
        ({"lora_dim": 4}, "--recompute go with --lora-finetune"),
        ({"recompute": True}, "--recompute go with --lora-finetune"),
        ({"patience": 2}, "--patience counts validations; give --val-data"),
        ({"classes": ("a",)}, "--classes names the two or more classes"),
        ({"classes": ("a", "b"), "task": "regression"}, "--classes names the two or more classes"),
        ({"class_weights": "balanced", "task": "regression"}, "--task regression has none"),
    ],
)
def test_options_that_cannot_work(given, message):
    with pytest.raises(UserError, match=message):
        check(HeadOptions(**(NEEDED | given)))


def test_defaults_of_the_duration():
    options = HeadOptions(**NEEDED, global_batch_size=8)
    made = options.of_training(seq_length=10, num_train=103, num_val=20, num_test=0)
    assert made.max_steps == math.ceil(5 * 103 / 8) and made.warmup_steps == 6 and made.decay_steps == made.max_steps
    assert made.eval_interval == 7 and made.eval_iters == 3
    one = HeadOptions(**NEEDED, max_steps=1).of_training(seq_length=10, num_train=8, num_val=0, num_test=0)
    assert (one.max_steps, one.warmup_steps, one.eval_interval, one.eval_iters) == (1, 0, 1, 0)
