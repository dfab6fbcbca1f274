# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.recipes.options import Schedule, TrainingOptions, schedule
from evo2_megatron.runtime import megatron


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 5, 12, 99, 100, 7_499, 7_500, 7_501, 9_999, 10_000, 1_000_000])
def test_default_schedule_is_valid_for_any_length(max_steps):
    warmup_end, decay_end = schedule(TrainingOptions(max_steps=max_steps))
    assert 0 <= warmup_end < decay_end <= max_steps


def test_default_schedule_of_long_runs():
    assert schedule(TrainingOptions(max_steps=100_000)) == Schedule(warmup_end=2500, decay_end=97_500)
    assert schedule(TrainingOptions(max_steps=10_000)) == Schedule(warmup_end=2500, decay_end=7500)


def test_default_schedule_of_short_runs():
    assert schedule(TrainingOptions(max_steps=100)) == Schedule(warmup_end=25, decay_end=75)


def test_decay_steps_count_from_step_zero():
    options = TrainingOptions(max_steps=12, warmup_steps=10, decay_steps=100)
    assert schedule(options) == Schedule(warmup_end=10, decay_end=100)


def test_default_warmup_shrinks_with_the_decay():
    assert schedule(TrainingOptions(max_steps=100_000, decay_steps=1000)) == Schedule(warmup_end=333, decay_end=1000)


@pytest.mark.parametrize(
    "given", [{"warmup_steps": 10}, {"constant_steps": 10}, {"warmup_steps": 6, "decay_steps": 5}], ids=str
)
def test_schedule_without_a_step_to_decay_in(given):
    with pytest.raises(UserError, match="--warmup-steps"):
        schedule(TrainingOptions(max_steps=10, **given))


@pytest.mark.parametrize("gpu, cores, workers", [(False, 64, 0), (True, 64, 8), (True, 2, 2)])
def test_loader_processes_only_where_a_gpu_computes(monkeypatch, gpu, cores, workers):
    monkeypatch.setattr(megatron, "on_cuda", lambda: gpu)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert TrainingOptions().workers == workers
