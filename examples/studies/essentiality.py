# SPDX-License-Identifier: Apache-2.0
"""Gene essentiality from premature stop codons: what does the model think of a genome whose gene is cut short?

Stop codons in several frames are inserted some bases after each gene's start. The score is the log-likelihood of the
changed window minus that of the window as it is, in nat. The lower, the more essential the model takes the gene to be.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import harness
import numpy as np
from annotation import read_genes

from evo2_megatron.cli import groups
from evo2_megatron.config import UserError
from evo2_megatron.data.bed import Interval, check_within
from evo2_megatron.data.nucleotides import reverse_complement

NAME = "essentiality.py"
STOP_CODONS = "TAATAATAAGTGA"
"""A stop codon in each of two frames at least, whatever the bases around: TAA in the first, TGA in the second."""
OFFSET = 12


class Knockout(NamedTuple):
    """What stop codons in one gene do, in nat."""

    gene: Interval
    delta: float
    """Log-likelihood of the window with the insert minus that without."""
    delta_after: float
    """The same for the bases after the insert alone: without what the insert itself costs, which is about the same for
    all genes."""


def window_of(genome: Mapping[str, bytes], gene: Interval, length: int) -> tuple[bytes, int]:
    """Up to ``length`` bases around a gene, on its strand, and where in them the gene starts.

    The gene is in the middle; at the end of a contig the window is shifted, and of a gene that is longer than half of
    the window the start is kept.
    """
    contig = genome[gene.contig]
    if gene.strand == "-":
        contig = reverse_complement(contig)
    start = gene.start if gene.strand == "+" else len(contig) - gene.end
    middle = start + min(gene.end - gene.start, length // 2) // 2
    first = max(0, min(middle - length // 2, len(contig) - length))
    return contig[first : first + length], start - first


def knock_out(
    log_probs: harness.LogProbs,
    genome: Mapping[str, bytes],
    genes: Sequence[Interval],
    *,
    window: int,
    insert: str = STOP_CODONS,
    offset: int = OFFSET,
) -> list[Knockout]:
    """Insert stop codons into each gene.

    Args:
        log_probs: Scores bases.
        genome: Contigs by name, upper case.
        genes: On its contigs, each longer than ``offset``.
        window: Bases that the model sees, without the insert.
        insert: What to insert, on the gene's strand.
        offset: Bases of the gene before it, the start codon included.
    """
    knockouts = []
    for gene in genes:
        before, at = window_of(genome, gene, window)
        cut = at + offset
        after = before[:cut] + insert.encode() + before[cut:]
        old, new = (values.astype(np.float64) for values in log_probs([before, after]))
        tail = float(new[cut + len(insert) :].sum() - old[cut:].sum())
        knockouts.append(Knockout(gene, float(new.sum() - old.sum()), tail))
    return knockouts


def auroc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Probability that an essential gene has a lower score than one that is not; ties count half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, -np.asarray(scores)))


def read_labels(path: Path, genes: Sequence[Interval]) -> dict[str, bool]:
    """Lines of name and 1 (essential) or 0 between tabs.

    Raises:
        UserError: No such file; a line that is none; or not both kinds among the genes.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"cannot read --labels {path}: {reason}") from None
    labels = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, tab, label = line.rstrip().partition("\t")
        if not tab or label not in ("0", "1"):
            raise UserError(f"{path}, line {number}: give the gene's name and 1 (essential) or 0 between tabs")
        labels[name] = label == "1"
    known = {gene.name for gene in genes}
    found = {name: label for name, label in labels.items() if name in known}
    if set(found.values()) != {True, False}:
        raise UserError(
            f"--labels {path} needs genes of the annotation with 1 and with 0; it has {len(found)} of them"
        )
    return found


def essentiality(
    log_probs: harness.LogProbs,
    genome: Mapping[str, bytes],
    genes: Sequence[Interval],
    output_dir: Path,
    *,
    window: int,
    insert: str = STOP_CODONS,
    offset: int = OFFSET,
    score: str = "window",
    labels: Mapping[str, bool] | None = None,
) -> tuple[list[Knockout], float | None]:
    """Rank genes, most essential first, and write ``essentiality.tsv`` and ``essentiality.png``.

    Args:
        log_probs, genome, genes, window, insert, offset: As for ``knock_out``.
        output_dir: Where to write.
        score: ``window`` ranks by ``delta``, ``after`` by ``delta_after``.
        labels: Whether a gene is essential, for those of which it is known.

    Returns:
        Genes in order, and AUROC of those with labels, None without.
    """
    value = (lambda k: k.delta) if score == "window" else (lambda k: k.delta_after)
    found = knock_out(log_probs, genome, genes, window=window, insert=insert, offset=offset)
    ranked = sorted(found, key=value)
    area = None
    if labels:
        known = [k for k in ranked if k.gene.name in labels]
        area = auroc([value(k) for k in known], [labels[k.gene.name] for k in known])
    columns = ("rank", "gene", "contig", "start", "end", "strand", "delta_log_likelihood", "delta_after_insert")
    rows = [
        (rank, k.gene.name, k.gene.contig, k.gene.start, k.gene.end, k.gene.strand, k.delta, k.delta_after)
        + ((int(labels[k.gene.name]) if k.gene.name in labels else "",) if labels else ())
        for rank, k in enumerate(ranked, 1)
    ]
    harness.write_table(output_dir / "essentiality.tsv", columns + (("essential",) if labels else ()), rows)
    draw([(k.gene.name, value(k)) for k in ranked], labels or {}, area, score, output_dir / "essentiality.png")
    return ranked, area


def draw(ranked: Sequence[tuple[str, float]], labels: Mapping[str, bool], area: float | None, score: str, path: Path):
    """Scores in order; with labels, coloured by them."""
    plt = harness.pyplot()
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    ranks = np.arange(1, len(ranked) + 1)
    values = np.array([value for _, value in ranked])
    kinds = np.array([{True: 1, False: 0}.get(labels.get(name), -1) for name, _ in ranked])
    for kind, color, label in ((-1, "0.6", "not labelled"), (0, "C0", "not essential"), (1, "C3", "essential")):
        if (kinds == kind).any():
            axes.scatter(
                ranks[kinds == kind], values[kinds == kind], s=14, color=color, label=label if labels else None
            )
    if len(ranked) <= 40:
        axes.set_xticks(ranks, [name for name, _ in ranked], rotation=90, fontsize=7)
        axes.set_xlabel("gene, most essential first")
    else:
        axes.set_xlabel("rank of the gene, most essential first")
    axes.set_ylabel("change of log-likelihood, nat\n" + ("whole window" if score == "window" else "after the insert"))
    title = f"Stop codons inserted into {len(ranked)} genes"
    axes.set_title(title if area is None else f"{title}; AUROC {area:.3f} of {len(kinds[kinds >= 0])} with labels")
    if labels:
        axes.legend(frameon=False, loc="lower right")
    harness.tidy(axes)
    harness.save_figure(figure, path)


def check(genes: Sequence[Interval], insert: str, offset: int, window: int) -> None:
    """Raise UserError for what cannot be done."""
    if set(insert) - set(harness.BASES) or not insert:
        raise UserError(f"--insert {insert}: give bases A, C, G and T")
    for gene in genes:
        if gene.end - gene.start <= offset:
            raise UserError(f"gene '{gene.name}' has {gene.end - gene.start} bases, not more than --offset {offset}")
    if window < 2 * offset + 2:
        raise UserError(f"--window {window} is too short for --offset {offset}; give a longer one")


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = harness.parser(NAME, __doc__)
    parser.add_argument("--fasta", type=Path, required=True, metavar="FILE", help="genome, plain or gzip")
    parser.add_argument(
        "--genes",
        type=Path,
        required=True,
        metavar="FILE",
        help="coding sequences, BED with names and strands, or GTF",
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="name and 1 (essential) or 0 between tabs (default: none)"
    )
    parser.add_argument(
        "--window",
        type=groups.positive_int,
        default=8000,
        metavar="N",
        help="bases around the gene that the model sees, the insert not counted (default: 8000)",
    )
    parser.add_argument("--insert", default=STOP_CODONS, metavar="BASES", help=f"(default: {STOP_CODONS})")
    parser.add_argument(
        "--offset",
        type=groups.positive_int,
        default=OFFSET,
        metavar="N",
        help=f"bases of the gene before the insert (default: {OFFSET})",
    )
    parser.add_argument(
        "--score",
        choices=("window", "after"),
        default="window",
        help="rank by the change of the whole window, or of the bases after the insert (default: window)",
    )
    return parser


def main() -> None:
    """Entry point."""
    args = build_parser().parse_args()

    def work() -> None:
        harness.check_output_dir(args.output_dir)
        genome, genes = harness.read_genome(args.fasta), read_genes(args.genes)
        check_within(genes, harness.lengths(genome), args.genes)
        check(genes, args.insert, args.offset, args.window)
        labels = read_labels(args.labels, genes) if args.labels else None
        longest = min(args.window, max(map(len, genome.values()))) + len(args.insert)
        with harness.open_model(args.ckpt_dir, longest=longest, max_batch_tokens=args.max_batch_tokens) as model:
            _, area = essentiality(
                model.log_probs,
                genome,
                genes,
                args.output_dir,
                window=args.window,
                insert=args.insert,
                offset=args.offset,
                score=args.score,
                labels=labels,
            )
        if area is not None:
            print(f"AUROC {area:.4f}")

    harness.run(NAME, work)


if __name__ == "__main__":
    main()
