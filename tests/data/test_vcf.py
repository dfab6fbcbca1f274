# SPDX-License-Identifier: Apache-2.0
"""VCF: what is repaired, what is refused with its line, and that an annotated file is the input and no more."""

import gzip
import io
import random
import re

import pytest

from bgzip import bgzip
from evo2_megatron.config import UserError
from evo2_megatron.data.bgzf import BgzfReader, BgzfWriter
from evo2_megatron.data.vcf import (
    InfoField,
    VcfRecord,
    make_lines,
    read_lines,
    read_vcf,
    why_not_scored,
    write_annotated,
)

META = b"##fileformat=VCFv4.2\n"
NAMES = b"#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
ONE = b"chr1\t12\trs1\tA\tC,<DEL>\t29.50\tPASS\tAF=0.10;DB\n"
TWO = b"chr1\t13\t.\tat\tg\t.\t.\t.\n"
GOOD = META + NAMES + ONE + TWO
FOUND = [(b"chr1", 12, b"rs1", b"A", (b"C", b"<DEL>")), (b"chr1", 13, b".", b"AT", (b"G",))]
DELTA = InfoField("EVO2_DELTA", "Float", "difference")


def records(tmp_path, data):
    path = tmp_path / "in.vcf"
    path.write_bytes(data)
    return list(read_vcf(path))


REPAIRED = {
    "plain": GOOD,
    "gzip": gzip.compress(GOOD),
    "bgzip": bgzip(GOOD),
    "gzip of several members": gzip.compress(GOOD[:50]) + gzip.compress(GOOD[50:]),
    "Windows line ends": GOOD.replace(b"\n", b"\r\n"),
    "no line break at the end": GOOD[:-1],
    "byte order mark": b"\xef\xbb\xbf" + GOOD,
    "blank lines": GOOD.replace(b"chr1", b"\n \nchr1") + b"\n\n",
    "no fileformat": NAMES + ONE + TWO,
    "genotypes": META + NAMES[:-1] + b"\tFORMAT\ts1\n" + (ONE + TWO).replace(b"\n", b"\tGT\t0/1\n"),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_what_is_read(tmp_path, name):
    assert [record[1:] for record in records(tmp_path, REPAIRED[name])] == FOUND


def test_lines_are_those_of_the_file(tmp_path):
    assert [record.line for record in records(tmp_path, META + NAMES + b"\n" + ONE + b"\n\n" + TWO)] == [4, 7]


@pytest.mark.parametrize("text, number", [(b"0" * 5000 + b"13", 13), (b"2147483647", 2147483647), (b"0", 0)])
def test_positions(tmp_path, text, number):
    assert records(tmp_path, GOOD.replace(b"\t13\t", b"\t%s\t" % text))[1].position == number


def test_no_records(tmp_path):
    assert records(tmp_path, META + NAMES) == []


BROKEN = {
    "empty": (b"", "has no line '#CHROM POS ID REF ALT ...'"),
    "white space": (b"\n\n", "has no line '#CHROM"),
    "meta lines only": (META, "has no line '#CHROM"),
    "no column names": (META + ONE, "line 2 comes before the line '#CHROM"),
    "column names with spaces": (META + NAMES.replace(b"\t", b" ") + ONE, "line 2 must name the columns #CHROM POS"),
    "column names without INFO": (META + NAMES[:-6] + b"\n", "line 2 must name the columns"),
    "header in the middle": (GOOD + GOOD, "line 5 is a header line behind the column names"),
    "spaces for tabs": (META + NAMES + ONE.replace(b"\t", b" "), "line 3 has 1 columns, .*; separate columns by tabs"),
    "cut off": (GOOD[:-6], "line 4 has 6 columns, the header 8; is it cut off?"),
    "one column too many": (GOOD[:-1] + b"\tGT\n", "line 4 has 9 columns, the header 8"),
    "position is text": (GOOD.replace(b"\t13\t", b"\tx\t"), "line 4 has the position 'x'; POS is a whole number"),
    "position is negative": (GOOD.replace(b"\t13\t", b"\t-3\t"), "line 4 has the position '-3'"),
    "position is empty": (GOOD.replace(b"\t13\t", b"\t\t"), "line 4 has the position ''"),
    "position is beyond any contig": (
        GOOD.replace(b"\t13\t", b"\t2147483648\t"),
        "line 4 has the position '2147483648'; POS is at most 2147483647",
    ),
    "position of 26 digits": (
        GOOD.replace(b"\t13\t", b"\t1%s\t" % (b"0" * 25)),
        "line 4 .* POS is at most 2147483647",
    ),
    "position of 5,000 digits": (
        GOOD.replace(b"\t13\t", b"\t%s\t" % (b"9" * 5000)),
        "line 4 has the position '9{40}'",
    ),
    "REF is empty": (GOOD.replace(b"\tat\t", b"\t\t"), "line 4 has an empty REF"),
    "ALT is empty": (GOOD.replace(b"\tg\t", b"\t\t"), "line 4 has an empty ALT"),
    "ALT ends with a comma": (GOOD.replace(b"\tg\t", b"\tg,\t"), "line 4 has an empty ALT"),
    "CHROM is empty": (GOOD.replace(b"chr1\t13", b"\t13"), "line 4 has an empty CHROM"),
    "ALT is not ASCII": (GOOD.replace(b"\tg\t", b"\t\xc3\x84\t"), "line 4 has characters other than ASCII"),
    "FASTA": (b">chr1\nACGT\n", "line 1 comes before"),
    "BCF": (b"BCF\2\2" + bytes(20), "is BCF; convert it: bcftools view"),
    "BCF in bgzip": (bgzip(b"BCF\2\2" + bytes(20)), "is BCF"),
    "binary": (bytes(100), "is not VCF: it is no text"),
    "gzip cut off": (gzip.compress(GOOD + ONE * 50)[:-12], "damaged or cut off"),
    "gzip with a wrong checksum": (gzip.compress(GOOD, mtime=0)[:-8] + bytes(8), "damaged or cut off"),
    "bgzip cut off between blocks": (bgzip(GOOD)[:-28], "damaged or cut off"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_refused(tmp_path, name):
    data, message = BROKEN[name]
    with pytest.raises(UserError) as error:
        records(tmp_path, data)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="no such VCF file"):
        list(read_vcf(tmp_path / "none.vcf"))


@pytest.mark.parametrize(
    "ref, alt, reason",
    [
        ("A", "C", None),
        ("A", "ACGT", None),
        ("ACG", "A", None),
        ("AC", "GT", None),
        ("A", ".", "no_alt"),
        ("A", "*", "spanning_deletion"),
        ("A", "<DEL>", "symbolic"),
        ("A", "<*>", "symbolic"),
        ("A", "<NON_REF>", "symbolic"),
        ("G", "G[17:198983[", "breakend"),
        ("G", "]13:123456]T", "breakend"),
        ("G", "G.", "breakend"),
        ("G", ".G", "breakend"),
        ("A", "R", "not_acgt"),
        ("N", "A", "not_acgt"),
        ("A", "-", "not_acgt"),
        (".", "A", "not_acgt"),
        ("A", "A", "same_as_ref"),
    ],
)
def test_kinds_of_alt(ref, alt, reason):
    assert why_not_scored(ref.encode(), alt.encode()) == reason


def annotated(tmp_path, data, *values):
    (tmp_path / "in.vcf").write_bytes(data)
    file = io.BytesIO()
    write_annotated(read_lines(tmp_path / "in.vcf"), file, [DELTA], iter([(value,) for value in values]))
    return file.getvalue()


def test_annotated_file(tmp_path):
    line = b'##INFO=<ID=EVO2_DELTA,Number=A,Type=Float,Description="difference">\n'
    got = annotated(tmp_path, GOOD, "0.5,.", None)
    assert got == META + line + NAMES + ONE.replace(b"DB\n", b"DB;EVO2_DELTA=0.5,.\n") + TWO
    # what was annotated before is replaced, once
    again = annotated(tmp_path, got, "1,.", "2")
    assert again == META + line + NAMES + ONE.replace(b"DB\n", b"DB;EVO2_DELTA=1,.\n") + TWO[:-2] + b"EVO2_DELTA=2\n"
    assert annotated(tmp_path, again, None, None) == META + line + NAMES + ONE + TWO
    assert annotated(tmp_path, NAMES, "1").startswith(META)


@pytest.mark.parametrize("size", [0, 1, 0xFEFF, 0xFF00, 0xFF01, 200_000])
def test_bgzip_that_is_written_is_read(size):
    data = random.Random(0).randbytes(size)
    file = io.BytesIO()
    writer = BgzfWriter(file)
    for start in range(0, size, 1000):
        writer.write(data[start : start + 1000])
    writer.close()
    assert gzip.decompress(file.getvalue()) == data
    file.seek(0)
    with BgzfReader(file, threads=1) as reader:
        assert reader.read() == data


def test_a_file_that_is_made(tmp_path):
    snvs = VcfRecord(1, b"chr1", 12, b".", b"A", (b"C", b"G", b"T"))
    records = [snvs, VcfRecord(2, b"chr2", 1, b".", b"C", (b"G",))]
    lines = list(make_lines(records, {b"chr1": 20, b"chr2": 8}))
    path = tmp_path / "made.vcf"
    path.write_bytes(b"".join(line.text + b"\n" for line in lines))
    assert lines == list(read_lines(path))
    assert [record[1:] for record in read_vcf(path)] == [record[1:] for record in records]
    import pysam  # here, so that the file can be read where it is not installed

    with pysam.VariantFile(str(path)) as file:
        assert {name: contig.length for name, contig in file.header.contigs.items()} == {"chr1": 20, "chr2": 8}
        assert [(r.chrom, r.pos, r.ref, r.alts) for r in file] == [
            ("chr1", 12, "A", ("C", "G", "T")), ("chr2", 1, "C", ("G",)),
        ]  # fmt: skip
