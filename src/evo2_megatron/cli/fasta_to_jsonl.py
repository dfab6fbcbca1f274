# SPDX-License-Identifier: Apache-2.0
"""Write the records of a FASTA file as JSON Lines, such as prompts: {"id": ..., "prompt": ...}."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command

_PROG = "bionemo_fasta_to_jsonl"


def build_parser() -> command.Parser:
    """The command line."""
    parser = command.Parser(_PROG, __doc__)
    parser.add_argument("input", type=Path, help="FASTA file, plain or gzip")
    parser.add_argument("output", type=Path, help="JSON Lines file to write")
    parser.add_argument("--upper", action="store_true", help="write sequences in upper case")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _convert, argv)


def _convert(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.clean_up_when_terminated()
    if not args.input.exists():  # scripts look for this message and this status
        print(f"Error: input file not found: {args.input}", file=sys.stderr)
        sys.exit(1)

    from evo2_megatron.tasks.preparation.fasta_to_jsonl import fasta_to_jsonl

    num_records = fasta_to_jsonl(args.input, args.output, uppercase=args.upper)
    print(f"Wrote {num_records} record(s) to {args.output}")


if __name__ == "__main__":
    main()
