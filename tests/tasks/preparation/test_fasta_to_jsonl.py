# SPDX-License-Identifier: Apache-2.0
"""FASTA to JSON Lines."""

import gzip
import json

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data import fasta
from evo2_megatron.tasks.preparation import fasta_to_jsonl as task
from evo2_megatron.tasks.preparation.fasta_to_jsonl import fasta_to_jsonl

MESSY = b'>one  first\nACgt\n\nNN\r\n>empty\n>t"w\\o\xc3\xa9 x\n |d__A "b"\\;| AC \nG*-\n>last\nAC'
RECORDS = [("one", "ACgtNN"), ("empty", ""), ('t"w\\o\xe9', '|d__A "b"\\;| ACG*-'), ("last", "AC")]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 18])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("uppercase", [False, True])
def test_lines_are_those_of_json_dumps(tmp_path, monkeypatch, block, compress, uppercase):
    monkeypatch.setattr(fasta, "BLOCK_BYTES", block)
    (tmp_path / "a.fa").write_bytes(compress(MESSY))

    assert fasta_to_jsonl(tmp_path / "a.fa", tmp_path / "a.jsonl", uppercase=uppercase) == 4
    lines = [
        json.dumps({"id": name, "prompt": bases.upper() if uppercase else bases}) + "\n" for name, bases in RECORDS
    ]
    assert (tmp_path / "a.jsonl").read_text() == "".join(lines)


ODD = b'a"\\\x00\x1f\x7f\x0b*-@#~ {}'


@pytest.mark.parametrize("numpy_from", [0, 1 << 26])
@pytest.mark.parametrize("odd", [*(ODD[i : i + 1] for i in range(len(ODD))), b"", ODD])
@pytest.mark.parametrize("uppercase", [False, True])
def test_what_json_escapes(tmp_path, monkeypatch, numpy_from, odd, uppercase):
    monkeypatch.setattr(task, "_NUMPY_BYTES", numpy_from)
    monkeypatch.setattr(task, "_BATCH_BYTES", 100)  # some batches have nothing odd
    tail = "" if odd.isspace() else odd.decode()
    records = [(f"n{i}" + (tail if i % 7 == 0 else ""), b"ACgt" * (i % 9)) for i in range(60)]
    records[33] = ("odd", b"AC" + odd + b"GT")
    (tmp_path / "a.fa").write_bytes(b"".join(b">%b x\n%b\n" % (n.encode(), bases) for n, bases in records))

    assert fasta_to_jsonl(tmp_path / "a.fa", tmp_path / "a.jsonl", uppercase=uppercase) == len(records)
    expected = "".join(
        json.dumps({"id": name.split(None, 1)[0], "prompt": (bases.upper() if uppercase else bases).decode()}) + "\n"
        for name, bases in records
    )
    assert (tmp_path / "a.jsonl").read_text() == expected


@pytest.mark.parametrize("numpy_from", [0, 1 << 26])
def test_what_is_not_ascii_is_named_with_its_record(tmp_path, monkeypatch, numpy_from):
    monkeypatch.setattr(task, "_NUMPY_BYTES", numpy_from)
    (tmp_path / "a.fa").write_bytes(b'>a\nAC\n>b"\xc3\xa9 x\nA\xe9C\n>c\nAC\n')
    with pytest.raises(UserError, match="of record 'b\"\xe9' has bytes"):
        fasta_to_jsonl(tmp_path / "a.fa", tmp_path / "a.jsonl")


def test_an_empty_file_has_no_records(tmp_path):
    (tmp_path / "a.fa").touch()

    assert fasta_to_jsonl(tmp_path / "a.fa", tmp_path / "a.jsonl") == 0
    assert (tmp_path / "a.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ACGT\n>a\nAC\n", "is not FASTA"),
        (b">a\nAC\n>\nAC\n", "a record has no name"),
        (b">a\nA\xe9C\n", "record 'a' has bytes that are not ASCII"),
        (gzip.compress(MESSY, mtime=0)[:-9], "damaged or cut off"),
    ],
)
def test_errors_leave_nothing(tmp_path, data, message):
    (tmp_path / "a.fa").write_bytes(data)
    with pytest.raises(UserError, match=message):
        fasta_to_jsonl(tmp_path / "a.fa", tmp_path / "a.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.fa"]


def test_paths(tmp_path):
    (tmp_path / "a.fa").write_bytes(MESSY)
    with pytest.raises(UserError, match="no such folder"):
        fasta_to_jsonl(tmp_path / "a.fa", tmp_path / "none" / "a.jsonl")
    with pytest.raises(UserError, match="is an input"):
        fasta_to_jsonl(tmp_path / "a.fa", tmp_path / "a.fa")
