# SPDX-License-Identifier: Apache-2.0
"""Make one whole checkpoint of LoRA adapters and the base model that they were trained on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command, groups

_PROG = "evo2_merge_lora"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.Parser(_PROG, __doc__)
    checkpoint, result = parser.add_argument_group("checkpoint"), parser.add_argument_group("result")
    checkpoint.add_argument(
        "--ckpt-dir", type=Path, required=True, metavar="DIR", help="checkpoint of a LoRA run, or a folder of them"
    )
    result.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="folder to write the merged iter_* to"
    )
    groups.add_base_checkpoint(checkpoint)
    result.add_argument(
        "--float32",
        action="store_true",
        help="store merged matrices in float32, so that nothing is rounded (default: as the base has them)",
    )
    result.add_argument(
        "--verify",
        action="store_true",
        help="run base with adapters and the result on the same sequences in float32 and refuse a result whose logits "
        "differ",
    )
    groups.add_self_test_numbers(result)
    groups.add_verbose(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _merge, argv)


def _merge(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging(debug=args.verbose)
    command.clean_up_when_terminated()

    from evo2_megatron.tasks.conversion.merge_lora import merge_lora  # torch loads here, not for --help

    written = merge_lora(
        args.ckpt_dir,
        args.output_dir,
        base_ckpt_dir=groups.base_checkpoint(args),
        float32=args.float32,
        verify=args.verify,
        with_self_test=groups.self_test(args),
    )
    print(written)


if __name__ == "__main__":
    main()
