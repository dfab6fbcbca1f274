# SPDX-License-Identifier: Apache-2.0
"""Windows of a record: every base scored once, with its context, by arithmetic and in samples."""

import random

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data.fasta_dataset import FastaDataset, WindowDataset
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.data.record_windows import Windows
from evo2_megatron.data.tokenizer import decode

SIZES = [(1, 0), (2, 1), (5, 0), (5, 2), (7, 6), (13, 1), (64, 32)]


def dna(length: int) -> str:
    return "".join(random.Random(length).choices("ACGT", k=length))


@pytest.mark.parametrize("length, overlap", SIZES)
@pytest.mark.parametrize("num_bases", [1, 2, 4, 5, 6, 7, 8, 13, 14, 63, 64, 65, 97, 257])
def test_every_base_is_scored_once(length, overlap, num_bases):
    windows, scored_by = Windows(length, overlap), {}
    spans = [windows.span(number, num_bases) for number in range(windows.count(num_bases))]
    for number, (start, end, num_context) in enumerate(spans):
        assert end - start <= length and (end - start == length or number == len(spans) - 1)
        for position in range(start + num_context, end):
            assert position not in scored_by
            assert position - start >= overlap or number == 0
            scored_by[position] = number
    assert sorted(scored_by) == list(range(num_bases)) and spans[0].start == spans[0].num_context == 0
    for start in range(num_bases):
        for end in range(start + 1, num_bases + 1, 3):
            assert set(windows.covering(start, end)) == {scored_by[position] for position in range(start, end)}


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "a.fa"
    path.write_text(f">long x\n{dna(23).lower()}\n\n>tag\n|d__x|A\nCgt\n>exact\n{dna(10)}\n>one\nn\n")
    return path


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_samples(fasta, prepend_bos):
    with WindowDataset(fasta, Windows(10, 4), prepend_bos=prepend_bos) as dataset:
        assert dataset.ids == ["long", "tag", "exact", "one"] and dataset.num_bases == [23, 10, 10, 1]
        assert [list(dataset.samples_of(i)) for i in range(4)] == [[0, 1, 2, 3], [4], [5], [6]]
        assert dataset.lengths == [n + prepend_bos for n in (10, 10, 10, 5, 10, 10, 1)]
        record = dna(23)
        for strand, bases in ((dataset.__getitem__, record), (dataset.opposite_strand, reverse_complement(record))):
            for number, (start, end) in enumerate([(0, 10), (6, 16), (12, 22), (18, 23)]):
                sample = strand(number)
                text = decode(sample["tokens"].tolist()[prepend_bos:])
                assert text == bases[start:end] and sample["seq_idx"].item() == number
                context = [0] * (prepend_bos + 4 * (number > 0))
                assert sample["loss_mask"].tolist() == context + [1] * (dataset.lengths[number] - len(context))
        assert dataset.bases(0, 3, 9) == record[3:9].lower().encode() and dataset.bases(1, 0, 8) == b"|d__x|AC"


def test_a_record_that_fits_is_what_it_is_whole(fasta):
    whole = FastaDataset(fasta, keep_tag_case=True)
    with WindowDataset(fasta, Windows(23, 4), keep_tag_case=True) as dataset:
        for index in range(4):
            for one, other in (
                (dataset[index], whole[index]),
                (dataset.opposite_strand(index), whole.opposite_strand(index)),
            ):
                assert {name: values.tolist() for name, values in one.items()} == {
                    name: values.tolist() for name, values in other.items()
                }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (">a\nAC\n>b\n>c\nG\n", "record 'b' of .* has no bases"),
        (f">a\nA\n>b\n{dna(40)}\n\n{dna(40)}\x01\n", r"record 'b' of .* contains b'\\x01'"),
        (f">a\n{dna(40)}|\n", "record 'a' of .* has a lineage tag, which only one of its windows"),
        (">a\nA\n>a\nC\n", "two records are named 'a'"),
    ],
)
def test_errors(tmp_path, text, message):
    (tmp_path / "a.fa").write_text(text)
    with pytest.raises(UserError, match=message):
        WindowDataset(tmp_path / "a.fa", Windows(40, 4))
