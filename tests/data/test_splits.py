# SPDX-License-Identifier: Apache-2.0
"""Division between training, validation and test."""

from collections import Counter
from itertools import groupby

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data.splits import Splitter

WEIGHTS = {"train": 7, "val": 2, "test": 1}


def test_records_follow_the_weights_and_the_seed():
    first, again, other = ([s.assign_record("x") for _ in range(3000)] for s in
                           (Splitter(WEIGHTS, 5), Splitter(WEIGHTS, 5), Splitter(WEIGHTS, 6)))  # fmt: skip
    counts = Counter(first)

    assert first == again != other
    assert (counts["train"], counts["val"], counts["test"]) == pytest.approx((2100, 600, 300), abs=90)


def test_every_split_gets_one_of_the_first_records():
    for seed in range(20):
        splitter = Splitter(WEIGHTS, seed)
        assert {splitter.assign_record("x") for _ in range(3)} == {"train", "val", "test"}
        splitter.check_complete()


@pytest.mark.parametrize("num_windows", [3, 4, 11, 100, 1009])
def test_windows_of_a_record_are_contiguous(num_windows):
    for seed in range(20):
        splitter = Splitter(WEIGHTS, seed)
        splits = splitter.assign_windows("x", num_windows)
        counts = Counter(splits)

        assert len(splits) == num_windows
        assert sorted(split for split, _ in groupby(splits)) == ["test", "train", "val"]
        if num_windows > 10:
            assert counts["train"] == pytest.approx(0.7 * num_windows, abs=1.01)
        splitter.check_complete()


def test_few_windows_per_record_still_follow_the_weights():
    splitter = Splitter({"train": 0.9, "val": 0.05, "test": 0.05}, 1)
    counts = Counter(split for _ in range(2000) for split in splitter.assign_windows("x", 2))

    assert (counts["train"], counts["val"], counts["test"]) == pytest.approx((3600, 200, 200), abs=60)


def test_a_split_of_weight_0_gets_nothing():
    splitter = Splitter({"train": 0.0, "val": 1.0, "test": 0.0}, 0)

    assert {splitter.assign_record("x") for _ in range(50)} | set(splitter.assign_windows("x", 50)) == {"val"}
    splitter.check_complete()


def test_too_few_records():
    splitter = Splitter(WEIGHTS, 0)
    splitter.assign_record("x")
    splitter.assign_record("x")

    with pytest.raises(UserError, match=r"2 document\(s\) are too few for 3 splits .*: test would be empty"):
        splitter.check_complete()

    splitter = Splitter(WEIGHTS, 0, whole_records=True)
    splitter.assign_windows("x", 50)
    with pytest.raises(UserError, match=r"1 document\(s\) are too few .*, or split_by to window and"):
        splitter.check_complete()
