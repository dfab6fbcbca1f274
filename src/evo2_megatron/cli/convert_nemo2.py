# SPDX-License-Identifier: Apache-2.0
"""Convert a NeMo 2 checkpoint to a Megatron Bridge checkpoint, in a folder that must not exist yet."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command, groups

_PROG = "evo2_convert_nemo2_to_mbridge"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.Parser(_PROG, __doc__)
    parser.add_argument_group("source").add_argument(
        "--nemo2-ckpt-dir", type=Path, required=True, metavar="DIR", help="folder with the sub-folder 'weights'"
    )
    groups.add_conversion(parser, needs_seq_length=True)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _convert, argv)


def _convert(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging(debug=args.verbose)
    command.clean_up_when_terminated()

    from evo2_megatron.tasks.conversion.convert import Result, nemo2_to_mbridge  # torch loads here, not for --help

    print(nemo2_to_mbridge(args.nemo2_ckpt_dir, Result(**groups.conversion(args)), verify=args.verify))


if __name__ == "__main__":
    main()
