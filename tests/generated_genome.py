# SPDX-License-Identifier: Apache-2.0
"""A made-up genome with genes, as FASTA and as the GTF that GENCODE, Ensembl or NCBI would write."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_LINE_BASES = 60
# what a random byte stands for: bases, soft-masked ones, and here and there an N
_LETTERS = bytes(b"ACGTACGTACGTacgt"[i % 16] if i else ord("N") for i in range(256))


class Gene(NamedTuple):
    """Everything 1-based, end included."""

    contig: str
    name: str
    strand: str
    transcripts: list[list[tuple[int, int]]]
    """Exons of each transcript on the forward strand, in ascending order."""


class GeneratedGenome(NamedTuple):
    """Two files."""

    fasta: Path
    gtf: Path


def generate_genome(
    folder: Path,
    *,
    num_bases: int,
    num_genes: int,
    num_transcripts: int,
    num_contigs: int = 5,
    dialect: str = "gencode",
    seed: int = 1,
) -> GeneratedGenome:
    """Write ``genome.fa`` and ``genes.gtf``; the same arguments give the same files.

    Args:
        folder: Exists.
        num_bases: Of all contigs together, about.
        num_genes: Of all contigs together; each gets ``num_bases / num_genes`` bases of room.
        num_transcripts: Of all genes together; every gene has at least one.
        num_contigs: Of the same length.
        dialect: ``gencode``, ``ensembl`` or ``refseq``.
        seed: Of everything random.
    """
    rng = random.Random(seed)
    files = GeneratedGenome(folder / "genome.fa", folder / "genes.gtf")
    length = num_bases // num_contigs
    with files.fasta.open("wb") as fasta:
        for contig in range(1, num_contigs + 1):
            fasta.write(b">chr%d made up\n" % contig)
            for start in range(0, length, _LINE_BASES << 12):
                bases = rng.randbytes(min(_LINE_BASES << 12, length - start)).translate(_LETTERS)
                for at in range(0, len(bases), _LINE_BASES):
                    fasta.write(bases[at : at + _LINE_BASES] + b"\n")
    lines = {"gencode": _gencode, "ensembl": _ensembl, "refseq": _refseq}[dialect]
    with files.gtf.open("w") as gtf:
        gtf.write("##description: made up\n#!genome-build none\n")
        for gene in _genes(rng, length, num_contigs, num_genes, num_transcripts):
            gtf.writelines(lines(gene))
    return files


def _genes(
    rng: random.Random, contig_length: int, num_contigs: int, num_genes: int, num_transcripts: int
) -> Iterator[Gene]:
    room = contig_length * num_contigs // num_genes
    for number in range(num_genes):
        contig, start = divmod(number * room, contig_length)
        if start + room > contig_length:
            start = contig_length - room
        num = num_transcripts * (number + 1) // num_genes - num_transcripts * number // num_genes
        borders = sorted(rng.sample(range(start + 1, start + room), min(2 * rng.randint(3, 15), room // 4 * 2)))
        exons = [(a, min(b, a + 350)) for a, b in zip(borders[::2], borders[1::2])]
        transcripts = []
        for _ in range(num):
            first = rng.randrange((len(exons) + 1) // 2)
            kept = [exon for exon in exons[first:] if rng.random() < 0.9] or exons[-1:]
            transcripts.append(kept)
        yield Gene(f"chr{contig + 1}", f"{number + 1:06d}", rng.choice("+-"), transcripts)


def _numbered(gene: Gene, exons: list[tuple[int, int]]) -> list[tuple[int, tuple[int, int]]]:
    """Exons from 5' to 3' with their numbers, as all three consortia list them."""
    return list(enumerate(exons if gene.strand == "+" else exons[::-1], 1))


def _lines(gene: Gene, source: str, attributes: list[tuple[str, tuple[int, int], str]]) -> list[str]:
    return [
        f"{gene.contig}\t{source}\t{feature}\t{start}\t{end}\t.\t{gene.strand}\t.\t{text}\n"
        for feature, (start, end), text in attributes
    ]


def _extent(gene: Gene) -> tuple[int, int]:
    exons = [exon for transcript in gene.transcripts for exon in transcript]
    return min(start for start, _ in exons), max(end for _, end in exons)


def _gencode(gene: Gene) -> list[str]:
    shared = f'gene_type "protein_coding"; gene_name "GENE{gene.name}";'
    gene_id = f'gene_id "ENSG00000{gene.name}.2";'
    rows = [("gene", _extent(gene), f"{gene_id} {shared} level 2;")]
    for number, exons in enumerate(gene.transcripts, 1):
        name = f"ENST00{gene.name}{number:03d}.1"
        ids = f'{gene_id} transcript_id "{name}"; {shared}'
        ids += f' transcript_type "protein_coding"; transcript_name "GENE{gene.name}-{200 + number}";'
        tail = 'level 2; transcript_support_level "1"; tag "basic";'
        rows.append(("transcript", (exons[0][0], exons[-1][1]), f"{ids} {tail}"))
        rows += [
            ("exon", exon, f'{ids} exon_number {n}; exon_id "ENSE{gene.name}{n:03d}.1"; {tail}')
            for n, exon in _numbered(gene, exons)
        ]
    return _lines(gene, "HAVANA", rows)


def _ensembl(gene: Gene) -> list[str]:
    shared = 'gene_source "havana"; gene_biotype "protein_coding";'
    gene_id = f'gene_id "ENSG00000{gene.name}"; gene_version "2";'
    rows = [("gene", _extent(gene), f"{gene_id} {shared}")]
    for number, exons in enumerate(gene.transcripts, 1):
        ids = f'{gene_id} transcript_id "ENST00{gene.name}{number:03d}"; transcript_version "1";'
        rows.append(("transcript", (exons[0][0], exons[-1][1]), f"{ids} {shared}"))
        for n, exon in _numbered(gene, exons):
            rows.append(("exon", exon, f'{ids} exon_number "{n}"; {shared} exon_id "ENSE{gene.name}{n:03d}";'))
            rows.append(("CDS", exon, f'{ids} exon_number "{n}"; {shared} protein_id "ENSP{gene.name}";'))
    return _lines(gene, "havana", rows)


def _refseq(gene: Gene) -> list[str]:
    gene_id = f'gene_id "LOC{gene.name}";'
    shared = f'db_xref "GeneID:{gene.name}";'
    rows = [("gene", _extent(gene), f'{gene_id} transcript_id ""; {shared} gbkey "Gene"; gene_biotype "lncRNA"; ')]
    for number, exons in enumerate(gene.transcripts, 1):
        ids = f'{gene_id} transcript_id "XM_{gene.name}{number:03d}.1"; {shared}'
        tail = 'gbkey "mRNA"; model_evidence "100% coverage; 3 ESTs"; product "kinase; variant X1";'
        rows.append(("transcript", (exons[0][0], exons[-1][1]), f'{ids} {tail} transcript_biotype "mRNA"; '))
        rows += [
            ("exon", exon, f'{ids} {tail} transcript_biotype "mRNA"; exon_number "{n}"; ')
            for n, exon in _numbered(gene, exons)
        ]
    return _lines(gene, "Gnomon", rows)
