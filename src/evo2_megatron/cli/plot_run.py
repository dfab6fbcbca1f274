# SPDX-License-Identifier: Apache-2.0
"""Draw loss, learning rate and gradient norm of training runs to a PNG file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command, groups

PROG = "evo2_plot_run"


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = command.Parser(PROG, __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run: --result-dir and its name")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("run.png"), metavar="PNG", help="file to write (default: run.png)"
    )
    parser.add_argument(
        "--smooth",
        type=groups.positive_int,
        default=1,
        metavar="N",
        help="draw the mean over N logged steps, half before and half after (default: 1)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``evo2_plot_run``."""
    command.run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)

    from evo2_megatron.tasks.training.plot_run import plot_runs  # NumPy and TensorBoard load here, not for --help

    plot_runs(args.runs, args.output, smooth=args.smooth)
    print(args.output)


if __name__ == "__main__":
    main()
