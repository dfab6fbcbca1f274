# SPDX-License-Identifier: Apache-2.0
"""Labels of each base: how tables write them, and the samples that long sequences are cut into."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from evo2_megatron.config import UserError
from evo2_megatron.data.labelled import Labelled, find_classes, read_labelled
from evo2_megatron.data.labelled_dataset import LabelledBases, base_windows
from evo2_megatron.data.labels import Labels

nan = math.nan
EXONS = Labels(classes=("E", "i"), per_base=True)
SIGNAL = Labels(task="regression", columns=("signal",), per_base=True)
ROWS = [
    {"sequence": "ACGT", "label": ["E", "E", "i", None], "signal": [0.5, None, 2.0, -1.0], "on": [1, 0, 0, None]},
    {"sequence": "gg", "label": None, "signal": None, "on": None},
    {"sequence": "T", "label": ["i"], "signal": [7.0], "on": [1]},
    {"sequence": "NA", "label": [None, None], "signal": [None, 3.0], "on": [0, 0]},
]


def write(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = ["\t".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join(["\t".join(rows[0]), *lines]) + "\n")
    return path


def as_text(values, between):
    return "" if values is None else between.join("." if value is None else str(value) for value in values)


@pytest.mark.parametrize("how", [".parquet", ".jsonl", "characters", "words"])
def test_every_way_to_write_them(tmp_path, how):
    if how.startswith("."):
        path = write(tmp_path / f"t{how}", ROWS)
    else:
        between = {"characters": "", "words": " "}[how]
        names = {"label": between, "signal": " ", "on": between}
        rows = [{"sequence": row["sequence"]} | {n: as_text(row[n], by) for n, by in names.items()} for row in ROWS]
        path = write(tmp_path / "t.tsv", rows)
    exons = read_labelled(path, EXONS, sequence_column="sequence")
    assert exons.names == ["1", "3"] and exons.num_left_out == 2 and exons.targets.dtype == np.float32
    np.testing.assert_array_equal(exons.targets, [[0], [0], [1], [nan], [1]])
    signal = read_labelled(path, SIGNAL, sequence_column="sequence")
    np.testing.assert_array_equal(signal.targets[:, 0], np.float32([0.5, nan, 2, -1, 7, nan, 3]))
    assert signal.ends.tolist() == [4, 5, 7]
    both = Labels(task="multilabel", columns=("on", "missing"), per_base=True)
    rows = read_labelled(path, both, sequence_column="sequence", needs_labels=False)
    np.testing.assert_array_equal(rows.targets[:, 0], [1, 0, 0, nan, nan, nan, 1, 0, 0])
    assert np.isnan(rows.targets[:, 1]).all() and len(rows.ids) == 4
    assert find_classes(path, "label", sequence_column="sequence") == ("E", "i")


def test_one_base_may_have_a_word_of_several_characters(tmp_path):
    path = write(tmp_path / "t.tsv", [{"sequence": "A", "signal": "1.5"}, {"sequence": "AC", "signal": "12"}])
    assert read_labelled(path, SIGNAL, sequence_column="sequence").targets.tolist() == [[1.5], [1], [2]]


def test_a_class_may_be_called_like_nothing_if_it_is_named(tmp_path):
    path = write(tmp_path / "t.tsv", [{"sequence": "ACG", "label": ".E."}, {"sequence": "A", "label": "none"}])
    named = Labels(classes=(".", "E", "none"), per_base=True)
    assert read_labelled(path, named, sequence_column="sequence").targets[:, 0].tolist() == [0, 1, 0, 2]
    with pytest.raises(UserError, match="has 1 class"):
        find_classes(path, "label", sequence_column="sequence")


@pytest.mark.parametrize(
    "value, labels, message",
    [
        ("EEx", EXONS, "row 2, base 3: label is 'x'; it must be one of E, i"),
        ("EE", EXONS, "row 2: label has 2 characters, and the sequence 3 bases; give one for each"),
        ("E E i i", EXONS, "row 2: label has 4 values, and the sequence 3 bases"),
        ("1 inf 2", SIGNAL, "row 2, base 2: signal is 'inf'; it must be a finite number"),
        ("1 2 much", SIGNAL, "row 2, base 3: signal is 'much'"),
        ([1.0, 2.0, 1e99], SIGNAL, r"row 2, base 3: signal is '1e\+99'"),
        ([1.0, math.inf, 2.0], SIGNAL, "row 2, base 2: signal is 'inf'"),
        ([1.0, 2.0], SIGNAL, "row 2: signal has 2 values, and the sequence 3 bases"),
        ([1, 0, 2], Labels(task="multilabel", columns=("x",), per_base=True), "base 3: x is '2'; it must be 0 or 1"),
        (7, SIGNAL, "row 2: signal is '7'; it must be a list or a text, a value for each base"),
    ],
)
def test_values_that_are_none(tmp_path, value, labels, message):
    (name,) = labels.columns
    good = {str: "0 1 1" if labels is SIGNAL else "EEi", list: [0, 1, 0], int: 0}[type(value)]
    rows = [{"sequence": "ACG", name: good}, {"sequence": "ACG", name: value}]
    if isinstance(value, int):
        rows = rows[1:] * 2
        message = message.replace("row 2", "row 1")
    path = write(tmp_path / ("t.tsv" if isinstance(value, str) else "t.parquet"), rows)
    with pytest.raises(UserError, match=message):
        read_labelled(path, labels, sequence_column="sequence")


def test_no_base_with_a_label(tmp_path):
    path = write(tmp_path / "t.tsv", [{"sequence": "ACG", "label": "..."}])
    with pytest.raises(UserError, match="no row has a label in label"):
        read_labelled(path, EXONS, sequence_column="sequence")


def test_windows_by_hand():
    one = base_windows([10, 3], 4, both_sides=False)
    assert [(w.row, w.start, w.end, w.kept, w.place) for w in one] == [
        (0, 0, 4, (0, 4), 0),
        (0, 2, 6, (2, 4), 4),
        (0, 4, 8, (2, 4), 6),
        (0, 6, 10, (2, 4), 8),
        (1, 0, 3, (0, 3), 10),
    ]
    both = base_windows([9], 4, both_sides=True)
    assert [(w.start, w.end, w.kept, w.place) for w in both] == [
        (0, 4, (0, 3), 0),
        (2, 6, (1, 3), 3),
        (4, 8, (1, 3), 5),
        (6, 9, (1, 3), 7),
    ]


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 64])
def test_each_base_counts_once_and_has_context(length, both_sides):
    lengths = [1, 2, 127, 128, 129, 5, length, length + 1]
    windows = base_windows(lengths, length, both_sides=both_sides)
    places = [place for w in windows for place in range(w.place, w.place + w.kept[1] - w.kept[0])]
    assert places == list(range(sum(lengths)))
    begins = np.cumsum([0, *lengths])
    before, after = (length // 2 - length // 4 if both_sides else length // 2), (length // 4 if both_sides else 0)
    for w in windows:
        assert 0 <= w.start < w.end <= lengths[w.row] and w.end - w.start <= length
        assert w.place == begins[w.row] + w.start + w.kept[0]
        assert w.start == 0 or w.kept[0] >= before - 1
        assert w.end == lengths[w.row] or w.end - w.start - w.kept[1] >= after - 1


def test_samples(tmp_path):
    rows = [{"sequence": "ACGTT", "label": "EE.iE"}, {"sequence": "GG", "label": "iE"}]
    path = write(tmp_path / "t.tsv", rows)
    data = LabelledBases(path, EXONS, sequence_column="sequence", seq_length=4, multiple=2)
    assert len(data) == 4  # three windows, and one that counts for nothing
    first, second, short, filled = (data[number] for number in range(4))
    assert first["tokens"].tolist() == list(b"ACGT") and first["base_mask"].all() and "opposite_tokens" not in first
    np.testing.assert_array_equal(first["targets"][:, 0], [0, 0, nan, 1])
    assert second["tokens"].tolist() == [*b"GTT", 1] and second["base_mask"].tolist() == [True] * 3 + [False]
    np.testing.assert_array_equal(second["targets"][:, 0], [nan, nan, 0, nan])
    np.testing.assert_array_equal(short["targets"][:, 0], [1, 0, nan, nan])
    assert filled["base_mask"].any() and filled["targets"].isnan().all()
    both = LabelledBases(path, EXONS, sequence_column="sequence", seq_length=4, both_strands=True)
    assert bytes(both[0]["opposite_tokens"].tolist()) == b"ACGT" and len(both) == 3
    assert bytes(both[1]["opposite_tokens"].tolist()) == b"AAC\1"
    np.testing.assert_array_equal(both[0]["targets"][:, 0], [0, 0, nan, nan])
    np.testing.assert_array_equal(both[1]["targets"][:, 0], [nan, 1, 0, nan])


def test_windows_without_labels_are_left_out(tmp_path):
    path = write(tmp_path / "t.tsv", [{"sequence": "ACGTACGTAC", "label": "EE......ii"}])
    data = LabelledBases(path, EXONS, sequence_column="sequence", seq_length=4)
    assert [bytes(data[number]["tokens"].tolist()) for number in range(len(data))] == [b"ACGT", b"GTAC"]


def test_a_digest_tells_where_labels_are():
    rows = Labelled(["a"], [b"ACG"], np.array([[0.0], [nan], [1.0]], np.float32))
    assert rows.digest() != rows._replace(targets=rows.targets[::-1]).digest()


def test_lists_where_a_sequence_has_one_value(tmp_path):
    path = write(tmp_path / "t.parquet", ROWS)
    for read in (
        lambda: find_classes(path, "label"),
        lambda: read_labelled(path, Labels(task="regression", columns=("signal",)), sequence_column="sequence"),
    ):
        with pytest.raises(UserError, match="has lists, and a sequence has one value; for one of each base there is"):
            read()
