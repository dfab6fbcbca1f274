# SPDX-License-Identifier: Apache-2.0
"""Convert a Savanna checkpoint, from a file or from Hugging Face, to a Megatron Bridge checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from evo2_megatron.cli import command, groups

_PROG = "evo2_convert_savanna_to_mbridge"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.Parser(_PROG, __doc__)
    source = parser.add_argument_group("source")
    source.add_argument(
        "--savanna-ckpt-path",
        required=True,
        metavar="PATH",
        help="file, its first part (.pt.part0), folder of mp_rank_* files, or Hugging Face repository owner/name",
    )
    source.add_argument("--revision", metavar="COMMIT", help="commit, branch or tag of the repository (default: main)")
    groups.add_conversion(parser).add_argument(
        "--no-te",
        action="store_true",
        help="name the norms as models without Transformer Engine do; all commands here read both",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _convert, argv)


def _convert(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging(debug=args.verbose)
    command.clean_up_when_terminated()

    from evo2_megatron.tasks.conversion.convert import Result, savanna_to_mbridge  # torch loads here, not for --help

    result = Result(**groups.conversion(args))
    print(
        savanna_to_mbridge(
            args.savanna_ckpt_path,
            result,
            revision=args.revision,
            unfused_names=args.no_te,
            verify=args.verify,
        )
    )


if __name__ == "__main__":
    main()
