# SPDX-License-Identifier: Apache-2.0
"""Tables of labelled sequences: what is read of each kind, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from evo2_megatron.config import UserError
from evo2_megatron.data.labelled import Labelled, find_classes, is_table, read_labelled
from evo2_megatron.data.labelled_dataset import LabelledSequences, pad
from evo2_megatron.data.labels import Labels

ROWS = [
    {"name": "a", "sequence": "ACGT", "label": "cat", "x": 1.5, "y": 0},
    {"name": "b", "sequence": "ggn", "label": "dog", "x": None, "y": 1},
    {"name": "c", "sequence": "TT", "label": None, "x": None, "y": None},
    {"name": "d", "sequence": "NA", "label": "cat", "x": -2, "y": 1},
]
CLASSES = Labels(classes=("cat", "dog"))
NUMBERS = Labels(task="regression", columns=("x",))


def write(folder, suffix, rows=ROWS):
    path = folder / f"table{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix.startswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    else:
        delimiter = "," if suffix.startswith(".csv") else "\t"
        lines = [list(rows[0]), *(["" if v is None else str(v) for v in row.values()] for row in rows)]
        text = "".join(delimiter.join(line) + "\r\n" for line in lines)
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".jsonl.gz"])
def test_every_kind_of_table(tmp_path, suffix):
    path = write(tmp_path, suffix)
    assert is_table(path)
    classes = read_labelled(path, CLASSES, sequence_column="sequence", id_column="name")
    assert classes.names == ["a", "b", "d"] and classes.ids == [b"ACGT", b"GGN", b"NA"]
    assert classes.targets.tolist() == [[0], [1], [0]] and classes.targets.dtype == np.float32
    numbers = read_labelled(path, NUMBERS, sequence_column="sequence")
    assert numbers.names == ["1", "4"] and numbers.targets.tolist() == [[1.5], [-2]]
    both = read_labelled(path, Labels(task="regression", columns=("x", "y")), sequence_column="sequence")
    assert np.array_equal(both.targets, [[1.5, 0], [np.nan, 1], [-2, 1]], equal_nan=True)
    label = read_labelled(path, Labels(task="multilabel", columns=("y",)), sequence_column="sequence")
    assert label.targets.tolist() == [[0], [1], [1]]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_labels_may_be_missing_where_they_are_not_needed(tmp_path, suffix):
    path = write(tmp_path, suffix)
    labels = Labels(task="regression", columns=("x", "z"))
    rows = read_labelled(path, labels, sequence_column="sequence", needs_labels=False)
    assert rows.names == ["1", "2", "3", "4"]
    assert np.array_equal(rows.targets, [[1.5, np.nan], [np.nan] * 2, [np.nan] * 2, [-2, np.nan]], equal_nan=True)
    with pytest.raises(UserError, match="has no column 'z'; it has name, sequence, label, x, y"):
        read_labelled(path, labels, sequence_column="sequence")


def test_fasta_is_no_table():
    assert not any(map(is_table, map(Path, ("a.fa", "a.fasta.gz", "a.csv.bz2", "csv"))))


@pytest.mark.parametrize(
    "values, classes",
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, 1], ("1", "9", "10")),
        ([1.0, None, 2.0], ("1", "2")),
        (["x", "2", "10"], ("2", "10", "x")),
        (["10", "-1", "1.5", "a"], ("-1", "1.5", "10", "a")),
        ([True, False], ("False", "True")),
    ],
)
def test_classes_of_the_data(tmp_path, values, classes):
    for suffix in (".csv",) if isinstance(values[0], str) else (".parquet", ".jsonl"):
        rows = [{"sequence": "A", "label": value} for value in values]
        path = write(tmp_path, suffix, rows)
        assert find_classes(path, "label") == classes
        targets = read_labelled(path, Labels(classes=classes), sequence_column="sequence").targets[:, 0]
        assert [classes[int(t)] for t in targets] == [
            str(int(v) if isinstance(v, float) else v) for v in values if v is not None
        ]


def test_a_class_may_be_called_none_if_it_is_named(tmp_path):
    rows = [{"sequence": "A", "label": name} for name in ("none", "NA", "cat", "")]
    path = write(tmp_path, ".csv", rows)
    named = read_labelled(path, Labels(classes=("cat", "none")), sequence_column="sequence")
    assert named.targets.tolist() == [[1], [0]] and named.num_left_out == 2
    with pytest.raises(UserError, match="has 1 class"):
        find_classes(path, "label")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".csv.gz", ".jsonl.gz"])
def test_rows_of_any_length(tmp_path, suffix):
    lengths = [5, 3_000_000, 7, 1_500_000]
    rows = [{"sequence": "ACGTTGCAAC" * (length // 10) + "A" * (length % 10), "label": "cat"} for length in lengths]
    read = read_labelled(write(tmp_path, suffix, rows), CLASSES, sequence_column="sequence")
    assert [len(ids) for ids in read.ids] == lengths


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".jsonl.gz"])
def test_names_and_classes_that_look_like_dates(tmp_path, suffix):
    rows = [{"sequence": "AC", "x": i, "name": f"2020-01-0{i}", "label": f"200{i}-05-31 12:00:00"} for i in (1, 2)]
    path = write(tmp_path, suffix, rows)
    classes = find_classes(path, "label")
    assert classes == ("2001-05-31 12:00:00", "2002-05-31 12:00:00")
    found = read_labelled(path, Labels(classes=classes), sequence_column="sequence", id_column="name")
    assert found.names == ["2020-01-01", "2020-01-02"] and found.targets.tolist() == [[0], [1]]


def test_a_letter_that_is_two_in_upper_case(tmp_path):
    rows = [{"sequence": "AC\u00df", "x": 1}]
    with pytest.raises(UserError, match="row 1 contains b'.xc3'"):
        read_labelled(write(tmp_path, ".jsonl", rows), NUMBERS, sequence_column="sequence")


def test_one_class_is_too_few(tmp_path):
    path = write(tmp_path, ".jsonl", [{"label": "a"}, {"label": "a"}, {"label": None}])
    with pytest.raises(UserError, match=r"column 'label' has 1 class\(es\), and telling classes apart takes two"):
        find_classes(path, "label")


@pytest.mark.parametrize(
    "row, labels, message",
    [
        ({"sequence": "A", "label": "bird"}, CLASSES, "row 2: label is 'bird'; it must be one of cat, dog"),
        ({"sequence": "", "label": "cat"}, CLASSES, "row 2: sequence is ''; it must be text"),
        ({"sequence": None, "label": "cat"}, CLASSES, "row 2: sequence is None"),
        ({"sequence": "A>C", "label": "cat"}, CLASSES, "row 2 contains b'>'"),
        ({"sequence": "A", "x": "much"}, NUMBERS, "row 2: x is 'much'; it must be a finite number"),
        ({"sequence": "A", "x": "inf"}, NUMBERS, "row 2: x is 'inf'"),
        ({"sequence": "A", "x": "1_000"}, NUMBERS, "row 2: x is '1_000'"),
        ({"sequence": "A", "x": "1e99"}, NUMBERS, "row 2: x is '1e99'"),
        ({"sequence": "A", "x": "2"}, Labels(task="multilabel", columns=("x",)), "row 2: x is '2'; it must be 0 or 1"),
    ],
)
def test_values_that_are_none(tmp_path, row, labels, message):
    good = {"sequence": "ACGT", "label": "cat", "x": "1"}
    path = write(tmp_path, ".parquet", [good, good | row])
    with pytest.raises(UserError, match=message):
        read_labelled(path, labels, sequence_column="sequence")


def test_sequences_of_another_type(tmp_path):
    path = write(tmp_path, ".parquet", [{"sequence": 7, "label": "cat"}])
    with pytest.raises(UserError, match="row 1: sequence is 7"):
        read_labelled(path, CLASSES, sequence_column="sequence")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"x", "the suffix says no kind of table; give one of .csv, .tsv, .jsonl, .parquet"),
        ("a.csv", b"", "cannot read .*a.csv: Empty CSV file"),
        ("a.csv", b"sequence,label\n", "holds no rows"),
        ("a.csv", b"sequence,label\nA,cat,1\n", "cannot read .*Expected 2 columns, got 3"),
        ("a.csv", b"sequence\nA\n", "has no column 'label'; it has sequence"),
        ("a.csv", b"sequence,label,label\nA,cat,cat\n", "several columns 'label'"),
        ("a.csv", b"sequence,label\nA,\n", "no row has a label in label"),
        ("a.csv.gz", b"sequence,label\nA,cat\n", "cannot read"),
        ("a.jsonl", b'{"sequence": "A", "label": "cat"}\nACGT\n', "cannot read .*JSON parse error"),
        ("a.jsonl", b'["ACGT", 0]\n', "cannot read"),
        (
            "a.jsonl",
            b'{"sequence": "A", "label": "x"}\n{"sequence": "A", "label": 1}\n',
            "changed from string to number",
        ),
        ("a.parquet", b"PAR1", "cannot read"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_labelled(path, CLASSES, sequence_column="sequence")
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    for suffix in (".csv", ".jsonl", ".parquet"):
        with pytest.raises(UserError, match="cannot read .*none"):
            read_labelled(tmp_path / f"none{suffix}", CLASSES, sequence_column="sequence")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"columns": ("a", "b")}, "a sequence has one class"),
        ({"columns": ()}, "name a column of labels"),
        ({"task": "regression", "columns": ("a", "a")}, "'a' is named twice"),
        ({"classes": ("a", "b", "a")}, "'a' is named twice"),
    ],
)
def test_labels_that_are_none(given, message):
    with pytest.raises(UserError, match=message):
        Labels(**given)


def test_samples(tmp_path, caplog):
    path = write(tmp_path, ".csv")
    data = LabelledSequences(path, CLASSES, sequence_column="sequence", seq_length=3)
    assert "1 sequences are cut to 3 bases" in caplog.text and len(data) == 3
    long, _, short = (data[i] for i in range(3))
    assert long["tokens"].tolist() == list(b"ACG") and long["base_mask"].all() and long["targets"].tolist() == [0]
    assert short["tokens"].tolist() == [*b"NA", 1] and short["base_mask"].tolist() == [True, True, False]


def test_both_strands(tmp_path):
    path = write(tmp_path, ".csv")
    data = LabelledSequences(path, CLASSES, sequence_column="sequence", seq_length=3, both_strands=True)
    assert len(data) == 6
    texts = [bytes(data[i]["tokens"].tolist()) for i in range(6)]
    # what is cut off is cut off before: both strands are of the same bases
    assert texts == [b"ACG", b"CGT", b"GGN", b"NCC", b"NA\1", b"TN\1"]
    assert [data[i]["targets"].item() for i in range(6)] == [0, 0, 1, 1, 0, 0]


def test_what_fills_up_a_batch_counts_for_nothing(tmp_path):
    data = LabelledSequences(write(tmp_path, ".csv"), CLASSES, sequence_column="sequence", seq_length=3, multiple=4)
    assert len(data) == 4 and [data[i]["targets"].isnan().item() for i in range(4)] == [False] * 3 + [True]
    assert data[3]["base_mask"].any()  # something to average over


def test_padding_at_any_length():
    tokens, mask = pad([b"ACGT", b"A"], 6)
    assert tokens.tolist() == [[*b"ACGT", 1, 1], [*b"A", 1, 1, 1, 1, 1]] and mask.sum(1).tolist() == [4, 1]
    assert pad([], 4)[0].shape == (0, 4)


def test_a_digest_tells_sequences_and_targets():
    """Not names; and where one sequence ends and the next begins."""
    targets = np.array([[0.0], [np.nan]], np.float32)
    rows = Labelled(["a", "b"], [b"ACG", b"T"], targets)
    assert rows.digest() == rows._replace(names=["x", "y"]).digest()
    others = [
        rows._replace(ids=[b"AC", b"GT"]),
        rows._replace(ids=[b"T", b"ACG"]),
        rows._replace(targets=targets[::-1]),
        rows._replace(targets=targets + 1),
    ]
    assert len({rows.digest(), *(other.digest() for other in others)}) == 5
