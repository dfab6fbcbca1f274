# SPDX-License-Identifier: Apache-2.0
"""FASTA records as samples to score."""

import gzip
import pickle

import pytest
import torch

from evo2_megatron.config import UserError
from evo2_megatron.data.fasta_dataset import FastaDataset, WindowDataset
from evo2_megatron.data.record_windows import Windows
from evo2_megatron.data.tokenizer import encode

FASTA = ">contig_10 a\nACgtn\nAC\n>contig_2\n|d__Homo;s__x y|acgt\n>contig_1\nA\n"


@pytest.fixture(params=["plain", "gzip"])
def path(tmp_path, request):
    path = tmp_path / "a.fa"
    path.write_bytes(FASTA.encode() if request.param == "plain" else gzip.compress(FASTA.encode()))
    return path


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_samples(path, prepend_bos):
    dataset = pickle.loads(pickle.dumps(FastaDataset(path, prepend_bos=prepend_bos)))
    texts = ["ACGTNAC", "|D__HOMO;S__X Y|ACGT", "A"]

    assert len(dataset) == 3
    assert dataset.ids == ["contig_10", "contig_2", "contig_1"]
    for i, text in enumerate(texts):
        sample = dataset[i]
        tokens = [0] * prepend_bos + encode(text)
        assert sample["tokens"].tolist() == tokens
        assert sample["position_ids"].tolist() == list(range(len(tokens)))
        assert sample["loss_mask"].tolist() == [0] * prepend_bos + [1] * len(text)
        assert sample["seq_idx"].item() == i
        assert sample["seq_idx"].shape == ()
        assert {value.dtype for value in sample.values()} == {torch.int64}
        assert dataset.lengths[i] == len(tokens)


def test_tags(path):
    dataset = FastaDataset(path, prepend_bos=True, mask_tags=True)

    assert dataset[1]["tokens"].tolist() == [0, *encode("|D__HOMO;S__X Y|ACGT")]
    assert dataset[1]["loss_mask"].tolist() == [0] * 17 + [1] * 4
    assert dataset[0]["loss_mask"].tolist() == [0] + [1] * 7
    assert dataset.bases(1, 2, 9) == b"__Homo;"


def test_case_of_cut_tags(tmp_path):
    (tmp_path / "a.fa").write_text(">a\nens;s__Homo sapiens|acgt|acgt|d__Vir\n>b\nac_gt\n")
    dataset = FastaDataset(tmp_path / "a.fa", keep_tag_case=True)

    assert dataset[0]["tokens"].tolist() == encode("ens;s__Homo sapiens|ACGT|ACGT|d__Vir")
    assert dataset[1]["tokens"].tolist() == encode("AC_GT")
    assert FastaDataset(tmp_path / "a.fa")[0]["tokens"].tolist() == encode("ENS;S__HOMO SAPIENS|ACGT|ACGT|D__VIR")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">a\nAC\n>b\n>c\nG\n", "record 'b' of .* has no bases"),
        (">a\nAC\n>b\nAC\u00e9\n", r"record 'b' of .* contains b'\\xc3'"),
        (">a\nA<EOS>\n", "contains b'<'"),
        (">a\nA\n>a\nC\n", "two records are named 'a'"),
    ],
)
def test_errors(tmp_path, text, message):
    (tmp_path / "a.fa").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        FastaDataset(tmp_path / "a.fa")


@pytest.mark.parametrize("length", [None, 4])
def test_letters_that_no_dna_has(tmp_path, length):
    path = tmp_path / "a.fa"
    path.write_text(">dna\nacgtnrykmswbdhv-*\n>rna\nACGU\n>tag\n|d__E|\n>protein\nACGTACGTl\n>masked\nNNNN\n")
    if length is None:
        found = FastaDataset(path).no_dna
    else:
        path.write_text(path.read_text().replace("|d__E|", "|D|"))
        with WindowDataset(path, Windows(length, 0)) as dataset:
            found = dataset.no_dna
    assert found == {"rna": "U", "protein": "L"}
