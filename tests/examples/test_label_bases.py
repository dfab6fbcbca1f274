# SPDX-License-Identifier: Apache-2.0
"""Tables with labels of each base from annotations and tracks, read as a head's training reads them."""

from __future__ import annotations

import numpy as np
import pybigtools
import pytest
from pyarrow import parquet

from evo2_megatron.data.bed import Interval
from evo2_megatron.data.labelled import find_classes, read_labelled
from evo2_megatron.data.labels import Labels

GENOME = ">c1 first\nACGTNACGTACGttt\n>c2\nGGGGCC\n"
EXONS = """
c1	d	exon	2	3	.	+	.	gene_id "a"; transcript_id "a.1"; exon_number "1";
c1	d	exon	6	8	.	+	.	gene_id "a"; transcript_id "a.1"; exon_number "2";
c1	d	exon	7	10	.	-	.	gene_id "b"; transcript_id "b.1"; exon_number "1";
c1	d	exon	13	13	.	-	.	gene_id "b"; transcript_id "b.1"; exon_number "2";
"""


@pytest.fixture
def make(study, tmp_path, monkeypatch, capsys):
    """Run the script; None, or the line that it ends with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.fa").write_text(GENOME)
    (tmp_path / "g.gtf").write_text(EXONS.strip() + "\n")
    script = study("label_bases")

    def run(*flags):
        monkeypatch.setattr("sys.argv", ["label_bases.py", "--fasta", "g.fa", "--output", "t.parquet", *flags])
        try:
            script.main()
        except SystemExit as end:
            assert end.code == 2 and not (tmp_path / "t.parquet").exists() and not list(tmp_path.glob(".*"))
            return capsys.readouterr().err
        return None

    return run


def read(path):
    """Of each row: name, bases, and its labels by their first letters."""
    classes = find_classes(path, "label", sequence_column="sequence")
    labels = Labels(classes=classes, per_base=True)
    rows = read_labelled(path, labels, sequence_column="sequence", id_column="id")
    letters = "".join("." if np.isnan(t) else classes[int(t)][0] for t in rows.targets[:, 0])
    starts = [0, *rows.ends.tolist()]
    return [
        (name, ids.decode(), letters[start:end])
        for name, ids, start, end in zip(rows.names, rows.ids, starts, starts[1:], strict=False)
    ]


def test_exons(make, tmp_path):
    assert make("--gtf", "g.gtf") is None
    assert read(tmp_path / "t.parquet") == [
        ("c1", "ACGTNACGTACGTTT", "oeei.eeeeeiieoo"),
        ("c2", "GGGGCC", "oooooo"),
    ]


def test_exons_of_each_strand(make, tmp_path):
    assert make("--gtf", "g.gtf", "--each-strand", "--contigs", "c1") is None
    assert read(tmp_path / "t.parquet") == [
        ("c1:+", "ACGTNACGTACGTTT", "oeei.eeeooooooo"),
        ("c1:-", "AAACGTACGTNACGT", "ooeiieeeeo.oooo"),
    ]


def test_names_of_intervals(make, tmp_path):
    (tmp_path / "b.bed").write_text("c1\t1\t4\tsite\nc1\t7\t9\tbox\t0\t-\nc2\t0\t2\tother\nc1\t2\t6\tsite\n")
    assert make("--bed", "b.bed") is None
    assert read(tmp_path / "t.parquet") == [
        ("c1", "ACGTNACGTACGTTT", "osss.sobboooooo"),
        ("c2", "GGGGCC", "oooooo"),
    ]


def test_tracks(make, tmp_path):
    pybigtools.open("a.bw", "w").write({"c1": 15}, iter([("c1", 3, 5, 1.5), ("c1", 6, 15, 7.0)]))
    pybigtools.open("b.bw", "w").write({"c1": 15, "c2": 6}, iter([("c1", 0, 15, 2.0), ("c2", 0, 1, -1.0)]))
    assert make("--bigwig", "rna=a.bw", "dnase=b.bw") is None
    nan = np.nan
    labels = Labels(task="regression", columns=("dnase", "rna"), per_base=True)
    rows = read_labelled(tmp_path / "t.parquet", labels, sequence_column="sequence")
    want = [[2] * 4 + [nan] + [2] * 10 + [-1] + [nan] * 5, [nan] * 3 + [1.5, nan, nan] + [7] * 9 + [nan] * 6]
    np.testing.assert_array_equal(rows.targets.T, want)
    assert make("--bigwig", "rna=a.bw", "--missing", "0", "--log1p") is None
    values = parquet.read_table(tmp_path / "t.parquet")["rna"].to_pylist()
    assert values[1] == [0] * 6 and values[0][4] is None  # N
    np.testing.assert_allclose(values[0][3], np.log(2.5), rtol=1e-6)


def test_more_classes_than_16_bits_count(study):
    names = [f"peak_{number}" for number in range(1 << 15)] + ["other"]
    intervals = [Interval("c1", 1, 3, names[-2])]
    labels = study("label_bases").classes_of(b"ACGTN", intervals, names)
    assert labels.to_pylist() == ["other", "peak_32767", "peak_32767", "other", None]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--bed", "overlap.bed"), "'site' and 'box' overlap on c1 at 3, and a base has one class"),
        (("--bed", "unnamed.bed"), "an interval on c1 at 1 is named '.', which is no class; name it"),
        (("--bed", "beyond.bed"), "'site' ends at 16, beyond the 15 bases of c1"),
        (("--bed", "none.bed"), "no such BED file: none.bed"),
        (("--gtf", "g.gtf", "--contigs", "c3"), "--contigs names contig 'c3'"),
        (("--gtf", "g.gtf", "--log1p"), "--missing and --log1p go with --bigwig"),
        (("--bigwig", "a=short.bw"), "short.bw: c1 has 14 bases, and in the FASTA file 15; are both of the same"),
        (("--bigwig", "a=negative.bw", "--log1p"), "negative.bw: c1 has values below 0; leave out --log1p"),
        (("--bigwig", "a=g.fa"), "cannot read bigWig file g.fa"),
        (("--bigwig", "a=none.bw"), "cannot read bigWig file none.bw"),
        (("--bigwig", "a=short.bw", "a=negative.bw"), "two tracks have one name"),
        (("--bigwig", "short.bw"), "'short.bw' is not NAME=FILE"),
        (("--bigwig", "a=short.bw", "--each-strand"), "--each-strand goes with --gtf or --bed"),
        (("--gtf", "g.gtf", "--output", "t.tsv"), "t.tsv: the table is Parquet"),
    ],
)
def test_what_is_refused(make, tmp_path, flags, message):
    (tmp_path / "overlap.bed").write_text("c1\t1\t4\tsite\nc1\t3\t9\tbox\n")
    (tmp_path / "unnamed.bed").write_text("c1\t1\t4\t.\n")
    (tmp_path / "beyond.bed").write_text("c1\t1\t16\tsite\n")
    pybigtools.open("short.bw", "w").write({"c1": 14}, iter([("c1", 3, 5, 1.5)]))
    pybigtools.open("negative.bw", "w").write({"c1": 15}, iter([("c1", 3, 5, -1.5)]))
    got = make(*flags)
    assert got is not None and message in got
