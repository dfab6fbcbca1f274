# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from evo2_megatron.architectures import ARCHITECTURES
from evo2_megatron.config import UserError
from evo2_megatron.recipes.options import Schedule, schedule
from evo2_megatron.recipes.published import RECIPES, training_options
from evo2_megatron.tasks.training import train_checks

EXTENSION = [
    ("evo2_7b_32k", 32_768, 10**6, 4, 50),
    ("evo2_7b_64k", 65_536, 10**7, 8, 50),
    ("evo2_7b_128k", 131_072, 10**8, 16, 50),
    ("evo2_7b_256k", 262_144, 10**9, 32, 50),
    ("evo2_7b_512k", 524_288, 10**10, 64, 50),
    ("evo2_7b_1m", 1_048_576, 10**11, 128, 50),
    ("evo2_40b_128k", 131_072, 10**8, 16, 200),
    ("evo2_40b_256k", 262_144, 10**9, 32, 200),
    ("evo2_40b_1m", 1_048_576, 10**11, 128, 200),
]


@pytest.mark.parametrize("name, seq_length, base, scale, billions", EXTENSION)
def test_context_extension(name, seq_length, base, scale, billions):
    options = training_options(name, {})
    assert options.model_size == name.rpartition("_")[0] + "_base"
    found = (options.seq_length, options.rotary_base, options.seq_len_interpolation_factor)
    assert found == (seq_length, base, scale)
    tokens = options.max_steps * options.global_batch_size * seq_length
    assert tokens == pytest.approx(billions * 1e9, rel=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_can_run(name):
    train_checks.check(training_options(name, {"mock_data": True}))


def test_pretraining():
    options = training_options("evo2_7b_base", {})
    assert schedule(options) == Schedule(warmup_end=2500, decay_end=500_000)
    assert (options.lr, options.min_lr, options.wd, options.adam_eps) == (3e-4, 3e-5, 0.1, 1e-8)


@pytest.mark.parametrize(
    "steps, warmup_end", [(1, 0), (10, 3), (300, 100), (357, 119), (1000, 119)], ids=lambda value: f"{value}"
)
def test_the_warm_up_of_a_recipe_shrinks_with_the_steps(steps, warmup_end):
    options = training_options("evo2_7b_32k", {"max_steps": steps})
    assert schedule(options) == Schedule(warmup_end=warmup_end, decay_end=steps)
    assert training_options("evo2_7b_32k", {"max_steps": 300, "warmup_steps": 7}).warmup_steps == 7


def test_a_decay_that_is_asked_for_takes_the_place_of_a_recipes_tail(caplog):
    given = {"mock_data": True, "max_steps": 1000, "decay_steps": 700}
    options = training_options("evo2_7b_base", given)
    assert schedule(options) == schedule(training_options(None, given)) == Schedule(warmup_end=233, decay_end=700)
    train_checks.check(options)
    assert caplog.text == ""  # not: --constant-steps, which nobody has given, has no effect


def test_what_is_asked_for_wins():
    assert training_options("evo2_7b_1m", {"wd": 0.2, "seq_length": 8192}).wd == 0.2
    assert training_options(None, {"wd": 0.2}).wd == 0.2
    assert {options["model_size"] for options in RECIPES.values()} <= ARCHITECTURES.keys()


def test_no_such_recipe():
    with pytest.raises(UserError, match="no --recipe evo2_7b; choose one of evo2_1b_base, evo2_7b_base, evo2_7b_32k"):
        training_options("evo2_7b", {})
