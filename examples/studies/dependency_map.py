# SPDX-License-Identifier: Apache-2.0
"""Dependency map: which bases does the model take into account when it predicts which others?

Every base of a region is replaced by the three others, and the odds of every other base are looked at. The dependency
of base j on base i is the largest change of log2 odds, over what i was replaced by and over the four bases at j
(nucleotide dependency analysis, da Silva et al., bioRxiv 2024.07.27.605418). Bases that belong together, such as the
two sides of a stem, or a splice site's, stand out off the diagonal.

A model of this kind predicts a base from those before it. So where j is after i the map is of the strand as it is,
and where j is before i of the reverse complement.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import numpy as np

from evo2_megatron.config import UserError
from evo2_megatron.data.nucleotides import reverse_complement

NAME = "dependency_map.py"
_AT_ONCE = 64
"""Positions whose replacements are predicted together: what is in memory is three times as many windows."""


def dependencies(distributions: harness.Distributions, window: bytes, num_bases: int) -> np.ndarray:
    """Change of log2 odds, float64 [R, R]: of base j (column) by replacing base i (row); 0 where j is not after i.

    Args:
        distributions: Of every base after those before it.
        window: Context, and at its end the R bases of the region.
        num_bases: R.
    """
    first = len(window) - num_bases
    (plain,) = distributions([window])
    before = log2_odds(plain[first:])
    changes = np.zeros((num_bases, num_bases))
    for start in range(0, num_bases, _AT_ONCE):
        positions = range(start, min(start + _AT_ONCE, num_bases))
        mutants = [mutant for position in positions for mutant in harness.replaced(window, first + position)]
        after = np.stack([log2_odds(rows[first:]) for rows in distributions(mutants)])
        largest = np.abs(after - before).reshape(len(positions), 3, num_bases, 4).max(axis=(1, 3))
        changes[positions.start : positions.stop] = largest
    return np.triu(changes, k=1)


def log2_odds(log_prob: np.ndarray) -> np.ndarray:
    """log2(p / (1 - p)), float64, from log-probabilities in nat over A, C, G, T in the last place."""
    prob = np.exp(log_prob.astype(np.float64))
    # 1 - p as the sum of the other three: a p near 1 keeps its digits
    rest = np.stack([np.delete(prob, base, axis=-1).sum(-1) for base in range(4)], axis=-1)
    return np.log2(prob) - np.log2(rest)


def dependency_map(
    distributions: harness.Distributions,
    contig: bytes,
    output_dir: Path,
    *,
    start: int,
    end: int,
    context: int,
) -> np.ndarray:
    """Compute the map and write ``dependency_map.tsv`` and ``dependency_map.png``.

    Args:
        distributions: Of every base after those before it.
        contig: Upper case.
        output_dir: Where to write.
        start, end: The region, 0-based, end excluded.
        context: Bases on each side of it that the model sees, fewer at the contig's ends.

    Returns:
        float64 [R, R]: how much base j (column) depends on base i (row); 0 on the diagonal.

    Raises:
        UserError: The region is none, or has other letters than A, C, G and T.
    """
    region, size = check(contig, start, end), end - start
    forward = dependencies(distributions, contig[max(start - context, 0) : end], size)
    backward = dependencies(distributions, reverse_complement(contig[start : end + context]), size)
    changes = forward + backward[::-1, ::-1]
    rows = (
        (start + i, start + j, chr(region[i]), chr(region[j]), "+" if j > i else "-", changes[i, j])
        for i in range(size)
        for j in range(size)
        if i != j
    )
    columns = ("position", "depends", "base", "depending_base", "strand", "dependency")
    harness.write_table(output_dir / "dependency_map.tsv", columns, rows)
    draw(changes, start, output_dir / "dependency_map.png")
    return changes


def check(contig: bytes, start: int, end: int) -> bytes:
    """The bases of a region; UserError if it is none."""
    if not 0 <= start < end - 1 < len(contig):
        raise UserError(f"--start {start} --end {end}: give two bases or more of the contig's {len(contig)}")
    region = contig[start:end]
    foreign = set(region) - set(harness.BASES.encode())
    if foreign:
        raise UserError(f"the region has {chr(min(foreign))!r} in it; choose one of A, C, G and T alone")
    return region


def draw(changes: np.ndarray, start: int, path: Path) -> None:
    """Heat map: what was replaced downwards, what depends on it to the right."""
    plt = harness.pyplot()
    size = len(changes)
    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    # a few pairs of neighbours would take all of the scale
    top = max(float(np.quantile(changes, 0.995)), 1e-9)
    edges = (start - 0.5, start + size - 0.5, start + size - 0.5, start - 0.5)
    image = axes.imshow(changes, cmap="magma", vmin=0, vmax=top, extent=edges, interpolation="nearest")
    axes.set_xlabel("position of the base that depends, 0-based")
    axes.set_ylabel("position of the base that is replaced")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_title("above the diagonal: the strand as it is; below: its reverse complement", fontsize=9)
    figure.colorbar(image, label="largest change of log2 odds", extend="max")
    harness.save_figure(figure, path)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = harness.parser(NAME, __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    harness.add_region(parser)
    return parser


def main() -> None:
    """Entry point."""
    args = build_parser().parse_args()

    def work() -> None:
        harness.check_output_dir(args.output_dir)
        contig = harness.contig_of(harness.read_genome(args.fasta), args.contig, "--contig")
        check(contig, args.start, args.end)
        longest = max(
            args.end - max(args.start - args.context, 0), min(args.end + args.context, len(contig)) - args.start
        )
        with harness.open_model(args.ckpt_dir, longest=longest, max_batch_tokens=args.max_batch_tokens) as model:
            place = {"start": args.start, "end": args.end, "context": args.context}
            dependency_map(model.distributions, contig, args.output_dir, **place)

    harness.run(NAME, work)


if __name__ == "__main__":
    main()
