# SPDX-License-Identifier: Apache-2.0
"""FASTA reader: exactness at every block border, gzip, and errors."""

import gzip
import os
import pickle
import random

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data import fasta
from evo2_megatron.data.fasta import FastaIndex, FastaRecord, read_fasta, read_pieces

MESSY = (
    b"\n>one  first record\nACGT\nacgt\n\n>empty\n>two\ttab\r\nAC>GT\r\n  NN \r\n\r\n>three x>y\n|d__A b;| AC\n"
    b" \t\n>last\nAC GT  \n\n  TT"
)
MESSY_RECORDS = [
    ("one", "one  first record", b"ACGTacgt"),
    ("empty", "empty", b""),
    ("two", "two\ttab", b"AC>GTNN"),
    ("three", "three x>y", b"|d__A b;| AC"),
    ("last", "last", b"AC GTTT"),
]


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("block", [*range(1, 12), 50, 1 << 18])
def test_read_fasta_at_every_block_border(tmp_path, monkeypatch, block):
    monkeypatch.setattr(fasta, "BLOCK_BYTES", block)

    assert list(read_fasta(write(tmp_path / "a.fa", MESSY))) == [FastaRecord(*record) for record in MESSY_RECORDS]


def line_by_line(data):
    """Headers and bases by what the module's first lines say; None if a record has no name."""
    records = []
    for line in data.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n"):
        if line.startswith(b">"):
            records.append((line[1:].strip(), b""))
        else:
            records[-1] = (records[-1][0], records[-1][1] + line.strip())
    return None if any(not header for header, _ in records) else records


TOKENS = [b"\n", b"\n>r", b"\n>s t\n", b"\n>u\nACGT\nAC\n", b"\n>v\n\n", b"AC", b"n*-", b"\n"]
ODD_TOKENS = [b"\r\n", b" ", b"\t", b">", b"\n>", b"\n \n", b'"\\', b"\n >", b"\r\n>w \r\n"]


@pytest.mark.parametrize("seed", range(40))
def test_read_pieces_equals_reading_line_by_line(tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    tokens = TOKENS * 4 + rng.sample(ODD_TOKENS, seed % 4)  # tidy files too, and those with one odd line
    start = rng.choice([b">a\n", b"\xef\xbb\xbf\n>a b\r\n", b" >a"])
    data = start + b"".join(rng.choices(tokens, k=rng.randrange(60)))
    path, expected = write(tmp_path / "a.fa", data), line_by_line(data)

    for block in (*range(3, len(data) + 2), 1 << 18):  # 3: a byte order mark is never cut in two
        monkeypatch.setattr(fasta, "BLOCK_BYTES", block)
        if expected is None:
            with pytest.raises(UserError, match="a record has no name"):
                list(read_pieces(path))
            continue
        records = []
        for header, bases in read_pieces(path):
            assert header is not None or bases
            if header is None:
                assert records[-1][1], "the first piece of a record is empty only if the record is"
                records[-1] = (records[-1][0], records[-1][1] + bases)
            else:
                records.append((header, bases))
        assert records == expected


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_fasta_index_reads_records_in_any_order(tmp_path, monkeypatch, block, compress):
    monkeypatch.setattr(fasta, "BLOCK_BYTES", block)
    index = pickle.loads(pickle.dumps(FastaIndex(write(tmp_path / "a", compress(MESSY)))))

    assert index.ids == [name for name, _, _ in MESSY_RECORDS]
    assert [index.sequence(i) for i in (4, 0, 1, 3, 2)] == [MESSY_RECORDS[i][2] for i in (4, 0, 1, 3, 2)]


def test_gzip_is_recognised_by_content_also_of_several_members(tmp_path):
    half = MESSY.index(b"GT\n")
    path = write(tmp_path / "a.fa", gzip.compress(MESSY[:half]) + gzip.compress(MESSY[half:]))

    assert [record.sequence for record in read_fasta(path)] == [sequence for _, _, sequence in MESSY_RECORDS]


def test_read_pieces_does_not_hold_a_long_record(tmp_path, monkeypatch):
    monkeypatch.setattr(fasta, "BLOCK_BYTES", 100)
    path = write(tmp_path / "a.fa", b">one\n" + b"ACGTA\n" * 400 + b">two\n" + b"G" * 2000 + b"\n>three\n")
    pieces = list(read_pieces(path))

    assert max(len(bases) for _, bases in pieces) <= 200
    assert b"".join(bases for _, bases in pieces) == b"ACGTA" * 400 + b"G" * 2000
    assert [(header, not bases) for header, bases in pieces if header] == [
        (b"one", False), (b"two", False), (b"three", True),
    ]  # fmt: skip


def test_byte_order_mark_and_undecodable_headers(tmp_path):
    path = write(tmp_path / "a.fa", b"\xef\xbb\xbf>a\xff\nAC\n")

    assert [record.id for record in read_fasta(path)] == ["a\\xff"]
    assert FastaIndex(path).ids == ["a\\xff"]


@pytest.mark.parametrize("reader", [lambda path: list(read_fasta(path, unique_ids=True)), FastaIndex])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no FASTA records"),
        (b"\n  \n", "holds no FASTA records"),
        (b"ACGT\n>a\nAC\n", "is not FASTA: it starts with 'ACGT'"),
        (b">a\nAC\n>\nGT\n", "a record has no name"),
        (b">a\nAC\n> \t\r\nGT\n", "a record has no name"),
        (b">a\rACGT\r>b\rAC\r", "lone carriage returns"),
        (b">a\nAC\n>a b\nGT\n", "two records are named 'a'"),
        (gzip.compress(MESSY, mtime=0)[:-20], "damaged or cut off"),
    ],
)
def test_errors(tmp_path, reader, data, message):
    with pytest.raises(UserError, match=message):
        reader(write(tmp_path / "a.fa", data))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such FASTA file"):
        list(read_fasta(tmp_path / "none.fa"))
    with pytest.raises(UserError, match="cannot read FASTA file"):
        list(read_fasta(tmp_path))


def test_an_index_of_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe, which can be read only once"):
        FastaIndex(tmp_path / "pipe")


def test_duplicate_names_are_an_error_only_on_request(tmp_path):
    path = write(tmp_path / "a.fa", b">a\nAC\n>a\nGT\n")

    assert [record.sequence for record in read_fasta(path)] == [b"AC", b"GT"]
