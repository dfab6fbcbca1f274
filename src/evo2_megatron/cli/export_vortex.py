# SPDX-License-Identifier: Apache-2.0
"""Export a Megatron Bridge checkpoint to a file for Arc's Vortex."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.architectures import ARCHITECTURES
from evo2_megatron.cli import command, groups

_PROG = "evo2_export_mbridge_to_vortex"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.Parser(_PROG, __doc__)
    source, result = (parser.add_argument_group(title) for title in ("source", "result"))
    source.add_argument(
        "--mbridge-ckpt-dir", type=Path, required=True, metavar="DIR", help="checkpoint, or a folder of them"
    )
    result.add_argument(
        "--output-path",
        type=Path,
        required=True,
        metavar="FILE",
        help="the .pt file to write; the .yml file that Vortex needs, and config.json, come beside it",
    )
    source.add_argument(
        "--model-size",
        choices=sorted(ARCHITECTURES),
        metavar="KEY",
        help="check that the checkpoint is of this size (default: export what its run_config.yaml says)",
    )
    source.add_argument(
        "--no-te",
        action="store_true",
        help="the checkpoint names its norms as models without Transformer Engine do; checked",
    )
    result.add_argument(
        "--bf16-inv-freq",
        action="store_true",
        help="round the rotary frequencies to bfloat16, as Arc's own files have them",
    )
    groups.add_verify(parser.add_argument_group("checks"))
    groups.add_verbose(parser.add_argument_group("logging"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _export, argv)


def _export(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging(debug=args.verbose)
    command.clean_up_when_terminated()

    from evo2_megatron.tasks.conversion.export import mbridge_to_vortex  # torch loads here, not for --help

    written = mbridge_to_vortex(
        args.mbridge_ckpt_dir,
        args.output_path,
        model_size=args.model_size,
        unfused_names=args.no_te,
        bf16_frequencies=args.bf16_inv_freq,
        verify=args.verify,
    )
    print(*written, sep="\n")


if __name__ == "__main__":
    main()
