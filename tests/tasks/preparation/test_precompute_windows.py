# SPDX-License-Identifier: Apache-2.0
"""Parquet to window databases, from the command line."""

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from evo2_megatron.cli.precompute_windows import main
from evo2_megatron.config import UserError
from evo2_megatron.data.window_database import WindowDatabase, WindowPlan
from evo2_megatron.tasks.preparation.precompute_windows import precompute_windows

PLAN = WindowPlan(window_size=8, stride=6, min_length=0)


def write(path, **columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_contigs_are_in_the_order_of_their_names(tmp_path, capsys):
    table = write(tmp_path / "t.parquet", length=[9, 20], other=["x", "y"], contig_id=["b", "a"])
    main(["precompute", str(table), str(tmp_path / "w.db"), "--window-size", "8", "--stride", "6"])
    windows = WindowDatabase(tmp_path / "w.db")

    assert capsys.readouterr().out == f"{tmp_path}/w.db: 5 windows of 2 contigs\n"
    assert [windows.window(i) for i in range(5)] == [("a", 0), ("a", 6), ("a", 12), ("b", 0), ("b", 6)]
    main(["precompute", str(table), str(tmp_path / "w.db"), "--window-size", "8", "--stride", "6", "--drop-tails"])
    assert len(WindowDatabase(tmp_path / "w.db")) == 4


def test_defaults(tmp_path):
    table = write(tmp_path / "t.parquet", length=[9], contig_id=["b"])
    main(["precompute", str(table), str(tmp_path / "w.db")])

    assert WindowDatabase(tmp_path / "w.db").plan == (8192, 7992, 0)


def test_bases_in_no_window_are_told(tmp_path, caplog):
    table = write(tmp_path / "t.parquet", length=[30], contig_id=["a"])
    precompute_windows(table, tmp_path / "w.db", PLAN._replace(stride=8))
    assert caplog.text == ""
    precompute_windows(table, tmp_path / "w.db", PLAN._replace(stride=11))
    assert "3 bases after each window are in none" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize(
    ("columns", "plan", "message"),
    [
        ({"contig": ["a"], "length": [1]}, PLAN, "has no column contig_id; it has contig, length"),
        ({"contig_id": ["a", "a"], "length": [1, 2]}, PLAN, "lists contig 'a' twice"),
        ({"contig_id": ["a", None], "length": [1, 2]}, PLAN, "row 2: contig_id is None"),
        ({"contig_id": ["a"], "length": [0]}, PLAN, "length 0"),
        ({"contig_id": ["a"], "length": [1.5]}, PLAN, "length 1.5"),
        ({"contig_id": ["a"], "length": [1]}, PLAN._replace(stride=0), "must be 1 or more"),
        ({"contig_id": ["a"], "length": [1]}, PLAN._replace(window_size=10**20), "cannot write .*: Python int"),
        ({"contig_id": ["a"], "length": [1]}, PLAN._replace(min_length=2), "no window has 2 bases"),
    ],
)
def test_errors(tmp_path, columns, plan, message):
    with pytest.raises(UserError, match=message):
        precompute_windows(write(tmp_path / "t.parquet", **columns), tmp_path / "w.db", plan)
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_an_output_that_is_no_new_file(tmp_path):
    table = write(tmp_path / "t.parquet", contig_id=["a"], length=[1])
    before = table.read_bytes()
    for output, message in ((table, "is an input"), (tmp_path, "is a folder"), (Path("/dev/null"), "is a device")):
        with pytest.raises(UserError, match=message):
            precompute_windows(table, output, PLAN)
    assert table.read_bytes() == before


def test_no_parquet(tmp_path):
    (tmp_path / "t.parquet").write_text("contig_id,length\n")
    for name in ("t.parquet", "none.parquet"):
        with pytest.raises(UserError, match=f"cannot read .*{name} as Parquet"):
            precompute_windows(tmp_path / name, tmp_path / "w.db", PLAN)
