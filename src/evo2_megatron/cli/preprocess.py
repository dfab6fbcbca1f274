# SPDX-License-Identifier: Apache-2.0
"""Make Megatron datasets (.bin and .idx) for training from FASTA files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command

_PROG = "preprocess_evo2"


def build_parser() -> command.Parser:
    """The command line."""
    parser = command.Parser(_PROG, __doc__)
    parser.add_argument_group("data").add_argument(
        "-c", "--config", type=Path, required=True, metavar="FILE", help="YAML list with one mapping per dataset"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="count records, bases and the tokens of each split, check everything, and write nothing",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _preprocess, argv)


def _preprocess(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.clean_up_when_terminated()

    from evo2_megatron.tasks.preparation.preprocess import check, count, preprocess, progress_bar

    configs, notes = check(args.config)
    for note in notes:
        _note(note)
    for config in configs:
        with progress_bar(config) as watch:
            summary = (count if args.dry_run else preprocess)(config, watch=watch)
        print(summary.table() if args.dry_run else summary, flush=True)
        for note in summary.notes:
            _note(note)


def _note(text: str) -> None:
    print(f"{_PROG}: note: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
