# SPDX-License-Identifier: Apache-2.0
"""In-silico mutational scan of a gene: every base replaced by the three others, and what the model thinks of it.

The score of a mutation is the log-likelihood of the mutated window minus that of the window as it is, in nat: 0 means
that the model does not mind, and the further below 0, the less likely the mutant is. A model that knows genes minds
changes of the start codon most, and changes of a codon's third base, which often leave the amino acid, least.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import harness
import numpy as np

from evo2_megatron.cli import groups
from evo2_megatron.config import UserError
from evo2_megatron.data.nucleotides import reverse_complement

NAME = "mutational_scan.py"
CLASSES = ("upstream", "start codon", "codon base 1", "codon base 2", "codon base 3", "stop codon", "downstream")
COLORS = ("0.6", "C3", "C0", "C2", "C1", "C4", "0.6")


class Gene(NamedTuple):
    """A coding sequence from its start codon to its stop codon, 0-based, end excluded, on the forward strand."""

    contig: str
    start: int
    end: int
    strand: str


class Mutation(NamedTuple):
    """One base replaced; letters and offset are those of the gene's strand."""

    offset: int
    """Bases from the first of the start codon; below 0: upstream."""
    kind: str
    """One of ``CLASSES``."""
    reference: str
    alternative: str
    delta: float
    """Log-likelihood of the mutant minus that of the window, nat."""


def kind_of(offset: int, gene_length: int) -> str:
    """Class of a base, by its offset from the start codon."""
    if offset < 0:
        return "upstream"
    if offset >= gene_length:
        return "downstream"
    if offset < 3:
        return "start codon"
    return "stop codon" if offset >= gene_length - 3 else f"codon base {offset % 3 + 1}"


def scan(
    score: harness.Score, window: bytes, *, gene_at: int, gene_length: int, offsets: Sequence[int]
) -> list[Mutation]:
    """Score all single-base replacements.

    Args:
        score: Called once, with the window first and then every mutant.
        window: Bases on the gene's strand, upper case.
        gene_at: Position of the start codon in the window.
        gene_length: Bases, stop codon included.
        offsets: Of the bases to replace, from the start codon. A base that is not A, C, G or T is left out.
    """
    changes = [
        (offset, base)
        for offset in offsets
        for base in harness.BASES
        if (here := chr(window[gene_at + offset])) in harness.BASES and base != here
    ]
    mutants = [harness.substituted(window, gene_at + offset, ord(base)) for offset, base in changes]
    scores = score([window, *mutants])
    return [
        Mutation(offset, kind_of(offset, gene_length), chr(window[gene_at + offset]), base, float(value - scores[0]))
        for (offset, base), value in zip(changes, scores[1:])
    ]


class Effect(NamedTuple):
    """Mutations of one class together."""

    kind: str
    num_mutations: int
    mean: float
    """Of their deltas, nat."""
    standard_error: float
    """Of the mean, over positions (the three changes of a base are averaged first); nan for a single one."""


def effects(mutations: Sequence[Mutation]) -> list[Effect]:
    """Mean effect of each class that occurs, in the order of ``CLASSES``."""
    result = []
    for kind in CLASSES:
        of_kind = [mutation for mutation in mutations if mutation.kind == kind]
        if of_kind:
            _, means = by_offset(of_kind)
            error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else float("nan")
            result.append(Effect(kind, len(of_kind), float(np.mean([m.delta for m in of_kind])), float(error)))
    return result


def by_offset(mutations: Sequence[Mutation]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets, ascending, and the mean delta of the changes of each."""
    offsets, where = np.unique([mutation.offset for mutation in mutations], return_inverse=True)
    deltas = np.array([mutation.delta for mutation in mutations])
    return offsets, np.bincount(where, deltas) / np.bincount(where)


def draw(mutations: Sequence[Mutation], title: str, path: Path) -> None:
    """Mean effect by position, and by class."""
    plt = harness.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", width_ratios=(3, 1))
    for kind, color in zip(CLASSES, COLORS):
        of_kind = [mutation for mutation in mutations if mutation.kind == kind]
        if of_kind:
            label = "outside the gene" if kind == "upstream" else None if kind == "downstream" else kind
            left.bar(*by_offset(of_kind), width=1.0, color=color, label=label)
    left.set_xlabel("position, bases from the first of the start codon")
    left.set_ylabel("mean change of log-likelihood, nat")
    left.set_title(title)
    # outside, where no bar can be under it
    left.legend(frameon=False, fontsize="small", ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    shown = effects(mutations)
    errors = np.nan_to_num([effect.standard_error for effect in shown])
    right.barh(
        range(len(shown)),
        [effect.mean for effect in shown],
        xerr=errors,
        color=[COLORS[CLASSES.index(effect.kind)] for effect in shown],
    )
    right.set_yticks(range(len(shown)), [f"{effect.kind} ({effect.num_mutations})" for effect in shown])
    right.invert_yaxis()
    right.set_xlabel("mean change, nat\n(line: standard error)")
    right.set_title("by place (mutations)")
    for axes in (left, right):
        harness.tidy(axes)
        (axes.axhline if axes is left else axes.axvline)(0, color="black", linewidth=0.8)
    harness.save_figure(figure, path)


def window_of(genome: dict[str, bytes], gene: Gene, context: int) -> tuple[bytes, int]:
    """The gene with bases around it, on its strand, and where in them it starts.

    Raises:
        UserError: The gene is not within a contig, or not a whole number of codons from two on.
    """
    contig = harness.contig_of(genome, gene.contig, "--contig")
    if not 0 <= gene.start < gene.end <= len(contig):
        raise UserError(
            f"--start {gene.start} --end {gene.end} is not within the {len(contig)} bases of {gene.contig}"
        )
    if (gene.end - gene.start) % 3 or gene.end - gene.start < 6:
        raise UserError(
            f"--start {gene.start} --end {gene.end} are {gene.end - gene.start} bases, which is not a whole number of "
            "codons from 2 on; give the coding sequence from start to stop codon, 0-based, end excluded"
        )
    first, last = max(gene.start - context, 0), min(gene.end + context, len(contig))
    window = contig[first:last]
    return (window, gene.start - first) if gene.strand == "+" else (reverse_complement(window), last - gene.end)


def mutational_scan(
    score: harness.Score,
    genome: dict[str, bytes],
    gene: Gene,
    output_dir: Path,
    *,
    flank: int,
    context: int,
    num_codons: int,
) -> list[Mutation]:
    """Scan a gene and write ``mutational_scan.tsv``, ``mutational_scan_classes.tsv`` and ``mutational_scan.png``.

    Args:
        score: Log-likelihoods of sequences.
        genome: Contigs by name.
        gene: What to scan.
        output_dir: Where to write.
        flank: Bases on each side that are mutated too; after the gene only if all of it is scanned.
        context: Bases on each side that the model sees.
        num_codons: How many to scan, from the start codon; 0: all.

    Raises:
        UserError: See ``window_of``.
    """
    window, at = window_of(genome, gene, max(context, flank))
    length = gene.end - gene.start
    end = 3 * num_codons if 0 < 3 * num_codons < length else length + flank
    offsets = range(-min(flank, at), min(end, len(window) - at))
    mutations = scan(score, window, gene_at=at, gene_length=length, offsets=offsets)
    forward = gene.strand == "+"
    places = [gene.start + m.offset if forward else gene.end - 1 - m.offset for m in mutations]
    harness.write_table(
        output_dir / "mutational_scan.tsv",
        ("contig", "position", "strand", "offset", "class", "reference", "alternative", "delta_log_likelihood"),
        [(gene.contig, place, gene.strand, *mutation) for place, mutation in zip(places, mutations)],
    )
    harness.write_table(
        output_dir / "mutational_scan_classes.tsv",
        ("class", "num_mutations", "mean_delta_log_likelihood", "standard_error"),
        effects(mutations),
    )
    title = f"{gene.contig}:{gene.start}-{gene.end} ({gene.strand}), single-base replacements"
    draw(mutations, title, output_dir / "mutational_scan.png")
    return mutations


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = harness.parser(NAME, __doc__)
    parser.add_argument("--fasta", type=Path, required=True, metavar="FILE", help="genome, plain or gzip")
    parser.add_argument("--contig", required=True, metavar="NAME", help="where the gene is")
    parser.add_argument("--start", type=int, required=True, metavar="N", help="first base of the gene, 0-based")
    parser.add_argument("--end", type=int, required=True, metavar="N", help="its end, excluded, after the stop codon")
    parser.add_argument("--strand", choices=("+", "-"), default="+", help="of the gene (default: +)")
    parser.add_argument(
        "--num-codons", type=groups.positive_int, metavar="N", help="scan only the first N codons (default: all)"
    )
    parser.add_argument(
        "--flank",
        type=groups.positive_int,
        default=30,
        metavar="N",
        help="bases on each side of the gene to mutate as well (default: 30)",
    )
    parser.add_argument(
        "--context",
        type=groups.positive_int,
        default=500,
        metavar="N",
        help="bases on each side of the gene that the model sees (default: 500)",
    )
    return parser


def main() -> None:
    """Entry point."""
    args = build_parser().parse_args()

    def work() -> None:
        harness.check_output_dir(args.output_dir)
        genome, gene = harness.read_genome(args.fasta), Gene(args.contig, args.start, args.end, args.strand)
        window, _ = window_of(genome, gene, max(args.context, args.flank))
        settings = {"longest": len(window), "max_batch_tokens": args.max_batch_tokens}
        with harness.open_model(args.ckpt_dir, **settings) as model:
            mutational_scan(
                model.log_likelihoods,
                genome,
                gene,
                args.output_dir,
                flank=args.flank,
                context=args.context,
                num_codons=args.num_codons or 0,
            )

    harness.run(NAME, work)


if __name__ == "__main__":
    main()
