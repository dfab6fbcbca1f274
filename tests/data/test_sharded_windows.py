# SPDX-License-Identifier: Apache-2.0
"""Samples of sharded windows."""

import sqlite3

import pytest
import torch

from evo2_megatron.config import UserError
from evo2_megatron.data.sharded_windows import ShardedWindows, permute
from evo2_megatron.data.window_database import SequenceDatabases, WindowPlan, open_windows, write_window_database

CONTIGS = {"BCR__EXT-S__a": "ACGTacgtNNAC", "BCR__EXT-S__b": "TTTTTTTT", "BCR__EXT-S__c": "AC@GT"}
LENGTH = 8
PLAN = WindowPlan(window_size=LENGTH, stride=6, min_length=0)


@pytest.fixture
def databases(tmp_path):
    """Four windows: ACGTacgt, gtNNAC, TTTTTTTT, AC@GT."""
    (tmp_path / "S").mkdir()
    with sqlite3.connect(tmp_path / "S" / "glm_dataset_S.sqlite") as database:
        database.execute("CREATE TABLE sequences (contig_id TEXT PRIMARY KEY, nt_sequence TEXT)")
        database.executemany("INSERT INTO sequences VALUES (?, ?)", CONTIGS.items())
    write_window_database(tmp_path / "w.db", [(name, len(text)) for name, text in CONTIGS.items()], PLAN)
    return tmp_path


def dataset(databases, **settings):
    settings = {"num_samples": 4, "seq_length": LENGTH, "seed": 1} | settings
    return ShardedWindows(open_windows(databases / "w.db"), SequenceDatabases(databases), **settings)


def text(sample):
    """Inputs with the last label; special tokens by digit."""
    ids = [*sample["tokens"].tolist(), int(sample["labels"][-1])]
    return "".join(str(i) if i < 5 else chr(i) for i in ids)


def mask(sample):
    return "".join(str(int(kept)) for kept in sample["loss_mask"])


def test_samples(databases):
    samples = [dataset(databases)[i] for i in range(4)]

    assert [text(sample) for sample in samples] == ["2ACGTACGT", "2GTNNAC01", "2TTTTTTTT", "2AC@GT011"]
    assert [mask(sample) for sample in samples] == ["11111111", "11001100", "11111111", "11011000"]
    for sample in samples:
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
            "tokens": (torch.int64, (LENGTH,)),
            "labels": (torch.int64, (LENGTH,)),
            "loss_mask": (torch.float32, (LENGTH,)),
            "position_ids": (torch.int64, (LENGTH,)),
        }


def test_sequences_stored_as_bytes(databases):
    want = [text(sample) for sample in dataset(databases)]
    with sqlite3.connect(databases / "S" / "glm_dataset_S.sqlite") as database:
        for name, sequence in CONTIGS.items():
            database.execute("UPDATE sequences SET nt_sequence = ? WHERE contig_id = ?", (sequence.encode(), name))
    assert [text(sample) for sample in dataset(databases)] == want


def test_former_layout(databases):
    samples = [dataset(databases, former_layout=True)[i] for i in range(4)]

    assert [text(sample) for sample in samples] == ["2ACGTAC01", "2GTNNAC01", "2TTTTTT01", "2AC@GT011"]
    assert [mask(sample) for sample in samples] == ["11111100", "11111100", "11111100", "11011000"]


def test_reverse_complement_of_half_the_samples_follows_seed_and_number(databases):
    forward = [text(dataset(databases)[i]) for i in range(4)]
    samples = dataset(databases, num_samples=400, reverse_complement=True)
    seen = [text(samples[i]) for i in range(400)]
    reverse = [i for i in range(400) if seen[i] != forward[i % 4]]

    assert 70 < len(reverse) < 130  # two of the four windows are their own reverse complement
    # EOS stands where the opposite strand ends: at the start of the contig
    assert {seen[i] for i in reverse} == {"2GTNNAC11", "2AAAAAAAA"}
    again = dataset(databases, num_samples=400, reverse_complement=True)
    assert [text(again[i]) for i in reversed(range(400))] == seen[::-1]
    other = dataset(databases, num_samples=400, reverse_complement=True, seed=2)
    assert [text(other[i]) for i in range(400)] != seen


def test_every_round_has_its_own_order(databases):
    shuffled = dataset(databases, num_samples=400, shuffle=True)
    rounds = [tuple(shuffled.window_number(i) for i in range(at, at + 4)) for at in range(0, 400, 4)]

    assert all(sorted(order) == [0, 1, 2, 3] for order in rounds)
    assert len(set(rounds)) > 4
    longer = dataset(databases, num_samples=1000, shuffle=True)
    assert [longer.window_number(i) for i in range(400)] == [number for order in rounds for number in order]
    assert [dataset(databases, num_samples=9).window_number(i) for i in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 1009])
def test_permute_is_a_permutation(length):
    orders = [[permute(i, length, seed) for i in range(length)] for seed in (0, 1, 2**31 - 2)]

    assert all(sorted(order) == list(range(length)) for order in orders)
    if length > 100:
        assert len({tuple(order) for order in orders}) == 3
        assert sum(i == place for i, place in enumerate(orders[1])) < 10


def test_errors(databases):
    with pytest.raises(UserError, match="windows have 8 bases and samples 9 tokens"):
        dataset(databases, seq_length=9)
    with pytest.raises(UserError, match="made with --stride 6, not 5"):
        open_windows(databases / "w.db", stride=5)
    with pytest.raises(UserError, match="made with --window-min-length-threshold 0, not 1"):
        open_windows(databases / "w.db", stride=6, min_length=1)
    for idx in (-1, 4):
        with pytest.raises(IndexError):
            dataset(databases)[idx]
    write_window_database(databases / "w.db", [("BCR__EXT-S__a", 40)], PLAN)
    with pytest.raises(UserError, match="contig 'BCR__EXT-S__a' has no base 36"):
        dataset(databases)
