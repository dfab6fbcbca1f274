# SPDX-License-Identifier: Apache-2.0
"""Tables and arrays as other programs read them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pyarrow import parquet
from safetensors import safe_open

from evo2_megatron.tasks.scoring import prediction_tables
from evo2_megatron.tasks.scoring.prediction_tables import (
    Array,
    Bases,
    Score,
    write_arrays,
    write_bases,
    write_rows,
    write_vectors,
)

SCORES = [Score("a", 3, 2, -2.5, -1.25), Score("b|x", 1, 0, 0.0, 0.0), Score("c", 10, 9, -1234567.125, -137174.125)]


def test_scores_as_text(tmp_path):
    write_rows(tmp_path / "scores.tsv", Score, SCORES)
    assert (tmp_path / "scores.tsv").read_text().splitlines() == [
        "id\tlength\tnum_scored\tlog_likelihood\tmean_log_likelihood",
        "a\t3\t2\t-2.5\t-1.25",
        "b|x\t1\t0\t0\t0",
        "c\t10\t9\t-1234567.12\t-137174.125",
    ]


def test_scores_as_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_tables, "_ROWS_AT_A_TIME", 2)
    write_rows(tmp_path / "scores.parquet", Score, SCORES)
    table = parquet.read_table(tmp_path / "scores.parquet")
    assert [tuple(row.values()) for row in table.to_pylist()] == [tuple(score) for score in SCORES]
    assert table.column_names == list(Score._fields)


def bases():
    for name, letters in (("a", b"ACGTN"), ("b", b"gG")):
        positions = np.arange(2, 2 + len(letters))
        yield Bases(name, positions, letters, {"x": positions.astype(np.float32) / 8})


def test_bases_as_text(tmp_path):
    write_bases(tmp_path / "bases.tsv", {"x": None}, bases())
    lines = (tmp_path / "bases.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["id", "position", "base", "x"] and len(lines) == 8
    assert lines[1] == "a\t2\tA\t0.25" and lines[-1] == "b\t3\tG\t0.375"


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_bases_as_parquet(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(prediction_tables, "_ROWS_AT_A_TIME", rows)
    write_bases(tmp_path / "bases.parquet", {"x": None}, bases())
    table = parquet.read_table(tmp_path / "bases.parquet").to_pydict()
    assert table["id"] == ["a"] * 5 + ["b"] * 2 and "".join(table["base"]) == "ACGTNgG"
    assert table["position"] == [2, 3, 4, 5, 6, 2, 3] and table["x"] == [p / 8 for p in table["position"]]


def test_vectors_of_bases(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    write_bases(tmp_path / "b.parquet", {"layer_1": 3}, [Bases("a", np.arange(1, 5), b"ACGT", {"layer_1": values})])
    assert parquet.read_table(tmp_path / "b.parquet").to_pydict()["layer_1"] == values.tolist()


VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("suffix", ["parquet", "npz", "safetensors"])
def test_vectors_of_sequences(tmp_path, suffix):
    path = tmp_path / f"embeddings.{suffix}"
    write_vectors(path, ["a", "b/c"], [7, 9], [Array("layer_0", (2, 3), lambda: VALUES)])
    if suffix == "parquet":
        found = parquet.read_table(path).to_pydict()
        assert found == {"id": ["a", "b/c"], "length": [7, 9], "layer_0": VALUES.tolist()}
    elif suffix == "npz":
        with np.load(path) as found:
            assert found["ids"].tolist() == ["a", "b/c"] and np.array_equal(found["layer_0"], VALUES)
    else:
        with safe_open(path, "numpy") as found:
            assert json.loads(found.metadata()["ids"]) == ["a", "b/c"]
            assert np.array_equal(found.get_tensor("layer_0"), VALUES)


def test_equal_results_are_equal_files(tmp_path):
    for name in ("one.npz", "two.npz"):
        write_arrays(tmp_path / name, [Array("x", (2, 3), lambda: VALUES)])
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction_tables, "_SHARD_BYTES", 50)
    write_arrays(tmp_path / "e.safetensors", [Array(name, (2, 3), lambda: VALUES) for name in "abcde"])
    names = [f"e-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "e.safetensors.index.json"]
    index = json.loads((tmp_path / "e.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": names[0], "b": names[0], "c": names[1], "d": names[1], "e": names[2]}
    with safe_open(tmp_path / names[2], "numpy") as found:
        assert np.array_equal(found.get_tensor("e"), VALUES)
