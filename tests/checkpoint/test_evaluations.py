# SPDX-License-Identifier: Apache-2.0
"""The list of a run's validations, and which checkpoints it keeps."""

from __future__ import annotations

import math

import pytest

from evo2_megatron.checkpoint import run_checkpoints
from evo2_megatron.checkpoint.evaluations import (
    FILE,
    Evaluation,
    best,
    has_stalled,
    read_evaluations,
    write_evaluations,
)
from evo2_megatron.config import UserError


def of(*losses):
    return [Evaluation(step, loss) for step, loss in enumerate(losses, 1)]


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "new" / "checkpoints"
    assert read_evaluations(folder) == []
    write_evaluations(folder, of(3.0, math.inf, 1 / 3))
    assert read_evaluations(folder) == of(3.0, math.inf, 1 / 3)
    assert read_evaluations(folder, until=1) == of(3.0)
    assert [path.name for path in folder.iterdir()] == [FILE]


@pytest.mark.parametrize("text", ["", "{}x", "7", "[[1]]", '[["a", 1]]', "[[1, null]]"])
def test_a_damaged_file(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match="is no list of pairs of step and loss; remove it"):
        read_evaluations(tmp_path)


def test_best():
    assert best([]) is None
    assert best(of(3, 1, 2, 1)) == Evaluation(2, 1)
    assert best(of(math.inf, 5)) == Evaluation(2, 5)


@pytest.mark.parametrize(
    "losses, patience, stalled",
    [
        ([], 1, False),
        ([1], 1, False),
        ([1, 2], 1, True),
        ([1, 1], 1, True),  # as good is no better
        ([2, 1], 1, False),
        ([3, 1, 2], 2, False),
        ([3, 1, 2, 2], 2, True),
        ([3, 1, 2, 0.5], 2, False),
        ([1, 2, 3], None, False),
    ],
)
def test_stalling(losses, patience, stalled):
    assert has_stalled(of(*losses), patience) == stalled


def test_the_best_checkpoint_is_kept(tmp_path):
    def make(step):
        folder = tmp_path / f"iter_{step:07}"
        folder.mkdir()
        (folder / "run_config.yaml").touch()

    def kept():
        return sorted(int(path.name[5:]) for path in tmp_path.glob("iter_*"))

    for step in (1, 2, 3, 4):
        make(step)
    run_checkpoints.keep_newest(tmp_path, 3)
    assert kept() == [2, 3, 4]
    write_evaluations(tmp_path, of(9, 1, 2, 3))
    assert run_checkpoints.best(tmp_path).name == "iter_0000002"
    run_checkpoints.keep_newest(tmp_path, 1)
    assert kept() == [2, 4]
    write_evaluations(tmp_path, of(9, 3, 1, 2))  # the checkpoint of the lowest is gone
    assert run_checkpoints.best(tmp_path).name == "iter_0000004"
    run_checkpoints.keep_newest(tmp_path, 1)
    assert kept() == [4]
    write_evaluations(tmp_path, of(9, 3))
    assert run_checkpoints.best(tmp_path) is None
