# SPDX-License-Identifier: Apache-2.0
"""Needle in a haystack: how far back can the model find a sequence that it needs?

A needle of random bases lies in a haystack of other random bases, and once more at its end: the query. Nothing else
helps to predict the query's second half, so a model that does looks back at the needle. Two measures, by length of
the haystack and depth of the needle:

likelihood: log-probability per base of the query's second half, minus the same where the needle was replaced by other
    random bases. 0: nothing is recalled; ln 4 = 1.386 nat: all of it.
jacobian: how much replacing bases of the needle's second half moves the prediction of their copies (the categorical
    Jacobian: Frobenius norm of the changes of four centred log-probabilities, by three replacements), minus the mean
    over the query's other bases. 0: the needle does not matter.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import harness
import numpy as np

from evo2_megatron.cli import groups
from evo2_megatron.config import UserError

NAME = "needle.py"
_LETTERS = np.frombuffer(harness.BASES.encode(), dtype=np.uint8)


class Haystack(NamedTuple):
    """Random bases with a needle in them and its copy at the end."""

    sequence: bytes
    needle_at: int
    """Position of the needle's first base."""
    needle_length: int

    @property
    def query_at(self) -> int:
        return len(self.sequence) - self.needle_length

    def with_needle(self, needle: bytes) -> bytes:
        """The same with another needle; its copy at the end stays."""
        return self.sequence[: self.needle_at] + needle + self.sequence[self.needle_at + self.needle_length :]


class Recall(NamedTuple):
    """One cell of the map."""

    length: int
    """Bases of the whole sequence."""
    depth: float
    """Where the needle is: 0 at the start, 1 directly before the query."""
    distance: int
    """Bases from the needle's first to the query's first."""
    recall: float
    """Mean over repeats; unit and meaning as the measure says."""
    standard_error: float
    """Over repeats; nan if there is one."""


def random_bases(rng: np.random.Generator, num_bases: int) -> bytes:
    """Uniform over A, C, G, T."""
    return rng.choice(_LETTERS, num_bases).tobytes()


def haystack(rng: np.random.Generator, length: int, depth: float, needle_length: int) -> Haystack:
    """A random one of ``length`` bases; ``depth`` as in ``Recall``."""
    at = round(depth * (length - 2 * needle_length))
    needle, hay = random_bases(rng, needle_length), random_bases(rng, length - 2 * needle_length)
    return Haystack(hay[:at] + needle + hay[at:] + needle, at, needle_length)


def recall_by_likelihood(log_probs: harness.LogProbs, stack: Haystack, rng: np.random.Generator) -> float:
    """Nat per base of the query's second half."""
    other = stack.with_needle(random_bases(rng, stack.needle_length))
    half = slice(stack.query_at + stack.needle_length // 2, None)
    found, lost = (float(values[half].mean()) for values in log_probs([stack.sequence, other]))
    return found - lost


def recall_by_jacobian(
    distributions: harness.Distributions, stack: Haystack, rng: np.random.Generator, num_positions: int = 4
) -> float:
    """Norm for the needle's base and its copy, minus the mean over the query's other bases, in nat.

    Args:
        distributions: Of every base after those before it.
        stack: Needle and query.
        rng: Chooses the bases to replace.
        num_positions: How many, all in the needle's second half.
    """
    half = stack.needle_length // 2
    chosen = rng.choice(np.arange(half, stack.needle_length), min(num_positions, half), replace=False)
    mutants = [mutant for place in chosen for mutant in harness.replaced(stack.sequence, stack.needle_at + int(place))]
    before, *after = (rows[stack.query_at :].astype(np.float64) for rows in distributions([stack.sequence, *mutants]))
    centred = [rows - rows.mean(axis=-1, keepdims=True) for rows in (before, *after)]
    changes = np.stack(centred[1:]).reshape(len(chosen), 3, stack.needle_length, 4) - centred[0]
    norms = np.sqrt((changes**2).sum(axis=(1, 3)))  # [chosen, base of the query]
    of_copy = norms[np.arange(len(chosen)), chosen]
    elsewhere = (norms.sum(axis=1) - of_copy) / (stack.needle_length - 1)
    return float((of_copy - elsewhere).mean())


def check(lengths: Sequence[int], depths: Sequence[float], needle_length: int) -> None:
    """Raise UserError for a haystack that cannot be made."""
    if needle_length < 2:
        raise UserError(f"--needle-length {needle_length}: a needle has two halves; give 2 or more")
    for length in lengths:
        if length < 2 * needle_length:
            raise UserError(f"--lengths {length} has no room for two needles of {needle_length}; give longer ones")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise UserError(f"--depths {depth}: give numbers from 0, the start, to 1, directly before the query")


def needle(
    function: harness.LogProbs | harness.Distributions,
    output_dir: Path,
    *,
    measure: str = "likelihood",
    lengths: Sequence[int],
    depths: Sequence[float],
    needle_length: int = 100,
    repeats: int = 3,
    seed: int = 1,
) -> list[Recall]:
    """Measure recall in every cell and write ``needle.tsv`` and ``needle.png``.

    Args:
        function: ``LogProbs`` for the measure ``likelihood``, ``Distributions`` for ``jacobian``.
        output_dir: Where to write.
        measure: ``likelihood`` or ``jacobian``.
        lengths: Of the whole sequences, in bases.
        depths: Of the needle, 0 to 1.
        needle_length: Bases.
        repeats: Haystacks per cell.
        seed: Of the random bases; each cell and repeat has its own.

    Raises:
        UserError: Two needles do not fit, or a depth is none.
    """
    check(lengths, depths, needle_length)
    recall = recall_by_likelihood if measure == "likelihood" else recall_by_jacobian
    cells = []
    for row, depth in enumerate(depths):
        for length in lengths:
            rngs = [np.random.default_rng((seed, repeat, row, length)) for repeat in range(repeats)]
            stacks = [haystack(rng, length, depth, needle_length) for rng in rngs]
            values = [recall(function, stack, rng) for stack, rng in zip(stacks, rngs)]
            error = float(np.std(values, ddof=1)) / math.sqrt(repeats) if repeats > 1 else float("nan")
            distance = stacks[0].query_at - stacks[0].needle_at
            cells.append(Recall(length, depth, distance, float(np.mean(values)), error))
    columns = ("length", "depth", "distance", f"recall_{measure}", "standard_error")
    harness.write_table(output_dir / "needle.tsv", columns, cells)
    draw(cells, measure, needle_length, output_dir / "needle.png")
    return cells


def draw(cells: Sequence[Recall], measure: str, needle_length: int, path: Path) -> None:
    """Heat map, depths downwards and lengths to the right."""
    plt = harness.pyplot()
    lengths = list(dict.fromkeys(cell.length for cell in cells))
    depths = list(dict.fromkeys(cell.depth for cell in cells))
    values = np.array([cell.recall for cell in cells]).reshape(len(depths), len(lengths))
    size = (2.5 + 0.9 * len(lengths), 2 + 0.5 * len(depths))
    figure, axes = plt.subplots(figsize=(max(size[0], 6), size[1]), layout="constrained")
    top = math.log(4) if measure == "likelihood" else max(float(values.max()), 1e-9)
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top)
    for row, column in np.ndindex(values.shape):
        color = "white" if values[row, column] < 0.6 * top else "black"
        axes.text(
            column,
            row,
            f"{round(values[row, column], 2) + 0.0:.2f}",
            ha="center",
            va="center",
            color=color,
            fontsize=8,
        )
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set_xlabel("length of the sequence, bases")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"Recall of a needle of {needle_length} bases in random DNA")
    unit = "gain per base, nat (all: 1.39)" if measure == "likelihood" else "categorical Jacobian, nat"
    figure.colorbar(image, label=unit)
    harness.save_figure(figure, path)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = harness.parser(NAME, __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--lengths",
        type=groups.positive_int,
        nargs="+",
        default=[512, 1024, 2048, 4096, 8192],
        metavar="N",
        help="of the sequences, in bases (default: 512 1024 2048 4096 8192)",
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="X",
        help="of the needle, from 0, the start, to 1, before the query (default: 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument(
        "--needle-length", type=groups.positive_int, default=100, metavar="N", help="in bases (default: 100)"
    )
    parser.add_argument(
        "--measure", choices=("likelihood", "jacobian"), default="likelihood", help="(default: likelihood)"
    )
    parser.add_argument(
        "--repeats", type=groups.positive_int, default=3, metavar="N", help="haystacks per cell (default: 3)"
    )
    parser.add_argument("--seed", type=groups.positive_int, default=1, metavar="N", help="(default: 1)")
    return parser


def main() -> None:
    """Entry point."""
    args = build_parser().parse_args()

    def work() -> None:
        harness.check_output_dir(args.output_dir)
        check(args.lengths, args.depths, args.needle_length)
        settings = {"longest": max(args.lengths), "max_batch_tokens": args.max_batch_tokens}
        with harness.open_model(args.ckpt_dir, **settings) as model:
            needle(
                model.log_probs if args.measure == "likelihood" else model.distributions,
                args.output_dir,
                measure=args.measure,
                lengths=sorted(set(args.lengths)),
                depths=sorted(set(args.depths)),
                needle_length=args.needle_length,
                repeats=args.repeats,
                seed=args.seed,
            )

    harness.run(NAME, work)


if __name__ == "__main__":
    main()
