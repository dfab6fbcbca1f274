# SPDX-License-Identifier: Apache-2.0
"""Named training recipes: one function for each published size, and the stages of the context extension.

Each says in what it differs from the defaults of ``TrainingOptions``, and what a user asks for beside it wins.

Sources: the optimizer and its schedule are those of the Evo 2 configurations in Arc's trainer, Savanna (Adam with
betas of 0.9 and 0.95 and an epsilon of 1e-8, weight decay of 0.1, 3e-4 falling to 3e-5 by a cosine after a warm-up of
0.5 % of 500,000 steps). Lengths, rotary bases, scales and numbers of tokens of the extension are those that Arc
presents with Evo 2. How many tokens an extension step has and its learning rate are ours: 2 million, as in the
published runs at a million bases, and the rate that pretraining ended with.
"""

from __future__ import annotations

from typing import Any

from evo2_megatron.config import UserError
from evo2_megatron.recipes.options import TrainingOptions, schedule

_TOKENS_PER_STEP = 2**21


def evo2_1b_base() -> dict[str, Any]:
    """Pretraining of the 1B model at 8,192 bases."""
    return {"model_size": "evo2_1b_base", **_pretraining()}


def evo2_7b_base() -> dict[str, Any]:
    """Pretraining of the 7B model at 8,192 bases."""
    return {"model_size": "evo2_7b_base", **_pretraining()}


def evo2_40b_base() -> dict[str, Any]:
    """Pretraining of the 40B model at 8,192 bases."""
    return {"model_size": "evo2_40b_base", **_pretraining()}


def _pretraining() -> dict[str, Any]:
    steps = 500_000
    return {"seq_length": 8192, "max_steps": steps, "warmup_steps": steps // 200, "constant_steps": 0, "wd": 0.1}


def evo2_7b_extension(seq_length: int) -> dict[str, Any]:
    """A stage of the 7B model's extension: from the weights of the stage before, 50 billion tokens."""
    return {"model_size": "evo2_7b_base", **_extension(seq_length, 50_000_000_000)}


def evo2_40b_extension(seq_length: int) -> dict[str, Any]:
    """A stage of the 40B model's extension: from the weights of the stage before, 200 billion tokens."""
    return {"model_size": "evo2_40b_base", **_extension(seq_length, 200_000_000_000)}


def _extension(seq_length: int, num_tokens: int) -> dict[str, Any]:
    """Positions are divided by how much longer sequences are than at first; the rotary base grows tenfold each time
    they double, from a million at 32,768."""
    scale = seq_length // 8192
    steps = num_tokens // _TOKENS_PER_STEP
    return {
        "seq_length": seq_length,
        "seq_len_interpolation_factor": float(scale),
        "rotary_base": 1_000_000 * 10 ** ((scale // 4).bit_length() - 1),
        "global_batch_size": _TOKENS_PER_STEP // seq_length,
        "max_steps": steps,
        "warmup_steps": steps // 200,
        "constant_steps": 0,
        "lr": 3e-5,
        "min_lr": 3e-6,
        "wd": 0.1,
    }


RECIPES = {
    "evo2_1b_base": evo2_1b_base(),
    "evo2_7b_base": evo2_7b_base(),
    "evo2_7b_32k": evo2_7b_extension(2**15),
    "evo2_7b_64k": evo2_7b_extension(2**16),
    "evo2_7b_128k": evo2_7b_extension(2**17),
    "evo2_7b_256k": evo2_7b_extension(2**18),
    "evo2_7b_512k": evo2_7b_extension(2**19),
    "evo2_7b_1m": evo2_7b_extension(2**20),
    "evo2_40b_base": evo2_40b_base(),
    "evo2_40b_128k": evo2_40b_extension(2**17),
    "evo2_40b_256k": evo2_40b_extension(2**18),
    "evo2_40b_1m": evo2_40b_extension(2**20),
}
"""Fields of ``TrainingOptions`` by the name of the recipe."""


def training_options(recipe: str | None, given: dict[str, Any]) -> TrainingOptions:
    """The defaults, changed by a recipe, changed by what a user asks for.

    A recipe's warm-up shrinks with fewer steps than it has, as that of the defaults does. A decay that is asked for
    takes the place of its tail.

    Raises:
        UserError: No such recipe, or no step that the learning rate could decay in.
    """
    if recipe is not None and recipe not in RECIPES:
        raise UserError(f"there is no --recipe {recipe}; choose one of {', '.join(RECIPES)}")
    fields = (RECIPES[recipe] if recipe else {}) | given
    if recipe and "decay_steps" in given and "constant_steps" not in given:
        del fields["constant_steps"]
    if recipe and "warmup_steps" not in given:
        longest = schedule(TrainingOptions(**fields | {"warmup_steps": None})).warmup_end
        fields["warmup_steps"] = min(fields["warmup_steps"], longest)
    return TrainingOptions(**fields)
