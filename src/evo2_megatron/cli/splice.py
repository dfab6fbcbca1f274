# SPDX-License-Identifier: Apache-2.0
"""Write the transcripts of a genome: exons joined 5' to 3', as FASTA with one record per transcript."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evo2_megatron.cli import command, groups

if TYPE_CHECKING:
    from evo2_megatron.tasks.preparation.splice import Problem

_PROG = "splice_evo2"
_SHOWN_PER_KIND = 5


def build_parser() -> command.Parser:
    """The command line."""
    parser = command.Parser(_PROG, __doc__)
    parser.add_argument("--fasta-path", type=Path, required=True, metavar="FILE", help="genome, plain or gzip")
    parser.add_argument(
        "--gtf-path", type=Path, required=True, metavar="FILE", help="annotation in GTF, plain or gzip"
    )
    parser.add_argument(
        "--output-path", type=Path, metavar="FILE", help="FASTA file to write (default: standard output)"
    )
    parser.add_argument(
        "--transcript-type",
        choices=("default", "stitched"),
        default="default",
        help="exons only, or exons with promoter and intron flanks, joined with @ (default: default)",
    )
    parser.add_argument(
        "--stitched-promoter",
        type=groups.non_negative_int,
        metavar="N",
        help="bases upstream of the first exon, with stitched (default: 1024)",
    )
    parser.add_argument(
        "--stitched-intron",
        type=groups.non_negative_int,
        metavar="N",
        help="bases on every other side of an exon, with stitched (default: 32)",
    )
    parser.add_argument(
        "--stitched-overlap",
        action="store_true",
        help="with stitched, let flanks overlap in an intron shorter than both; else each gets half of it",
    )
    parser.add_argument(
        "--only-longest-transcript", action="store_true", help="of each gene the transcript with the most exon bases"
    )
    parser.add_argument(
        "--bionemo-compatible",
        action="store_true",
        help="reproduce the output of BioNeMo's splice_evo2, its errors included: on the reverse strand only ACGT in "
        "upper case are complemented, and with stitched there is no @ on the forward strand",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="name every line and transcript that is left out, not only some"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _splice, argv)


def _splice(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.clean_up_when_terminated()

    from evo2_megatron.tasks.preparation.splice import StitchedSettings, splice

    given = {
        "promoter": args.stitched_promoter,
        "intron": args.stitched_intron,
        "overlap": args.stitched_overlap or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    stitched = StitchedSettings(**given) if args.transcript_type == "stitched" else None
    if stitched is None and given:
        _note(f"--stitched-{', --stitched-'.join(given)} has no effect without --transcript-type stitched")

    counts: Counter[str] = Counter()

    def report(problem: Problem) -> None:
        counts[problem.kind] += 1
        if args.verbose or counts[problem.kind] <= _SHOWN_PER_KIND:
            _note(f"{args.gtf_path} line {problem.line}: {problem.text}")
        elif counts[problem.kind] == _SHOWN_PER_KIND + 1:
            _note(f"more of these ({problem.kind}) are only counted; --verbose names all")

    summary = splice(
        args.fasta_path,
        args.gtf_path,
        args.output_path,
        stitched=stitched,
        only_longest=args.only_longest_transcript,
        former=args.bionemo_compatible,
        report=report,
    )
    print(f"{_PROG}: {summary}", file=sys.stderr)


def _note(text: str) -> None:
    print(f"{_PROG}: note: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
