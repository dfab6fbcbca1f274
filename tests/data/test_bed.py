# SPDX-License-Identifier: Apache-2.0
"""BED: what is read, and what is refused with its line."""

import gzip

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data.bed import check_within, read_bed


@pytest.mark.parametrize("change", [lambda data: data, gzip.compress, lambda data: data.replace(b"\n", b"\r\n")])
def test_what_is_read(tmp_path, change):
    path = tmp_path / "a.bed"
    path.write_bytes(change(b"track x\n# comment\nc\t1\t5\ta\t0\t-\n\nc\t7\t9\tb\nd\t0\t3\n"))
    assert read_bed(path) == [("c", 1, 5, "a", "-"), ("c", 7, 9, "b", "+"), ("d", 0, 3, "", "+")]
    with pytest.raises(UserError, match="a.bed, line 6: BED has contig, start, end and name between tabs"):
        read_bed(path, named=True)


@pytest.mark.parametrize(
    "content, message",
    [
        ("c 1 5 a\n", "line 1: BED has contig, start and end between tabs"),
        ("c\t1\n", "line 1: BED has"),
        ("c\t1\t5\nc\t-1\t5\n", "line 2: BED has"),
        (f"c\t1\t{'9' * 5000}\n", "line 1: BED has"),
        ("c\t5\t5\ta\n", "line 1: start 5 is not before end 5"),
        ("\n", "a.bed has no intervals; BED has"),
        ("\udcff\n", "it is not text"),
    ],
)
def test_what_is_refused(tmp_path, content, message):
    path = tmp_path / "a.bed"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        read_bed(path)


def test_contigs_whose_names_begin_like_header_lines(tmp_path):
    path = tmp_path / "a.bed"
    path.write_text("browser hide all\ntrack\ntrack_7\t0\t9\nbrowsers\t0\t9\n")
    assert [interval.contig for interval in read_bed(path)] == ["track_7", "browsers"]


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such BED file"):
        read_bed(tmp_path / "none.bed")
    with pytest.raises(UserError, match="cannot read BED file"):
        read_bed(tmp_path)


def test_intervals_outside_the_genome(tmp_path):
    path = tmp_path / "a.bed"
    path.write_text("c\t1\t5\ta\nc\t7\t9\n")
    check_within(read_bed(path), {"c": 9}, path)
    with pytest.raises(UserError, match="'c' ends at 9, beyond the 8 bases of c"):
        check_within(read_bed(path), {"c": 8}, path)
    with pytest.raises(UserError, match="names contig 'c', which the FASTA file does not have"):
        check_within(read_bed(path), {"d": 8}, path)
