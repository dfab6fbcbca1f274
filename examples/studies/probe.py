# SPDX-License-Identifier: Apache-2.0
"""Which layer, pooled how, tells what you want to know? Linear models on embeddings, cross-validated for each.

The model itself is not trained. Sequences with a class or a number each go through it once for each way of pooling;
then a linear model (logistic or ridge regression, how strongly regularized inner folds choose) is fitted to the
vectors of every layer and measured on the folds that it has not seen. Counts of k-mers, treated alike, say what can be
known without a language model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import harness
import numpy as np
from linear_models import INNER_FOLDS, METRICS, Candidate, Fold, Result, fit, folds_of, measure, nested_folds, predict

from evo2_megatron.cli import groups
from evo2_megatron.data.labelled import Labelled, find_classes, read_labelled
from evo2_megatron.data.labels import Labels
from evo2_megatron.data.nucleotides import reverse_complement

NAME = "probe.py"

Pool = Callable[[Sequence[bytes], harness.Pooling], dict[int, np.ndarray]]
"""Sequences and a way of pooling to the vectors of each layer, float32 [sequences, H]."""


def embeddings(
    pool: Pool, columns: Sequence[Sequence[bytes]], pooling: str, *, both_strands: bool
) -> dict[int, np.ndarray]:
    """Vectors of each layer, float32 [sequences, columns x strands x H], side by side.

    Args:
        pool: The model.
        columns: The sequences, or several for each label, such as with the reference and the alternative allele.
        pooling: ``mean``, ``last`` or ``middle:N``.
        both_strands: Add the vectors of the reverse complements.
    """
    found: dict[int, list[np.ndarray]] = {}
    for sequences in columns:
        strands = [sequences, [reverse_complement(s) for s in sequences]] if both_strands else [sequences]
        for number, strand in enumerate(strands):
            for layer, vectors in _of_strand(pool, strand, pooling, reverse=number == 1).items():
                found.setdefault(layer, []).append(vectors)
    return {layer: np.concatenate(vectors, axis=1) for layer, vectors in found.items()}


def _of_strand(pool: Pool, sequences: Sequence[bytes], pooling: str, *, reverse: bool) -> dict[int, np.ndarray]:
    """Where the middle is depends on the length: sequences of one length at a time."""
    if pooling in ("mean", "last"):
        return pool(sequences, pooling)
    lengths = np.array([len(sequence) for sequence in sequences])
    results: dict[int, np.ndarray] = {}
    for length in np.unique(lengths).tolist():
        how = middle(length, int(pooling.removeprefix("middle:")))
        how = range(length - how.stop, length - how.start) if reverse else how  # the same bases
        rows = np.flatnonzero(lengths == length)
        for layer, vectors in pool([sequences[row] for row in rows], how).items():
            results.setdefault(layer, np.zeros((len(sequences), vectors.shape[1]), np.float32))[rows] = vectors
    return results


def middle(length: int, size: int) -> range:
    """Positions of the bases in the middle of a sequence, as many as it has."""
    size = min(size, length)
    start = (length - size) // 2
    return range(start, start + size)


def kmer_counts(columns: Sequence[Sequence[bytes]], k: int) -> np.ndarray:
    """Share of each k-mer of A, C, G and T, float32 [sequences, columns x 4^k]; what else a sequence holds is none."""
    digit = np.full(256, -1)
    digit[list(harness.BASES.encode())] = range(4)
    parts = []
    for sequences in columns:
        counts = np.zeros((len(sequences), 4**k), np.float32)
        for row, sequence in enumerate(sequences):
            digits = digit[np.frombuffer(sequence, np.uint8)]
            if len(digits) >= k:
                windows = np.lib.stride_tricks.sliding_window_view(digits, k)
                codes = windows[(windows >= 0).all(1)] @ 4 ** np.arange(k)[::-1]
                counts[row] = np.bincount(codes, minlength=4**k) / max(len(codes), 1)
        parts.append(counts)
    return np.concatenate(parts, axis=1)


def probe(
    candidates: Iterable[Candidate],
    labels: Labels,
    rows: Labelled,
    folds: Sequence[Fold],
    output_dir: Path,
    *,
    title: str = "Linear models on embeddings",
) -> list[Result]:
    """Measure all, and write ``probe.tsv``, ``probe_predictions.tsv`` (of the best) and ``probe.png``.

    Args:
        candidates: What is tried.
        labels: What is learned, a class or one number.
        rows: The sequences' names and targets.
        folds: Of ``nested_folds``.
        output_dir: Where to write.
        title: Of the picture.

    Returns:
        Results in the order of the candidates.
    """
    targets = rows.targets[:, 0]
    results = [measure(candidate, labels, targets, folds) for candidate in candidates]
    first, *others = METRICS[labels.task]
    harness.write_table(
        output_dir / "probe.tsv",
        ("layer", "pooling", "num_features", first, f"{first}_standard_error", *others),
        (
            (r.layer, r.pooling, r.num_features, r.means[first], r.standard_error, *(r.means[name] for name in others))
            for r in results
        ),
    )
    fold_of = np.zeros(len(targets), int)
    for number, fold in enumerate(folds, 1):
        fold_of[fold.held_out] = number
    write_predictions(output_dir / "probe_predictions.tsv", labels, rows, best_of(results, first).predictions, fold_of)
    draw(results, first, title, output_dir)
    return results


def best_of(results: Sequence[Result], metric: str) -> Result:
    """That with the highest mean; of a layer unless there is none."""
    of_layers = [result for result in results if result.layer.isdecimal()] or results
    return max(of_layers, key=lambda result: np.nan_to_num(result.means[metric], nan=-np.inf))


def write_predictions(
    path: Path, labels: Labels, rows: Labelled, predictions: np.ndarray, fold_of: np.ndarray | None = None
) -> None:
    """One line per sequence: its name, its fold if there are some, true value, and what was predicted."""
    columns: dict[str, Iterable[object]] = {"id": rows.names}
    if fold_of is not None:
        columns["fold"] = fold_of
    is_class, truth = labels.task == "classification", rows.targets[:, 0]
    columns[f"true_{labels.columns[0]}"] = [labels.classes[int(value)] for value in truth] if is_class else truth
    names = [f"probability_{name}" for name in labels.classes] if is_class else ["prediction"]
    harness.write_table(path, tuple(columns | dict(zip(names, predictions.T))), zip(*columns.values(), *predictions.T))


def draw(results: Sequence[Result], metric: str, title: str, output_dir: Path) -> None:
    """The metric by layer, a line for each pooling, k-mers across."""
    plt = harness.pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for pooling in dict.fromkeys(result.pooling for result in results):
        some = [result for result in results if result.pooling == pooling]
        means, errors = [r.means[metric] for r in some], [np.nan_to_num(r.standard_error) for r in some]
        if some[0].layer.isdecimal():
            layers = [int(result.layer) for result in some]
            axes.errorbar(layers, means, errors, marker="o", markersize=4, capsize=2, label=pooling)
        else:
            axes.axhline(means[0], color="0.5", linestyle="--", linewidth=1, label=f"{pooling}, no language model")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{metric}, mean of folds +- standard error")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    harness.tidy(axes)
    harness.save_figure(figure, output_dir / "probe.png")


def _pooling(text: str) -> str:
    size = text.removeprefix("middle:")
    if text in ("mean", "last") or (size != text and size.isdecimal() and int(size) > 0):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is none of mean, last and middle:N, as in middle:128")


class Table(NamedTuple):
    """What is read of a file."""

    rows: Labelled
    columns: list[list[bytes]]
    """Sequences, for each column of them."""
    group_of: np.ndarray | None
    """Number of each row's group, int64."""

    @classmethod
    def read(cls, path: Path, labels: Labels, sequence_columns: Sequence[str], group_column: str | None) -> Table:
        """Rows that have a label; UserError for what is no such table."""
        found = [read_labelled(path, labels, sequence_column=name) for name in sequence_columns]
        group_of = None
        if group_column is not None:
            named = read_labelled(path, labels, sequence_column=sequence_columns[0], id_column=group_column)
            group_of = np.unique(named.names, return_inverse=True)[1]
        return cls(found[0], [rows.ids for rows in found], group_of)


def test(
    features: Sequence[np.ndarray], labels: Labels, tables: Sequence[Table], output_dir: Path, *, seed: int
) -> dict[str, float]:
    """Learn from the first table, measure on the second, and write ``probe_test.tsv``; its metrics."""
    from evo2_megatron.tasks.heads.head_metrics import metrics_of

    targets = [table.rows.targets[:, 0] for table in tables]
    inner = folds_of(labels, targets[0], tables[0].group_of, INNER_FOLDS, seed)
    predictions = predict(labels, fit(labels, features[0], targets[0], inner), features[1])
    write_predictions(output_dir / "probe_test.tsv", labels, tables[1].rows, predictions)
    return metrics_of(labels, targets[1][:, None], predictions)


def _candidates(
    pool: Pool, columns: Sequence[Sequence[bytes]], poolings: Sequence[str], k: int, *, both_strands: bool
) -> Iterator[Candidate]:
    yield Candidate("-", f"{k}-mers", kmer_counts(columns, k))
    for pooling in dict.fromkeys(poolings):
        for layer, vectors in embeddings(pool, columns, pooling, both_strands=both_strands).items():
            yield Candidate(str(layer), pooling, vectors)


def read_tables(args: argparse.Namespace, labels: Labels) -> list[Table]:
    """That to learn from, and that to measure on if there is one; groups are for the folds of the first."""
    tables = [Table.read(args.data, labels, args.sequence_columns, args.group_column)]
    if args.test_data is not None:
        tables.append(Table.read(args.test_data, labels, args.sequence_columns, None))
    return tables


def _num_folds(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 2 on")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = harness.parser(NAME, __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="table: .csv, .tsv, .jsonl or .parquet")
    add("--task", choices=tuple(METRICS), default="classification", help="(default: classification)")
    add("--label-column", default="label", metavar="NAME", help="of the class or number (default: label)")
    add(
        "--sequence-columns",
        nargs="+",
        default=["sequence"],
        metavar="NAME",
        help="of the bases; of several, such as two alleles, the vectors are put side by side (default: sequence)",
    )
    add(
        "--group-column",
        metavar="NAME",
        help="rows with the same value, such as a chromosome or gene, are in the same fold (default: none)",
    )
    add("--layers", nargs="+", type=int, metavar="N", help="0 is the first, -1 the last (default: all)")
    add(
        "--pooling",
        nargs="+",
        type=_pooling,
        default=["mean"],
        metavar="HOW",
        help="mean of all bases, last, or middle:N, the mean of N bases in the middle; each takes a pass "
        "(default: mean)",
    )
    add("--one-strand", action="store_true", help="leave out the vectors of the reverse complements")
    add("--kmer", type=groups.positive_int, default=4, metavar="K", help="length of the k-mers (default: 4)")
    add("--folds", type=_num_folds, default=5, metavar="N", help="(default: 5)")
    add("--test-data", type=Path, metavar="FILE", help="table to measure the best on in the end (default: none)")
    add("--seed", type=groups.positive_int, default=1, metavar="N", help="of the folds (default: 1)")
    return parser


def main() -> None:
    """Entry point."""
    args = build_parser().parse_args()

    def work() -> None:
        harness.check_output_dir(args.output_dir)
        classes = find_classes(args.data, args.label_column) if args.task == "classification" else ()
        labels = Labels(task=args.task, columns=(args.label_column,), classes=classes)
        tables = read_tables(args, labels)
        targets, groups = tables[0].rows.targets[:, 0], tables[0].group_of
        folds = nested_folds(labels, targets, groups, args.folds, args.seed)
        longest = max(len(sequence) for table in tables for column in table.columns for sequence in column)
        layers = "all" if args.layers is None else args.layers
        settings = {"layers": layers, "max_batch_tokens": args.max_batch_tokens}
        with harness.open_model(args.ckpt_dir, longest=longest, **settings) as model:
            both = not args.one_strand
            results = probe(
                _candidates(model.pooled, tables[0].columns, args.pooling, args.kmer, both_strands=both),
                labels,
                tables[0].rows,
                folds,
                args.output_dir,
                title=f"{args.task} of {args.label_column}, {len(tables[0].rows.names)} sequences",
            )
            metric = METRICS[args.task][0]
            best = best_of(results, metric)
            print(f"best: layer {best.layer}, {best.pooling}, {metric} {best.means[metric]:.4f}")
            if len(tables) == 2:
                vectors = [embeddings(model.pooled, t.columns, best.pooling, both_strands=both) for t in tables]
                features = [of_layers[int(best.layer)] for of_layers in vectors]
                metrics = test(features, labels, tables, args.output_dir, seed=args.seed)
                print(f"on {args.test_data}: {metric} {metrics[metric]}")

    harness.run(NAME, work)


if __name__ == "__main__":
    main()
