# SPDX-License-Identifier: Apache-2.0
"""Window databases: what the builder writes, and what is refused."""

import multiprocessing
import sqlite3

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data.window_database import (
    SequenceDatabases,
    WindowDatabase,
    WindowPlan,
    WindowTotals,
    num_windows,
    write_window_database,
)

PLAN = WindowPlan(window_size=8192, stride=7992, min_length=0)


@pytest.mark.parametrize(
    ("length", "windows", "former"),
    [
        (1, 1, 1),
        (8192, 1, 1),
        (8193, 2, 1),
        (16183, 2, 1),
        (16184, 2, 2),
        (16185, 3, 2),
        (24176, 3, 3),
        (100000, 13, 12),
    ],
)
def test_windows_reach_the_end(length, windows, former):
    assert num_windows(length, PLAN) == windows
    assert num_windows(length, PLAN, drop_tails=True) == former
    assert (windows - 1) * PLAN.stride + PLAN.window_size >= length
    assert windows == 1 or (windows - 2) * PLAN.stride + PLAN.window_size < length


def test_tables(tmp_path):
    path = tmp_path / "new" / "train.db"
    plan = WindowPlan(window_size=10, stride=8, min_length=4)
    contigs = [("a", 3), ("b", 4), ("c", 20), ("d", 26)]

    assert write_window_database(path, contigs, plan) == WindowTotals(7, 3)
    with sqlite3.connect(path) as database:
        assert dict(database.execute("SELECT key, value FROM metadata")) == {
            "window_size": 10, "stride": 8, "window_min_length_threshold": 4, "total_windows": 7,
            "distinct_sequences": 3,
        }  # fmt: skip
        # the third window of c has 4 bases, that of d 10
        assert database.execute("SELECT * FROM window_mappings ORDER BY window_idx").fetchall() == [
            (0, "b", 0), (1, "c", 0), (2, "c", 1), (3, "c", 2), (4, "d", 0), (5, "d", 1), (6, "d", 2),
        ]  # fmt: skip
        assert database.execute("PRAGMA index_info(idx_sequence_id)").fetchall() == [(0, 1, "sequence_id")]
    assert [p.name for p in path.parent.iterdir()] == ["train.db"]
    windows = WindowDatabase(path)
    assert (len(windows), windows.plan, windows.window(5)) == (7, plan, ("d", 8))


def test_a_window_has_bases_also_where_the_stride_is_longer(tmp_path):
    path = tmp_path / "train.db"
    contigs = [("a", 39), ("b", 40), ("c", 41)]
    assert write_window_database(path, contigs, WindowPlan(window_size=32, stride=40, min_length=0)) == (4, 3)
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT sequence_id, window_in_seq_idx FROM window_mappings").fetchall()
    assert rows == [("a", 0), ("b", 0), ("c", 0), ("c", 1)]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "train.db"
    write_window_database(path, [("a", 10)], PLAN)
    old = path.read_bytes()
    with pytest.raises(UserError, match="no window has 20 bases"):
        write_window_database(path, [("a", 10)], PLAN._replace(min_length=20))

    def interrupted():
        yield "b", 10
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_window_database(path, interrupted(), PLAN)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def add_sample(folder, sample, **sequences):
    path = folder / sample / f"glm_dataset_{sample}.sqlite"
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE sequences (contig_id TEXT PRIMARY KEY, nt_sequence TEXT, other INTEGER)")
        database.executemany("INSERT INTO sequences VALUES (?, ?, 1)", sequences.items())
    return path


def test_sequences_by_sample(tmp_path):
    add_sample(tmp_path, "SAMPLE1", **{"BCR__EXT-SAMPLE1__CT1-1": "ACGTAC"})
    one = SequenceDatabases(tmp_path)
    add_sample(tmp_path, "A.2", **{"BCR__EXT-A-2__CT1-1": "GGGG"})
    two = SequenceDatabases(tmp_path)

    assert one.bases("BCR__EXT-SAMPLE1__CT1-1", 1, 3) == "CGT"
    assert two.bases("BCR__EXT-SAMPLE1__CT1-1", 4, 9) == "AC"
    assert two.bases("BCR__EXT-A-2__CT1-1", 0, 9) == "GGGG"
    with pytest.raises(UserError, match="has no sequence 'x'"):
        one.bases("x", 0, 1)
    for name in ("x", "BCR__EXT-SAMPLE3__CT1-1"):
        with pytest.raises(UserError, match="no database for sample"):
            two.bases(name, 0, 1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_open_their_own_connection(tmp_path, method):
    add_sample(tmp_path, "S", **{"BCR__EXT-S__C": "ACGT"})
    sequences = SequenceDatabases(tmp_path)
    assert sequences.bases("BCR__EXT-S__C", 0, 2) == "AC"
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(sequences.bases, ("BCR__EXT-S__C", 0, 4)) == "ACGT"


def test_what_is_no_database(tmp_path):
    with pytest.raises(UserError, match="has no sequence database"):
        SequenceDatabases(tmp_path)
    with pytest.raises(UserError, match="no such database"):
        WindowDatabase(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("ACGT" * 1000)
    with pytest.raises(UserError, match="file is not a database"):
        WindowDatabase(tmp_path / "text.db")
    path = add_sample(tmp_path, "S")
    with pytest.raises(UserError, match="no such table: metadata"):
        WindowDatabase(path)
    write_window_database(tmp_path / "w.db", [("a", 10)], PLAN)
    with sqlite3.connect(tmp_path / "w.db") as database:
        database.execute("DELETE FROM metadata WHERE key = 'stride'")
        database.execute("DELETE FROM window_mappings")
    with pytest.raises(UserError, match="does not say its stride"):
        WindowDatabase(tmp_path / "w.db")
    with sqlite3.connect(tmp_path / "w.db") as database:
        database.execute("INSERT INTO metadata VALUES ('stride', 3)")
    with pytest.raises(UserError, match="lacks window 0 of 1"):
        WindowDatabase(tmp_path / "w.db").window(0)
