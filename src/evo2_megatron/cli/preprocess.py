# SPDX-License-Identifier: Apache-2.0
"""Make Megatron datasets (.bin and .idx) for training from FASTA files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import groups

_PROG = "preprocess_evo2"


def build_parser() -> groups.Parser:
    """The command line."""
    parser = groups.Parser(_PROG, __doc__)
    parser.add_argument_group("data").add_argument(
        "-c", "--config", type=Path, required=True, metavar="FILE", help="YAML list with one mapping per dataset"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    groups.run(_PROG, _preprocess, argv)


def _preprocess(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)

    from evo2_megatron.tasks.preprocess import check, preprocess

    configs, notes = check(args.config)
    for note in notes:
        print(f"{_PROG}: note: {note}", file=sys.stderr)
    for config in configs:
        print(preprocess(config), flush=True)
