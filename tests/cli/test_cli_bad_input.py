# SPDX-License-Identifier: Apache-2.0
"""Broken files: each gives the documented error in one line, or the documented repair."""

import gzip
import re
from pathlib import Path

import pytest

from bgzip import bgzip
from documents import read_back
from evo2_megatron.cli.preprocess import main

YAML = "- datapaths: ['{fasta}']\n  output_dir: '{out}'\n  output_prefix: x\n  train_split: 1\n  valid_split: 0\n"
ALL_TRAIN = YAML + "  test_split: 0\n"
GOOD = b">a\nACGT\n>b\nGG\n"


def run(tmp_path, fasta, text=ALL_TRAIN, flags=()):
    """Exit status of the command."""
    (tmp_path / "in.fa").write_bytes(fasta)
    config = tmp_path / "config.yaml"
    text = text if isinstance(text, bytes) else text.replace("{fasta}", str(tmp_path / "in.fa")).encode()
    config.write_bytes(text.replace(b"{out}", str(tmp_path / "out").encode()))
    try:
        main(["-c", str(config), *flags])
    except SystemExit as ending:
        return ending.code
    return 0


REPAIRED = {
    "Windows line ends": b">a one\r\nACGT\r\nAC\r\n>b\r\nGG\r\n",
    "byte order mark": b"\xef\xbb\xbf>a\nACGT\nAC\n>b\nGG\n",
    "no line break at the end": b">a\nACGT\nAC\n>b\nGG",
    "blank lines": b"\n\n>a\n\nACGT\n\nAC\n\n>b\n\n\nGG\n\n",
    "spaces around lines": b">a\n  ACGT \nAC\t\n>b\n GG  \n",
    "lines of unequal length": b">a\nA\nCGTA\nC\n>b\nG\nG\n",
    "space before the name": b"> a\nACGTAC\n>  b x\nGG\n",
    "> within a header": b">a >b c\nACGTAC\n>b\nGG\n",
    "gzip": gzip.compress(b">a\nACGTAC\n>b\nGG\n"),
    "gzip of several members": gzip.compress(b">a\nACG") + gzip.compress(b"TAC\n>b\nGG\n"),
    "bgzip": bgzip(b">a\nACGTAC\n>b\nGG\n", 3),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_what_is_repaired(tmp_path, name, capsys):
    assert run(tmp_path, REPAIRED[name]) == 0
    assert "note" not in capsys.readouterr().err
    assert read_back(tmp_path / "out" / "x_nucleotide_fast_tokenizer_256_train") == [list(b"ACGTAC\0"), list(b"GG\0")]


KEPT = {
    "space in a line": (b">a\nAC GT\n", b"AC GT\0", "1 characters are no IUPAC codes .* ' ' in record 'a'"),
    "gap": (b">a\nAC--GT.\n", b"AC--GT.\0", "3 characters are no IUPAC codes .* '-' in record 'a'"),
    "protein": (b">a\nMKLVEF*\n", b"MKLVEF*\0", "4 characters are no IUPAC codes .* 'L' in record 'a'"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_with_a_note(tmp_path, name, capsys):
    fasta, document, note = KEPT[name]
    assert run(tmp_path, fasta) == 0
    assert read_back(tmp_path / "out" / "x_nucleotide_fast_tokenizer_256_train") == [list(document)]
    assert re.search(note, capsys.readouterr().err)


BROKEN_FASTA = {
    "empty": (b"", "holds no FASTA records"),
    "white space only": (b"\n \r\n\n", "holds no FASTA records"),
    "no header": (b"ACGT\nACGT\n", "is not FASTA: it starts with 'ACGT'"),
    "FASTQ": (b"@r1\nACGT\n+\nIIII\n", "is not FASTA: it starts with '@r1'"),
    "binary": (bytes(range(256)) * 9, "is not FASTA: it starts with "),
    "binary after a header": (b">a\n" + bytes(range(128, 256)), "record 'a' of .* contains b'.x80'"),
    "zero bytes": (b">a\nAC\0\0GT\n", r"record 'a' of .* contains b'.x00', .* damaged"),
    "header only": (b">a\n", "record 'a' of .* has no bases; set drop_empty_sequences"),
    "a record without bases": (b">a\nAC\n>b\n>c\nGG\n", "record 'b' of .* has no bases"),
    "no name": (b">a\nAC\n>\nGG\n", "a record has no name"),
    "duplicate names": (b">a x\nAC\n>b\nAC\n>a y\nGG\n", "two records are named 'a'"),
    "> in a line": (b">a\nACGT>b\nGG\n", r"record 'a' of .* contains b'>', .*is a line break missing"),
    "web page": (b">a\n<html>\n", "record 'a' of .* contains b'<'"),
    "other alphabet": (">a\nAC\u00c7\n".encode(), "record 'a' of .* contains b'.xc3'"),
    "UTF-16": (">a\nACGT\n".encode("utf-16"), "is not FASTA"),
    "lone carriage returns": (b">a\rACGT\r>b\rGG\r", "lone carriage returns"),
    "gzip cut off": (gzip.compress(GOOD * 100, mtime=0)[:-12], "damaged or cut off"),
    "gzip with a wrong checksum": (gzip.compress(GOOD, mtime=0)[:-8] + bytes(8), "damaged or cut off"),
    "gzip with something behind it": (gzip.compress(GOOD, mtime=0) + b"ACGT", "damaged or cut off"),
    "gzip of nothing": (gzip.compress(b"", mtime=0), "holds no FASTA records"),
    "bgzip cut off in a block": (bgzip(GOOD * 9)[:-40], "damaged or cut off: it ends inside a block"),
    "bgzip cut off between blocks": (bgzip(GOOD * 9)[:-28], "damaged or cut off: its last block.* is missing"),
    "bgzip with a damaged block": (bgzip(GOOD)[:30] + b"?" + bgzip(GOOD)[31:], "damaged or cut off"),
}

BROKEN_YAML = {
    "empty": ("", "must be a list of datasets"),
    "no list": ("datapaths: ['{fasta}']\n", "must be a list of datasets; put '- ' before the first key"),
    "list of texts": ("- a\n", "must be a list of datasets"),
    "binary": (b"\x80\x81\xff", "is not YAML"),
    "bracket missing": ("- datapaths: ['{fasta}'\n", "is not YAML"),
    "tab": ("- datapaths:\n\t- a\n", "is not YAML"),
    "unknown key": (ALL_TRAIN + "  random_reverse_complment: 0.5\n", "did you mean 'random_reverse_complement'"),
    "key twice": (ALL_TRAIN + "  output_prefix: y\n", "line 1: output_prefix is there twice"),
    "text for a number": (ALL_TRAIN + "  seed: one\n", "seed is 'one'; it must be a whole number or null"),
    "yes for a truth value": (ALL_TRAIN + "  append_eod: 'yes'\n", "append_eod is 'yes'; it must be true or false"),
    "no such FASTA": (ALL_TRAIN.replace("{fasta}", "none.fa"), "no such FASTA file: none.fa"),
    "folder for a FASTA": (ALL_TRAIN.replace("{fasta}", "/"), "/ is a folder; list its FASTA files"),
    "negative weight": (YAML + "  test_split: -0.5\n", "none may be negative"),
    "all weights zero": (
        YAML.replace("train_split: 1", "train_split: 0") + "  test_split: 0\n",
        "one must be above 0",
    ),
    "infinite weight": (YAML + "  test_split: .inf\n", "none may be negative"),
    "name in no record": (ALL_TRAIN + "  valid_contigs: [a, z]\n", "no record with bases is named 'z'"),
    "name in two lists": (
        ALL_TRAIN + "  valid_contigs: [a]\n  test_contigs: [a]\n",
        "'a' is in the lists for val and test",
    ),
    "list of names that is no list": (ALL_TRAIN + "  valid_contigs: none.txt\n", "cannot read the names in none.txt"),
    "unknown rank": (ALL_TRAIN + "  taxonomy_data: {a: {class: x}}\n", "unknown key 'class'; did you mean 'clazz'"),
}


@pytest.mark.parametrize("name", [*BROKEN_FASTA, *(f"YAML: {name}" for name in BROKEN_YAML)])
@pytest.mark.parametrize("dry", [False, True], ids=["", "dry"])
def test_what_is_refused(tmp_path, name, dry, capsys):
    fasta, text = GOOD, ALL_TRAIN
    if name in BROKEN_FASTA:
        fasta, message = BROKEN_FASTA[name]
    else:
        text, message = BROKEN_YAML[name.removeprefix("YAML: ")]
    assert run(tmp_path, fasta, text, ["--dry-run"] if dry else []) == 2
    out, err = capsys.readouterr()

    assert out == ""
    assert err.startswith("preprocess_evo2: error: ") and err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_weights_are_relative(tmp_path):
    """They need not sum to 1."""
    fasta = b"".join(b">r%d\nACGT\n" % i for i in range(300))
    assert run(tmp_path, fasta, YAML.replace("train_split: 1", "train_split: 70") + "  test_split: 30\n") == 0
    train, test = (read_back(Path(tmp_path, "out", f"x_nucleotide_fast_tokenizer_256_{s}")) for s in ("train", "test"))
    assert (len(train), len(test)) == (pytest.approx(210, abs=30), pytest.approx(90, abs=30))
