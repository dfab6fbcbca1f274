# SPDX-License-Identifier: Apache-2.0
"""All substitutions in intervals are scored as the same lines of a VCF file are; tracks hold their means."""

import csv
import random

import pytest

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import UserError
from evo2_megatron.data.vcf import read_vcf

CHANCE = random.Random(6)
CONTIGS = {"z": "".join(CHANCE.choices("ACGTacgt", k=300)), "a": "".join(CHANCE.choices("ACGT", k=80))}
CONTIGS["z"] = CONTIGS["z"][:103] + "NN" + CONTIGS["z"][105:]


@pytest.fixture(scope="module")
def inputs(megatron, tmp_path_factory):
    """A FASTA file and a checkpoint."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "g.fa").write_text("".join(f">{name}\n{bases}\n" for name, bases in CONTIGS.items()))
    return folder / "g.fa", write_tiny_checkpoint(folder / "checkpoint")


def score(source, inputs, folder, *formats, **settings):
    from evo2_megatron.tasks.scoring.variants import VariantSettings, score_variants

    settings = VariantSettings(window_length=64, both_strands=True, **settings)
    score_variants(source, *inputs, output_dir=folder, formats=formats, settings=settings)


def rows(folder):
    with (folder / "variants.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_as_a_vcf_file_and_as_tracks(inputs, tmp_path, caplog):
    import pybigtools

    from evo2_megatron.tasks.scoring.variant_sources import Saturation, VcfFile

    bed = tmp_path / "in.bed"
    bed.write_text("a\t70\t80\nz\t100\t107\nz\t0\t3\nz\t105\t109\n")
    score(Saturation(bed), inputs, tmp_path / "all", "tsv", "vcf", "bedgraph", "bigwig", window_step=16)
    assert "2 bases of" in caplog.text and "are not A, C, G or T" in caplog.text
    wanted = [("z", at) for at in (*range(3), *range(100, 103), *range(105, 109))]
    wanted += [("a", at) for at in range(70, 80)]
    found = rows(tmp_path / "all")
    assert [(row["chrom"], int(row["pos"]) - 1, row["status"]) for row in found] == [
        (*place, "scored") for place in wanted for _ in range(3)
    ]

    vcf = tmp_path / "again.vcf"
    (tmp_path / "all" / "variants.vcf").rename(vcf)
    assert [(r.contig.decode(), r.position - 1) for r in read_vcf(vcf)] == wanted
    score(VcfFile(vcf), inputs, tmp_path / "again", "tsv", "vcf", window_step=16)
    assert rows(tmp_path / "again") == found
    assert (tmp_path / "again" / "variants.vcf").read_bytes() == vcf.read_bytes()

    lines = (tmp_path / "all" / "delta.bedgraph").read_text().splitlines()[1:]
    intervals = [(name, int(start), int(end), float(value)) for name, start, end, value in map(str.split, lines)]
    assert [interval[:3] for interval in intervals] == [(name, at, at + 1) for name, at in wanted]
    for number, interval in enumerate(intervals):
        deltas = [float(row["delta"]) for row in found[3 * number : 3 * number + 3]]
        assert interval[3] == pytest.approx(sum(deltas) / 3, rel=1e-6)
    bigwig = pybigtools.open(str(tmp_path / "all" / "delta.bigwig"))
    assert bigwig.chroms() == {name: len(bases) for name, bases in CONTIGS.items()}
    for name, start, end, value in intervals:
        assert list(bigwig.records(name, start, end)) == [(start, end, pytest.approx(value, rel=1e-6))]


@pytest.mark.parametrize(
    "line, message",
    [
        ("chrz\t0\t3\n", "in.bed names contig 'chrz', which the FASTA file does not have"),
        ("z\t298\t301\n", "'z' ends at 301, beyond the 300 bases of z"),
        ("z 1 2\n", "in.bed, line 1: BED has contig, start and end between tabs"),
    ],
)
def test_intervals_of_another_genome(inputs, tmp_path, line, message):
    from evo2_megatron.tasks.scoring.variant_sources import Saturation

    bed = tmp_path / "in.bed"
    bed.write_text(line)
    with pytest.raises(UserError, match=message):
        score(Saturation(bed), inputs, tmp_path / "out", "tsv")
    assert not (tmp_path / "out").exists()


def test_intervals_without_bases(inputs, tmp_path):
    from evo2_megatron.tasks.scoring.variant_sources import Saturation

    bed = tmp_path / "in.bed"
    bed.write_text("z\t103\t105\n")
    score(Saturation(bed), inputs, tmp_path / "out", "tsv", "bedgraph")
    assert rows(tmp_path / "out") == []
    assert (tmp_path / "out" / "delta.bedgraph").read_text() == 'track type=bedGraph name="delta"\n'
    with pytest.raises(UserError, match="delta.bigwig: no base has a value, and a bigWig file cannot be empty"):
        score(Saturation(bed), inputs, tmp_path / "out", "bigwig")
