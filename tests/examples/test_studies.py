# SPDX-License-Identifier: Apache-2.0
"""The cores of the studies, with functions whose answer is known in place of a model."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data.bed import Interval
from evo2_megatron.data.nucleotides import reverse_complement
from helpers import read_tsv

PNG = b"\x89PNG\r\n"
COPY_CONTEXT = 12


def random_dna(seed: int, length: int) -> bytes:
    return np.random.default_rng(seed).choice(np.frombuffer(b"ACGT", np.uint8), length).tobytes()


def of_known_gene(gene: bytes):
    """Log-likelihood by codon: what a change costs depends on its place in the codon and not on anything else."""
    costs = [5.0] * 3 + [(2.0, 1.5, 0.25)[i % 3] for i in range(3, len(gene))]

    def score(sequences):
        at = sequences[0].index(gene)
        return np.array(
            [-100 - sum(c for c, a, b in zip(costs, gene, s[at : at + len(gene)]) if a != b) for s in sequences]
        )

    return score


@pytest.mark.parametrize("strand", ["+", "-"])
def test_scan_finds_the_planted_costs(study, tmp_path, strand):
    scan = study("mutational_scan")
    gene = b"ATG" + random_dna(1, 54) + b"TAA"
    forward = random_dna(2, 70) + gene + random_dna(3, 40)
    genome = {"c": forward if strand == "+" else reverse_complement(forward)}
    start = 70 if strand == "+" else 40
    where = scan.Gene("c", start, start + len(gene), strand)

    mutations = scan.mutational_scan(of_known_gene(gene), genome, where, tmp_path, flank=10, context=30, num_codons=0)

    assert len(mutations) == 3 * (len(gene) + 20)
    found = {e.kind: (e.num_mutations, e.mean, e.standard_error) for e in scan.effects(mutations)}
    codons = 3 * (len(gene) // 3 - 2)
    assert found == {
        "upstream": (30, 0, 0),
        "start codon": (9, -5, 0),
        "codon base 1": (codons, -2, 0),
        "codon base 2": (codons, -1.5, 0),
        "codon base 3": (codons, -0.25, 0),
        "stop codon": (9, pytest.approx(-1.25), pytest.approx(np.std([2, 1.5, 0.25], ddof=1) / 3**0.5)),
        "downstream": (30, 0, 0),
    }
    rows = read_tsv(tmp_path / "mutational_scan.tsv")
    assert len(rows) == len(mutations) and len(read_tsv(tmp_path / "mutational_scan_classes.tsv")) == 7
    for row in rows:  # positions are the genome's, letters the gene's
        base = genome["c"][int(row["position"])].to_bytes(1, "big")
        assert row["reference"] == (base if strand == "+" else reverse_complement(base)).decode()
    assert (tmp_path / "mutational_scan.png").read_bytes().startswith(PNG)


def test_scan_of_the_first_codons(study, tmp_path):
    scan = study("mutational_scan")
    gene = b"ATG" + random_dna(1, 54) + b"TAA"
    genome = {"c": b"AC" + gene}
    mutations = scan.mutational_scan(
        of_known_gene(gene), genome, scan.Gene("c", 2, 62, "+"), tmp_path, flank=30, context=30, num_codons=4
    )
    assert [mutations[0].offset, mutations[-1].offset] == [-2, 11]  # the contig begins two bases before


def test_gradients_of_both_strands(study, tmp_path, capsys):
    """A scorer for which the first order is all there is: a number for each letter and place, and for some pairs."""
    scan = study("gradient_scan")
    weights = np.random.default_rng(2).normal(size=(90, 4))
    letters = {base: place for place, base in enumerate(b"ACGT")}

    def score(sequences):
        return np.array([sum(weights[at, letters.get(b, 0)] for at, b in enumerate(s)) for s in sequences])

    def first_order(sequence):
        there = np.array([weights[at, letters.get(base, 0)] for at, base in enumerate(sequence)])
        changes = weights[: len(sequence)] - there[:, None]
        return np.stack([0.25 * changes, 0.75 * changes]).astype(np.float32)

    contig = random_dna(3, 40) + b"N" + random_dna(4, 40)
    region = scan.region_of(contig, 10, 70, 15)
    assert region == (10, 70, 0, 81)
    changes = scan.gradient_scan(
        first_order, score, "c", contig, region, tmp_path, both_strands=True, num_checked=200, seed=1
    )
    assert changes.shape == (60, 4) and np.isnan(changes).sum() == 4 and np.isnan(changes[30]).all()
    rows = read_tsv(tmp_path / "gradient_scan.tsv")
    assert len(rows) == 3 * 59 and "Pearson 1.0000" in capsys.readouterr().out
    for row in rows:
        at, delta = int(row["position"]), float(row["delta_log_likelihood"])
        assert chr(contig[at]) == row["reference"] != row["alternative"]
        assert float(row["of_the_base"]) == pytest.approx(delta / 4, abs=1e-5)
        assert delta == pytest.approx(changes[at - 10, "ACGT".index(row["alternative"])], rel=1e-5)
    for row in read_tsv(tmp_path / "gradient_scan_check.tsv"):
        assert float(row["first_order"]) == pytest.approx(float(row["exact"]), rel=1e-4, abs=1e-5)
    assert (tmp_path / "gradient_scan.png").read_bytes().startswith(PNG)
    with pytest.raises(UserError, match="--start 70 --end 82 is not within the contig's 81 bases"):
        scan.region_of(contig, 70, 82, 5)


@pytest.mark.parametrize(
    "gene, message",
    [
        (("c", 0, 10, "+"), "10 bases, which is not a whole"),
        (("c", 0, 99, "+"), "not within"),
        (("d", 0, 9, "+"), "'d'"),
    ],
)
def test_genes_that_are_none(study, gene, message):
    scan = study("mutational_scan")
    with pytest.raises(UserError, match=message):
        scan.window_of({"c": b"A" * 60}, scan.Gene(*gene), 5)


ESSENTIAL, DISPENSABLE = b"ATGAAACCCGGG", b"ATGCCCAAAGGG"
"""Starts of genes that the scorer below knows."""


def minds_short_genes(sequences):
    """-1 nat for every base, and 0.5 more for each that lies behind a stop codon of a gene that matters."""
    results = []
    for sequence in sequences:
        values = np.full(len(sequence), -1.0, np.float32)
        at = sequence.find(ESSENTIAL)
        if at >= 0:
            codons = range(at, at + 150, 3)
            stop = next((i for i in codons if sequence[i : i + 3] in (b"TAA", b"TAG", b"TGA")), at + 150)
            values[stop + 3 : at + 150] -= 0.5
        results.append(values)
    return results


@pytest.fixture
def planted_genes():
    """Six genes of 150 bases without stop codons, every other one essential, on both strands."""
    genome, genes = b"", []
    for number in range(6):
        body = (ESSENTIAL if number % 2 == 0 else DISPENSABLE) + b"GCC" * 45 + b"GCA"
        strand = "+" if number < 3 else "-"
        start = len(genome) + 200
        genome += b"C" * 200 + (body if strand == "+" else reverse_complement(body))
        genes.append(Interval("c", start, start + len(body), f"g{number}", strand))
    return {"c": genome + b"C" * 200}, genes


@pytest.mark.parametrize("score", ["window", "after"])
def test_essential_genes_come_first(study, tmp_path, planted_genes, score):
    essentiality = study("essentiality")
    genome, genes = planted_genes
    labels = {gene.name: number % 2 == 0 for number, gene in enumerate(genes) if number < 5}

    ranked, area = essentiality.essentiality(
        minds_short_genes, genome, genes, tmp_path, window=300, score=score, labels=labels
    )

    assert {knockout.gene.name for knockout in ranked[:3]} == {"g0", "g2", "g4"} and area == 1.0
    # the insert's 13 bases cost 1 nat each; behind its first codon 135 bases count, 10 of them its own
    for knockout in ranked[:3]:
        assert (knockout.delta, knockout.delta_after) == pytest.approx((-13 - 0.5 * 135, -0.5 * 125))
    for knockout in ranked[3:]:
        assert (knockout.delta, knockout.delta_after) == pytest.approx((-13, 0))
    rows = read_tsv(tmp_path / "essentiality.tsv")
    assert [row["essential"] for row in rows] == ["1"] * 3 + [{"g5": ""}.get(row["gene"], "0") for row in rows[3:]]
    assert (tmp_path / "essentiality.png").read_bytes().startswith(PNG)


def test_windows_of_genes(study, planted_genes):
    """On the gene's strand, of the length asked for where the contig has it, the gene's start where it is said."""
    essentiality = study("essentiality")
    genome, genes = planted_genes
    for length in (100, 300, 1000, 10_000):
        for gene in genes:
            window, at = essentiality.window_of(genome, gene, length)
            assert len(window) == min(length, len(genome["c"]))
            assert window[at : at + 3] == b"ATG" and at + 24 < len(window)


def test_labels(study, planted_genes, tmp_path):
    essentiality = study("essentiality")
    path = tmp_path / "labels.tsv"
    path.write_text("g0\t1\nother\t0\n")
    with pytest.raises(UserError, match="annotated genes with 1 and with 0|genes of the annotation with 1 and with 0"):
        essentiality.read_labels(path, planted_genes[1])
    path.write_text("g0\tyes\n")
    with pytest.raises(UserError, match=r"labels\.tsv, line 1: give the gene's name and 1"):
        essentiality.read_labels(path, planted_genes[1])
    path.write_text("g0\t1\n\ng1\t0\n\n")
    assert essentiality.read_labels(path, planted_genes[1]) == {"g0": True, "g1": False}


def copying(window: int):
    """Predicts what came after the last bases when they stood before, no more than ``window`` bases ago."""

    def distributions(sequences):
        results = []
        for sequence in sequences:
            rows = np.full((len(sequence), 4), -math.log(4), np.float32)
            for at in range(COPY_CONTEXT, len(sequence)):
                first = max(0, at - window)
                seen = sequence.rfind(sequence[at - COPY_CONTEXT : at], first, at - 1)
                if seen >= 0:
                    rows[at] = math.log(0.01)
                    rows[at, b"ACGT".index(sequence[seen + COPY_CONTEXT])] = math.log(0.97)
            results.append(rows)
        return results

    def log_probs(sequences):
        letters = [[b"ACGT".index(base) for base in sequence] for sequence in sequences]
        return [rows[range(len(rows)), of] for rows, of in zip(distributions(sequences), letters)]

    return log_probs, distributions


@pytest.mark.parametrize("measure", ["likelihood", "jacobian"])
def test_recall_ends_with_the_window(study, tmp_path, measure):
    needle = study("needle")
    function = copying(window=400)[measure == "jacobian"]
    lengths, depths = (200, 400, 900), (0.0, 0.5, 1.0)
    cells = needle.needle(
        function, tmp_path, measure=measure, lengths=lengths, depths=depths, needle_length=40, repeats=2
    )

    assert [(cell.depth, cell.length) for cell in cells] == [(d, n) for d in depths for n in lengths]
    for cell in cells:
        # half a needle is enough to be recognized
        if cell.distance + 40 < 400:
            assert cell.recall > (0.97 * math.log(4 * 0.97) if measure == "likelihood" else 3)
        elif cell.distance > 400:
            assert abs(cell.recall) < 0.01
    assert {cell.distance > 400 for cell in cells} == {True, False}
    rows = read_tsv(tmp_path / "needle.tsv")
    assert [float(row[f"recall_{measure}"]) for row in rows] == pytest.approx([c.recall for c in cells], rel=1e-4)
    assert (tmp_path / "needle.png").read_bytes().startswith(PNG)


def test_haystacks(study):
    needle = study("needle")
    for depth in (0, 0.3, 1):
        stack = needle.haystack(np.random.default_rng(1), 100, depth, 20)
        assert len(stack.sequence) == 100 and stack.query_at == 80 and stack.needle_at == round(60 * depth)
        assert stack.sequence[stack.needle_at :][:20] == stack.sequence[-20:]
        other = stack.with_needle(b"A" * 20)
        assert other[stack.needle_at :][:20] == b"A" * 20 and other[80:] == stack.sequence[80:]


def planted_exons(study, num_contigs: int):
    """Exons of 60 bases G and C, introns of 90 bases A and T, and what is between genes like introns; a transcript on
    each strand of each contig."""
    Transcript = study("annotation").Transcript
    genome, transcripts, rng = {}, [], np.random.default_rng(5)
    for number in range(num_contigs):
        contig, exonic = f"c{number}", np.zeros(1200, dtype=bool)
        for t, strand in enumerate((b"+", b"-")):
            starts = [100 + 600 * t + 150 * exon for exon in range(3)]
            ends = [start + 60 for start in starts]
            transcripts.append(Transcript(b"g", b"%d.%d" % (number, t), contig.encode(), strand, 1, starts, ends))
            for start, end in zip(starts, ends):
                exonic[start:end] = True
        letters = np.where(exonic[:, None], list(b"GC"), list(b"AT"))
        genome[contig] = letters[np.arange(1200), rng.integers(2, size=1200)].astype(np.uint8).tobytes()
    return genome, transcripts


def share_of_gc(sequences):
    """Hidden states that know: share of G and C in the last ten bases; and one that does not."""
    for sequence in sequences:
        gc = np.isin(np.frombuffer(sequence, np.uint8), list(b"GC")).astype(np.float32)
        yield np.stack([np.convolve(gc, np.ones(10) / 10)[: len(gc)], np.sin(np.arange(len(gc)))], axis=1)


def know_nothing(sequences):
    rng = np.random.default_rng(0)
    for sequence in sequences:
        yield rng.normal(size=(len(sequence), 2))


@pytest.mark.parametrize("both_strands", [True, False])
def test_exons_are_found_where_hidden_states_know_them(study, tmp_path, both_strands):
    exons = study("exon_classifier")
    genome, transcripts = planted_exons(study, 4)
    settings = {"test_contigs": ["c2", "c3"], "window": 200, "both_strands": both_strands}

    measured = exons.exon_classifier(share_of_gc, genome, transcripts, tmp_path, **settings)
    unknown = exons.exon_classifier(know_nothing, genome, transcripts, tmp_path / "unknown", **settings)

    # two transcripts of 360 bases with three exons of 60 each
    assert [m[:3] for m in measured] == [("c2", 720, 360), ("c3", 720, 360), ("all", 1440, 720)]
    assert measured[-1].auroc > (0.99 if both_strands else 0.93)
    assert abs(unknown[-1].auroc - 0.5) < 0.06
    rates = [tuple(map(float, row.values())) for row in read_tsv(tmp_path / "exon_classifier_roc.tsv")]
    assert (rates[0], rates[-1]) == ((0, 0), (1, 1)) and rates == sorted(rates)
    assert (tmp_path / "exon_classifier.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("window", [7, 64, 1200, 5000])
def test_each_base_counts_once_on_both_strands(study, window):
    exons = study("exon_classifier")
    sequence, letters = random_dna(4, 1200), np.frombuffer(b"ACGT", np.uint8)

    def one_hot(sequences):
        return [(np.frombuffer(s, np.uint8)[:, None] == letters).astype(np.float32) for s in sequences]

    labels = np.array([1, 0, -1], np.int8)[np.random.default_rng(1).integers(3, size=1200)]
    parts = list(exons.embed_bases(one_hot, sequence, labels, window=window, both_strands=True))
    features, found = (np.concatenate(values) for values in zip(*parts))
    np.testing.assert_array_equal(found, labels[labels != -1])
    (own,) = one_hot([sequence])
    np.testing.assert_array_equal(features[:, :4], own[labels != -1])
    np.testing.assert_array_equal(features[:, 4:], own[labels != -1][:, ::-1])  # of the partner: T G C A


def test_labels_of_bases(study):
    exons = study("exon_classifier")
    Transcript = study("annotation").Transcript
    both = [Transcript(b"g", b"a", b"c", b"+", 1, [2, 8], [4, 10]), Transcript(b"g", b"b", b"c", b"-", 1, [3], [6])]
    for all_bases, outside in ((False, -1), (True, 0)):
        labels = exons.label_bases(*exons.spans(both), "c", b"AAAAAAANAAAA", all_bases=all_bases)
        assert labels.tolist() == [outside] * 2 + [1, 1, 1, 1, 0, -1, 1, 1] + [outside] * 2


def test_contigs_without_introns(study, tmp_path):
    exons = study("exon_classifier")
    genome, transcripts = planted_exons(study, 2)
    with pytest.raises(UserError, match="the contigs to learn from: c0"):
        exons.exon_classifier(share_of_gc, genome, transcripts[2:], tmp_path, test_contigs=["c1"], window=200)


def test_too_few_bases_to_learn_from(study, tmp_path):
    exons = study("exon_classifier")
    genome, transcripts = planted_exons(study, 2)
    settings = {"test_contigs": ["c1"], "window": 200, "max_train_bases": 1}
    with pytest.raises(UserError, match="--max-train-bases 1: "):
        exons.exon_classifier(share_of_gc, genome, transcripts, tmp_path / "few", **settings)
    assert not (tmp_path / "few").exists()


def test_genes(study, tmp_path):
    annotation = study("annotation")
    bed, gtf = tmp_path / "a.bed", tmp_path / "a.gtf"
    bed.write_text("track x\nc\t1\t5\ta\t0\t-\nc\t7\t9\tb\n")
    assert annotation.read_genes(bed) == [("c", 1, 5, "a", "-"), ("c", 7, 9, "b", "+")]
    line = 'c\tx\texon\t{}\t{}\t.\t-\t.\tgene_id "{}"; transcript_id "{}";\n'
    gtf.write_text(line.format(2, 5, "a", "a1") + line.format(8, 9, "a", "a1") + line.format(3, 4, "a", "a2"))
    assert annotation.read_genes(gtf) == [("c", 1, 9, "a", "-")]
