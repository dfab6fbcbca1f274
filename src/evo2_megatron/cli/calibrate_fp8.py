# SPDX-License-Identifier: Apache-2.0
"""Copy a checkpoint and give its FP8 input projections scales with which all inputs of some sequences just fit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command, groups, launch_groups, model_groups

PROG = "evo2_calibrate_fp8"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.Parser(PROG, __doc__)
    source = parser.add_argument_group("source")
    source.add_argument(
        "--ckpt-dir", type=Path, required=True, metavar="DIR", help="Megatron Bridge checkpoint, or a folder of them"
    )
    source.add_argument(
        "--fasta",
        type=Path,
        required=True,
        metavar="FILE",
        help="sequences like those the model will read, plain or gzip; some dozen of full length are enough",
    )
    source.add_argument(
        "--prepend-bos", action="store_true", help="start sequences with the token between documents, as in training"
    )
    source.add_argument(
        "--max-seq-length",
        type=groups.positive_int,
        metavar="N",
        help="longest sequence to accept (default: what the model was trained for)",
    )
    model_groups.add_chunk_length(source, "sequences")
    result = parser.add_argument_group("result")
    result.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="folder to write the new iter_* to"
    )
    result.add_argument(
        "--margin",
        type=groups.non_negative_int,
        default=0,
        metavar="N",
        help="leave room for inputs 2^N times as large as any seen here (default: 0)",
    )
    groups.add_self_test_numbers(result)
    groups.add_parallel(parser)
    launch_groups.add_devices(parser, divides=True)
    precision = parser.add_argument_group("precision and kernels, while it reads")
    groups.add_precision(precision)
    model_groups.add_fp8_choice(precision)
    groups.add_kernels(precision)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(PROG, _calibrate, argv)


def _calibrate(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging()
    if launch_groups.model_on_devices(args, argv, parallel=groups.parallel(args)):
        return

    # torch loads here, so --help stays instant
    from evo2_megatron.tasks.conversion.calibrate_fp8 import calibrate_fp8
    from evo2_megatron.tasks.scoring.prediction_settings import ModelChanges

    command.clean_up_when_terminated()
    written = calibrate_fp8(
        args.fasta,
        args.ckpt_dir,
        args.output_dir,
        margin=args.margin,
        changes=ModelChanges(
            fp8=model_groups.fp8_choice(args), use_subquadratic_ops=groups.use_subquadratic_ops(args)
        ),
        parallel=groups.parallel(args),
        precision=groups.precision(args),
        prepend_bos=args.prepend_bos,
        max_seq_length=args.max_seq_length,
        chunk_length=args.chunk_length,
        with_self_test=groups.self_test(args),
    )
    if written is not None:  # the first process
        print(written)


if __name__ == "__main__":
    main()
