# SPDX-License-Identifier: Apache-2.0
"""Copy the newest checkpoint of a training run without its optimizer state: a third of the size, the same weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command, groups

_PROG = "evo2_remove_optimizer"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.Parser(_PROG, __doc__)
    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument(
        "--src-ckpt-dir", type=Path, required=True, metavar="DIR", help="checkpoint, or a folder of them"
    )
    checkpoints.add_argument(
        "--dst-ckpt-dir", type=Path, required=True, metavar="DIR", help="folder to make; it must not exist"
    )
    parser.add_argument_group("checks").add_argument(
        "--verify", action="store_true", help="compare every weight, bit by bit"
    )
    groups.add_verbose(parser.add_argument_group("logging"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _remove, argv)


def _remove(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging(debug=args.verbose)
    command.clean_up_when_terminated()

    from evo2_megatron.tasks.conversion.export import remove_optimizer  # torch loads here, not for --help

    print(remove_optimizer(args.src_ckpt_dir, args.dst_ckpt_dir, verify=args.verify))


if __name__ == "__main__":
    main()
