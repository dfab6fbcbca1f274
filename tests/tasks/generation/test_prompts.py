# SPDX-License-Identifier: Apache-2.0
import gzip
import os
from pathlib import Path

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.tasks.generation.prompts import Prompt, encode_prompt, read_prompts, warn_of_no_dna


def test_read_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"id": "a b", "prompt": "ACGT", "more": 1, "seed": 0}\n\n'
        '{"prompt": "|d__B|"}\r\n{"id": 7, "prompt": "N"}\n  \n'
    )
    assert read_prompts(path) == [Prompt("a b", "ACGT", 0), Prompt("2", "|d__B|"), Prompt("7", "N")]


def test_read_prompts_keeps_line_separators_inside_a_string(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"prompt": "A\u2028C"}\n{"prompt": "G"}', encoding="utf-8")
    assert [p.text for p in read_prompts(path)] == ["A\u2028C", "G"]


def test_read_prompts_of_an_empty_file(tmp_path):
    for name in ("empty", "empty.fa", "empty.jsonl", "empty.txt"):
        (tmp_path / name).write_text("\n")
        assert read_prompts(tmp_path / name) == []


FASTA = b"\xef\xbb\xbf>one first of two\r\nACGT\r\nacgtN\r\n\r\n>two\r\n|d__B|G\r\n"


@pytest.mark.parametrize("name", ["x.fa", "x.FASTA", "x.fna", "x.txt", "x", "x.fa.gz", "x.gz"])
def test_fasta(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(FASTA) if name.endswith("gz") else FASTA)
    assert read_prompts(path) == [Prompt("one", "ACGTacgtN"), Prompt("two", "|d__B|G")]


@pytest.mark.parametrize("content", [FASTA, gzip.compress(FASTA)], ids=["plain", "gzip"])
def test_fasta_of_a_pipe(content):
    read_end, write_end = os.pipe()
    os.write(write_end, content)
    os.close(write_end)
    assert [prompt.id for prompt in read_prompts(Path(f"/dev/fd/{read_end}"))] == ["one", "two"]
    os.close(read_end)


@pytest.mark.parametrize("name", ["x.txt", "x", "x.txt.gz"])
def test_text(tmp_path, name):
    content = b"ACGT\r\n\n  |d__B;s__Escherichia coli|\t\nN"
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_prompts(path) == [Prompt("0", "ACGT"), Prompt("2", "|d__B;s__Escherichia coli|"), Prompt("3", "N")]


@pytest.mark.parametrize("name", ["x", "x.txt", "x.jsonl.gz", "x.ndjson"])
def test_json_lines_under_other_names(tmp_path, name):
    content = b'\n {"prompt": "ACGT"}\n'
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_prompts(path) == [Prompt("1", "ACGT")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.fa", b"ACGT\n", "is not FASTA: it starts with 'ACGT'"),
        ("x.fa", b'{"prompt": "A"}', "is not FASTA"),
        ("x.jsonl", b">a\nACGT\n", "line 1 is not JSON"),
        ("x.json", b'[{"prompt": "A"}]', "line 1 is not a JSON object"),
        ("x.fa", b">a\nAC\xc3\xa9\n", "record 'a' of .*x.fa contains"),
        ("x.fa", b">\nACGT\n", "a record has no name"),
        ("x.txt.gz", gzip.compress(b"ACGT" * 100, mtime=0)[:20], "damaged or cut off"),
        ("x.txt", b"ACGT\n\xff", "not UTF-8"),
        ("x.fastq", b"@read\nACGT\n+\n!!!!\n", "is FASTQ"),
    ],
)
def test_files_that_are_not_what_they_seem(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_encode_prompt():
    assert encode_prompt(Prompt("x", "AC<EOS>"), 512) == [65, 67, 0]
    assert encode_prompt(Prompt("x", "|d__B|aC<EOS>"), 512) == [*b"|D__B|AC", 0]
    assert encode_prompt(Prompt("x", "|d__B|aC<EOS>"), 512, keep_case=True) == [*b"|d__B|aC", 0]
    warn_of_no_dna([Prompt("x", "\ud800")])  # which comes first, has nothing to say
    with pytest.raises(UserError, match=r"Prompt 'x' has '\\ud800' at character 1"):
        encode_prompt(Prompt("x", "\ud800"), 256)
    with pytest.raises(UserError, match="Prompt 'x' is empty"):
        encode_prompt(Prompt("x", ""), 512)
    with pytest.raises(UserError, match="Prompt 'x' has '\u0101' at character 2.*256 tokens"):
        encode_prompt(Prompt("x", "A\u0101"), 256)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"prompt": "A"}\n\n{"id": 1}\n', "line 3: missing required 'prompt' field"),
        (b'{"prompt": "A"}\nACGT\n', "line 2 is not JSON"),
        (b'["ACGT"]', "line 1 is not a JSON object"),
        (b'{"prompt": 5}', "line 1: 'prompt' is 5"),
        (b'{"prompt": null}', "line 1: 'prompt' is None"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"prompt": "A", "seed": -1}', "line 1: 'seed' is -1"),
        (b'{"prompt": "A", "seed": ' + b"1" * 5000 + b"}", "line 1 is not JSON .Exceeds the limit"),
        (b"[" * 100_000, "line 1 is not JSON .maximum recursion depth"),
        (b'{"prompt": "A", "id": "x\\ud800"}', r"line 1: 'id' is 'x\\ud800'; it must be a string"),
        (b'{"prompt": "A", "id": ["x"]}', r"line 1: 'id' is \['x'\]"),
        (b'{"prompt": "A", "seed": true}', "line 1: 'seed' is True"),
        (b'{"prompt": "A", "seed": "1"}', "line 1: 'seed' is '1'"),
    ],
)
def test_bad_prompt_files(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_prompt_file(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"cannot be read.*--prompt-file"):
            read_prompts(path)


def test_prompts_that_are_no_dna(caplog):
    texts = ("acgtnry-*", "|d__E;p__F|ACG", "p__Fusobacteria", "<EOS>AC")
    dna = [Prompt(text, text) for text in texts]
    warn_of_no_dna(dna)
    assert not caplog.text
    warn_of_no_dna([*dna, Prompt("rna", "AuG"), Prompt("protein", "MKL")])
    assert "2 of 6 prompts have letters that no DNA has; the first is 'U' in 'rna'." in caplog.text
