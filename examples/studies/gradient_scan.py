# SPDX-License-Identifier: Apache-2.0
"""All single-base substitutions of a region at once, to first order: which bases matter to the model, in two passes.

A substitution changes two things: how probable the base itself is, which one forward pass tells for all four bases,
and how probable the bases behind it are. The latter is taken to first order (Sasse, Chikina and Mostafavi, iScience
2024): the gradient of their log-likelihood by the embedding at this place, times the difference of the two bases'
embeddings. So one pass forwards and one backwards stand for three windows for each base. How good that is for a model,
some substitutions say that are made in earnest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import harness
import numpy as np

from evo2_megatron.cli import groups
from evo2_megatron.config import UserError
from evo2_megatron.data.nucleotides import reverse_complement

NAME = "gradient_scan.py"


class Region(NamedTuple):
    """What is scanned, and what the model sees of it: positions in the contig, 0-based, ends excluded."""

    start: int
    end: int
    first: int
    last: int


def scan(first_order: harness.FirstOrder, window: bytes, *, both_strands: bool) -> np.ndarray:
    """What a substitution changes, float64 [2, L, 4], nat: at the base itself, and behind it; of two strands the mean.

    Args:
        first_order: Of a sequence.
        window: Upper case.
        both_strands: Read the reverse complement, too, where "behind" is to the left.
    """
    changes = first_order(window).astype(np.float64)
    if both_strands:
        # complements of A, C, G, T are T, G, C, A
        changes = (changes + first_order(reverse_complement(window))[:, ::-1, ::-1]) / 2
    return changes


def exact(score: harness.Score, window: bytes, places: Sequence[tuple[int, int]], *, both_strands: bool) -> np.ndarray:
    """Change of the log-likelihood, float64 [N], by each substitution: position in the window and number of the base.

    Arguments are otherwise those of ``scan``; ``score`` is called once.
    """
    bases = harness.BASES.encode()
    sequences = [window, *(harness.substituted(window, at, bases[base]) for at, base in places)]
    if both_strands:
        sequences += [reverse_complement(sequence) for sequence in sequences]
    scores = score(sequences).reshape(1 + both_strands, -1)
    return (scores[:, 1:] - scores[:, :1]).mean(0)


def gradient_scan(
    first_order: harness.FirstOrder,
    score: harness.Score,
    name: str,
    contig: bytes,
    region: Region,
    output_dir: Path,
    *,
    both_strands: bool,
    num_checked: int,
    seed: int,
) -> np.ndarray:
    """Scan a region and write ``gradient_scan.tsv``, ``gradient_scan_check.tsv`` and ``gradient_scan.png``.

    Args:
        first_order, score: Of sequences.
        name, contig: Upper case.
        region: What to scan.
        output_dir: Where to write.
        both_strands: Mean of both.
        num_checked: Substitutions, drawn at random, that are also made and scored.
        seed: Of the draw.

    Returns:
        The change of the log-likelihood to first order, float64 [R, 4]; nan where the base is not A, C, G or T.
    """
    window = contig[region.first : region.last]
    own, behind = scan(first_order, window, both_strands=both_strands)
    changes, letters = own + behind, harness.BASES.encode()
    inside = range(region.start - region.first, region.end - region.first)
    places = [(at, b) for at in inside if window[at] in letters for b in range(4) if letters[b] != window[at]]
    harness.write_table(
        output_dir / "gradient_scan.tsv",
        ("contig", "position", "reference", "alternative", "delta_log_likelihood", "of_the_base", "of_what_follows"),
        [
            (name, region.first + at, chr(window[at]), harness.BASES[b], changes[at, b], own[at, b], behind[at, b])
            for at, b in places
        ],
    )
    rng = np.random.default_rng(seed)
    chosen = [places[i] for i in sorted(rng.permutation(len(places))[:num_checked])]
    made = exact(score, window, chosen, both_strands=both_strands)
    told = np.array([changes[place] for place in chosen])
    harness.write_table(
        output_dir / "gradient_scan_check.tsv",
        ("contig", "position", "reference", "alternative", "first_order", "exact"),
        [
            (name, region.first + at, chr(window[at]), harness.BASES[b], *values)
            for (at, b), *values in zip(chosen, told, made)
        ],
    )
    if len(chosen) > 1:
        sys.stdout.write(
            f"first order beside {len(chosen)} exact changes: Pearson {np.corrcoef(told, made)[0, 1]:.4f}\n"
        )
    shown = changes[inside.start : inside.stop].copy()
    shown[[window[at] not in letters for at in inside]] = np.nan
    draw(shown, window[inside.start : inside.stop], region.start, told, made, output_dir / "gradient_scan.png")
    return shown


def draw(changes: np.ndarray, region: bytes, start: int, told: np.ndarray, made: np.ndarray, path: Path) -> None:
    """Heat map of the four bases, their mean at each position, and first order beside exact."""
    plt = harness.pyplot()
    figure = plt.figure(figsize=(12, 4.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 1), height_ratios=(1, 1.2))
    above, below, beside = (figure.add_subplot(grid[place]) for place in ((0, 0), (1, 0), (slice(None), 1)))
    top = max(float(np.nanquantile(np.abs(changes), 0.99)), 1e-9) if np.isfinite(changes).any() else 1.0
    edges = (start - 0.5, start + len(region) - 0.5, 3.5, -0.5)
    image = above.imshow(
        changes.T, cmap="RdBu_r", vmin=-top, vmax=top, extent=edges, aspect="auto", interpolation="nearest"
    )
    above.set_yticks(range(4), harness.BASES)
    above.set_title("change of the log-likelihood by a base, first order", fontsize=9)
    figure.colorbar(image, ax=above, label="nat", extend="both")
    # three of the four are substitutions, the fourth is 0
    below.bar(range(start, start + len(region)), changes.sum(1) / 3, width=1.0, color="C0")
    below.set_xlim(edges[:2])
    below.set_xlabel("position, 0-based")
    below.set_ylabel("mean of three, nat")
    harness.tidy(below)
    if len(told):
        both = (min(told.min(), made.min()), max(told.max(), made.max()))
        beside.plot(both, both, color="black", linewidth=0.8)
    beside.scatter(told, made, s=6)
    beside.set_xlabel("first order, nat")
    beside.set_ylabel("exact, nat")
    harness.tidy(beside)
    harness.save_figure(figure, path)


def region_of(contig: bytes, start: int, end: int, context: int) -> Region:
    """The region with its context; UserError if it is none."""
    if not 0 <= start < end <= len(contig):
        raise UserError(f"--start {start} --end {end} is not within the contig's {len(contig)} bases")
    return Region(start, end, max(start - context, 0), min(end + context, len(contig)))


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = harness.parser(NAME, __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    harness.add_region(parser)
    parser.add_argument("--one-strand", action="store_true", help="read the strand as it is alone (default: both)")
    parser.add_argument(
        "--check",
        type=groups.non_negative_int,
        default=50,
        metavar="N",
        help="substitutions to make in earnest, too (default: 50)",
    )
    parser.add_argument(
        "--seed", type=groups.non_negative_int, default=1, metavar="N", help="of the choice of these (default: 1)"
    )
    return parser


def main() -> None:
    """Entry point."""
    args = build_parser().parse_args()

    def work() -> None:
        harness.check_output_dir(args.output_dir)
        contig = harness.contig_of(harness.read_genome(args.fasta), args.contig, "--contig")
        region = region_of(contig, args.start, args.end, args.context)
        settings = {"longest": region.last - region.first, "max_batch_tokens": args.max_batch_tokens}
        with harness.open_model(args.ckpt_dir, **settings) as model:
            gradient_scan(
                model.first_order,
                model.log_likelihoods,
                args.contig,
                contig,
                region,
                args.output_dir,
                both_strands=not args.one_strand,
                num_checked=args.check,
                seed=args.seed,
            )

    harness.run(NAME, work)


if __name__ == "__main__":
    main()
