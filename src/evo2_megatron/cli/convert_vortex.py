# SPDX-License-Identifier: Apache-2.0
"""Convert a file of Arc's Vortex to a Megatron Bridge checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command, groups

_PROG = "evo2_convert_vortex_to_mbridge"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.Parser(_PROG, __doc__)
    source = parser.add_argument_group("source")
    source.add_argument("--vortex-ckpt-path", type=Path, required=True, metavar="FILE", help="the model's .pt file")
    source.add_argument(
        "--vortex-config",
        type=Path,
        metavar="FILE",
        help="the model's .yml file: checked against --model-size, and its rotary base and scaling are taken "
        "(default: the model size's)",
    )
    groups.add_conversion(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _convert, argv)


def _convert(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging(debug=args.verbose)
    command.clean_up_when_terminated()

    from evo2_megatron.tasks.conversion.convert import Result, vortex_to_mbridge  # torch loads here, not for --help

    result = Result(**groups.conversion(args))
    print(vortex_to_mbridge(args.vortex_ckpt_path, result, config=args.vortex_config, verify=args.verify))


if __name__ == "__main__":
    main()
