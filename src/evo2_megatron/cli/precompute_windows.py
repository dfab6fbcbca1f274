# SPDX-License-Identifier: Apache-2.0
"""Cut contigs into the windows that train_evo2 --sharded-eden-data reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command

_PROG = "bionemo_precompute_windows"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    top = command.Parser(_PROG, __doc__)
    parser = top.add_subparsers(required=True, metavar="precompute").add_parser("precompute", description=__doc__)
    parser.add_argument("table", type=Path, metavar="TABLE", help="Parquet with the columns contig_id and length")
    parser.add_argument("output", type=Path, metavar="DATABASE", help="window database to write, for one split")
    numbers = {
        "--window-size": (8192, "bases of a window; the --seq-length of the training"),
        "--stride": (7992, "bases from the start of a window to that of the next"),
        "--window-min-length-threshold": (0, "leave out windows with fewer bases"),
    }
    for flag, (default, meaning) in numbers.items():
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    parser.add_argument(
        "--drop-tails",
        action="store_true",
        help="leave out what follows a contig's last whole stride, as former versions did",
    )
    return top


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _precompute, argv)


def _precompute(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging()
    command.clean_up_when_terminated()

    from evo2_megatron.tasks.preparation.precompute_windows import WindowPlan, precompute_windows

    plan = WindowPlan(args.window_size, args.stride, args.window_min_length_threshold)
    totals = precompute_windows(args.table, args.output, plan, drop_tails=args.drop_tails)
    print(f"{args.output}: {totals.num_windows} windows of {totals.num_sequences} contigs")


if __name__ == "__main__":
    main()
