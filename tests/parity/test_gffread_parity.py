# SPDX-License-Identifier: Apache-2.0
"""splice_evo2 and real gffread make the same transcripts, base for base."""

import pytest

from evo2_megatron.data.fasta import read_fasta
from evo2_megatron.tasks.preparation.splice import splice
from generated_genome import generate_genome
from parity.gffread import Gffread, NoGffreadError


@pytest.fixture(scope="module")
def gffread():
    try:
        return Gffread()
    except NoGffreadError as error:
        pytest.skip(str(error))


def compare(gffread, files, folder, num_transcripts):
    summary = splice(files.fasta, files.gtf, folder / "ours.fa")
    ours = {record.id.split("|")[2]: record.sequence.decode() for record in read_fasta(folder / "ours.fa")}
    theirs = gffread.transcripts(files.fasta, files.gtf, folder / "theirs.fa")

    assert summary.num_transcripts == num_transcripts == len(ours) == len(theirs)
    assert summary.left_out == {}
    assert ours == theirs


@pytest.mark.parametrize("dialect", ["gencode", "ensembl", "refseq"])
def test_small_genome(gffread, tmp_path, dialect):
    files = generate_genome(tmp_path, num_bases=400_000, num_genes=60, num_transcripts=200, dialect=dialect)
    if dialect == "refseq":  # gffread 0.12.7 refuses NCBI's gene lines, which have an empty transcript_id
        kept = [line for line in files.gtf.read_text().splitlines(keepends=True) if "\tgene\t" not in line]
        files.gtf.write_text("".join(kept))

    compare(gffread, files, tmp_path, 200)


@pytest.mark.slow
def test_50_mb_with_10_000_transcripts(gffread, tmp_path):
    files = generate_genome(tmp_path, num_bases=50_000_000, num_genes=3_000, num_transcripts=10_000)

    compare(gffread, files, tmp_path, 10_000)
