# SPDX-License-Identifier: Apache-2.0
"""Exons and introns from embeddings: a logistic regression on the hidden states of one layer, base by base.

The model itself is not trained. The classifier learns on some contigs and is measured on others. Bases of transcripts
count: exonic where any transcript of the annotation has an exon, intronic otherwise; --all-bases adds what is between
genes to the second class.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import harness
import numpy as np
from annotation import covered, read_transcripts

from evo2_megatron.cli import groups
from evo2_megatron.config import UserError
from evo2_megatron.data.bed import Interval, check_within
from evo2_megatron.data.gtf import Transcript, text
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.data.record_windows import Windows

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

NAME = "exon_classifier.py"
EXON, INTRON, IGNORED = 1, 0, -1


class Measured(NamedTuple):
    """How well the classifier does on bases that it has not seen."""

    contig: str
    """``all`` for all of them."""
    num_bases: int
    num_exonic: int
    auroc: float
    """nan for a contig of one class."""
    average_precision: float


def spans(transcripts: Sequence[Transcript]) -> tuple[list[Interval], list[Interval]]:
    """Transcripts and their exons as intervals."""
    whole, exons = [], []
    for t in transcripts:
        contig, name = text(t.contig), text(t.id)
        whole.append(Interval(contig, t.starts[0], t.ends[-1], name, "+"))
        exons += [Interval(contig, start, end, name, "+") for start, end in zip(t.starts, t.ends)]
    return whole, exons


def label_bases(
    whole: Sequence[Interval], exons: Sequence[Interval], contig: str, sequence: bytes, *, all_bases: bool
) -> np.ndarray:
    """EXON, INTRON or IGNORED for each base, int8 [L]; N is always ignored."""
    inside, exonic = (covered((i for i in some if i.contig == contig), len(sequence)) for some in (whole, exons))
    labels = np.where(exonic, EXON, np.where(inside | all_bases, INTRON, IGNORED)).astype(np.int8)
    labels[np.frombuffer(sequence, np.uint8) == ord("N")] = IGNORED
    return labels


def embed_bases(
    embed: harness.Embed, sequence: bytes, labels: np.ndarray, *, window: int, both_strands: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features, float32 [n, H or 2 H], and labels [n] of the bases that count, window by window.

    Windows overlap by half, and of each but the first the first half is context only: a causal model knows little at
    the start. Of the opposite strand, each base has the state of its partner: what comes after it in this direction.
    """
    windows = Windows(window, window - max(window // 2, 1))
    for number in range(windows.count(len(sequence))):
        start, end, num_context = windows.span(number, len(sequence))
        part = sequence[start:end]
        kept = np.flatnonzero(labels[start:end] != IGNORED)
        kept = kept[kept >= num_context]
        if not len(kept):
            continue
        strands = [part, reverse_complement(part)] if both_strands else [part]
        forward, *opposite = embed(strands)
        states = np.concatenate([forward, *(hidden[::-1] for hidden in opposite)], axis=1)
        yield states[kept], labels[start:end][kept]


def fit(features: np.ndarray, labels: np.ndarray, *, regularization: float = 1.0) -> Pipeline:
    """Standardized logistic regression, the classes weighted alike."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=1 / regularization, class_weight="balanced", max_iter=1000)
    return make_pipeline(StandardScaler(), regression).fit(features, labels)


def sample(parts: Iterator[tuple[np.ndarray, np.ndarray]], most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to ``most`` bases, each as likely as any other, with memory for no more than twice as many."""
    rng = np.random.default_rng(seed)
    features, labels, keys = [], [], []

    def shrink() -> None:
        order = np.argsort(np.concatenate(keys), kind="stable")[:most]
        features[:], labels[:] = [np.concatenate(features)[order]], [np.concatenate(labels)[order]]
        keys[:] = [np.concatenate(keys)[order]]

    for states, of_states in parts:
        features.append(states)
        labels.append(of_states)
        keys.append(rng.random(len(of_states)))
        if sum(map(len, keys)) > 2 * most:
            shrink()
    if not keys:
        return np.zeros((0, 1), np.float32), np.zeros(0, np.int8)
    shrink()
    return features[0], labels[0]


def measure(scores: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> list[Measured]:
    """Of each contig and of all together, last."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    everything = {"all": (np.concatenate(list(scores.values())), np.concatenate(list(labels.values())))}
    result = []
    for contig, (s, y) in ({c: (scores[c], labels[c]) for c in scores} | everything).items():
        both = 0 < y.sum() < len(y)
        values = (roc_auc_score(y, s), average_precision_score(y, s)) if both else (float("nan"),) * 2
        result.append(Measured(contig, len(y), int(y.sum()), *map(float, values)))
    return result


def exon_classifier(
    embed: harness.Embed,
    genome: Mapping[str, bytes],
    transcripts: Sequence[Transcript],
    output_dir: Path,
    *,
    test_contigs: Sequence[str],
    window: int,
    both_strands: bool = True,
    all_bases: bool = False,
    max_train_bases: int = 200_000,
    seed: int = 1,
    title: str = "Exon or intron",
) -> list[Measured]:
    """Fit, measure, and write ``exon_classifier.tsv``, ``exon_classifier_roc.tsv`` and ``exon_classifier.png``.

    Args:
        embed: Hidden states of bases.
        genome: Contigs by name, upper case.
        transcripts: On them.
        output_dir: Where to write.
        test_contigs: To measure on; the rest is to learn from.
        window: Bases that the model sees at a time.
        both_strands: Add the hidden states of the opposite strand to those of each base.
        all_bases: Count bases outside transcripts as introns.
        max_train_bases: Most bases to learn from, drawn at random.
        seed: Of that.
        title: Of the picture.

    Raises:
        UserError: The contigs to learn from, the bases drawn from them, or the contigs to measure on, lack exons or
            introns.
    """
    whole, exons = spans(transcripts)
    labels = {c: label_bases(whole, exons, c, s, all_bases=all_bases) for c, s in genome.items()}
    check_classes({c: y for c, y in labels.items() if c not in test_contigs}, "the contigs to learn from")
    check_classes({c: labels[c] for c in test_contigs}, "--test-contigs")

    def bases_of(contig: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return embed_bases(embed, genome[contig], labels[contig], window=window, both_strands=both_strands)

    training = (part for contig in genome if contig not in test_contigs for part in bases_of(contig))
    states, drawn = sample(training, max_train_bases, seed)
    if len(np.unique(drawn)) < 2:
        raise UserError(f"--max-train-bases {max_train_bases}: those drawn are of one class; give a larger number")
    classifier = fit(states, drawn)
    scores, truth = {}, {}
    for contig in test_contigs:
        parts = [(classifier.decision_function(states), y) for states, y in bases_of(contig)]
        if parts:
            scores[contig], truth[contig] = (np.concatenate(values) for values in zip(*parts))
    measured = measure(scores, truth)
    harness.write_table(
        output_dir / "exon_classifier.tsv",
        ("contig", "num_bases", "num_exonic", "auroc", "average_precision"),
        measured,
    )
    draw(np.concatenate(list(scores.values())), np.concatenate(list(truth.values())), measured[-1], title, output_dir)
    return measured


def check_classes(labels: Mapping[str, np.ndarray], where: str) -> None:
    """Raise UserError unless both classes are there."""
    for value, name in ((EXON, "exon"), (INTRON, "intron")):
        if not any((y == value).any() for y in labels.values()):
            raise UserError(
                f"{where}: {', '.join(labels) or 'none'}; the annotation has no {name} there; move contigs"
            )


def draw(scores: np.ndarray, labels: np.ndarray, measured: Measured, title: str, output_dir: Path) -> None:
    """ROC curve as a table and a picture."""
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(labels, scores)
    # a curve of a million points is drawn, and read, as one of a thousand
    kept = np.unique(np.linspace(0, len(false) - 1, 1000).round().astype(int))
    rows = zip(false[kept], true[kept])
    harness.write_table(output_dir / "exon_classifier_roc.tsv", ("false_positive_rate", "true_positive_rate"), rows)
    plt = harness.pyplot()
    figure, axes = plt.subplots(figsize=(5.5, 5), layout="constrained")
    axes.plot(false[kept], true[kept], color="C0", label=f"AUROC {measured.auroc:.3f}")
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="chance")
    axes.set_xlabel("false positive rate, of intronic bases")
    axes.set_ylabel("true positive rate, of exonic bases")
    axes.set_title(f"{title}\n{measured.num_bases:,} held-out bases, {measured.num_exonic:,} exonic", fontsize=10)
    axes.set_aspect("equal")
    axes.legend(frameon=False, loc="lower right")
    harness.tidy(axes)
    harness.save_figure(figure, output_dir / "exon_classifier.png")


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = harness.parser(NAME, __doc__)
    parser.add_argument("--fasta", type=Path, required=True, metavar="FILE", help="genome, plain or gzip")
    parser.add_argument("--gtf", type=Path, required=True, metavar="FILE", help="its transcripts, plain or gzip")
    parser.add_argument("--layer", type=int, required=True, metavar="N", help="0 is the first, -1 the last")
    parser.add_argument("--test-contigs", nargs="+", required=True, metavar="NAME", help="contigs to measure on")
    parser.add_argument(
        "--window", type=groups.positive_int, default=8192, metavar="N", help="bases at a time (default: 8192)"
    )
    parser.add_argument("--one-strand", action="store_true", help="use the forward strand's hidden states only")
    parser.add_argument("--all-bases", action="store_true", help="count bases outside transcripts as introns")
    parser.add_argument(
        "--max-train-bases",
        type=groups.positive_int,
        default=200_000,
        metavar="N",
        help="most bases to learn from, drawn at random (default: 200000)",
    )
    parser.add_argument("--seed", type=groups.positive_int, default=1, metavar="N", help="of the draw (default: 1)")
    return parser


def main() -> None:
    """Entry point."""
    args = build_parser().parse_args()

    def work() -> None:
        harness.check_output_dir(args.output_dir)
        genome, transcripts = harness.read_genome(args.fasta), read_transcripts(args.gtf)
        check_within(spans(transcripts)[0], harness.lengths(genome), args.gtf)
        for name in args.test_contigs:
            harness.contig_of(genome, name, "--test-contigs")
        settings = {"layers": [args.layer], "max_batch_tokens": args.max_batch_tokens}
        longest = min(args.window, max(map(len, genome.values())))
        with harness.open_model(args.ckpt_dir, longest=longest, **settings) as model:
            measured = exon_classifier(
                model.embed,
                genome,
                transcripts,
                args.output_dir,
                test_contigs=list(dict.fromkeys(args.test_contigs)),
                window=args.window,
                both_strands=not args.one_strand,
                all_bases=args.all_bases,
                max_train_bases=args.max_train_bases,
                seed=args.seed,
                title=f"Exon or intron, from hidden states after layer {args.layer}",
            )
        print(f"AUROC {measured[-1].auroc:.4f} on {measured[-1].num_bases} bases")

    harness.run(NAME, work)


if __name__ == "__main__":
    main()
