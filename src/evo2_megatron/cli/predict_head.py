# SPDX-License-Identifier: Apache-2.0
"""Tell classes, labels or numbers of sequences, or of each base, with what evo2_train_head trained.

Where there are labels, a second file tells how good the predictions are. Several processes, by --devices or
torchrun, share the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command, groups, launch_groups, model_groups

_PROG = "evo2_predict_head"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command.Parser(_PROG, __doc__)
    data, model = parser.add_argument_group("sequences and result"), parser.add_argument_group("model")
    data.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="FASTA, or a table: .csv, .tsv, .jsonl or .parquet, with or without labels",
    )
    data.add_argument(
        "--output-file",
        type=Path,
        required=True,
        metavar="FILE",
        help="table to write: .tsv, .csv or .parquet; FILE.manifest.json beside it has the metrics",
    )
    data.add_argument(
        "--sequence-column", metavar="NAME", help="of a table: column of the bases (default: as in training)"
    )
    data.add_argument("--id-column", metavar="NAME", help="of a table: column of names (default: number of the row)")
    data.add_argument(
        "--both-strands",
        action=argparse.BooleanOptionalAction,
        help="mean of the outputs of a sequence and its reverse complement (default: as in training, which a head of "
        "bases always does)",
    )
    data.add_argument(
        "--tracks",
        choices=("bedgraph", "bigwig"),
        help="of a head of bases: also write a file for genome browsers beside FILE for each class, label or number "
        "(default: do not)",
    )
    model.add_argument(
        "--ckpt-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run of evo2_train_head, whose best checkpoint is taken, or one iter_* of it",
    )
    groups.add_base_checkpoint(model)
    groups.add_precision(model)
    model_groups.add_quantize_weights(model)
    model.add_argument(
        "--max-batch-tokens",
        type=groups.positive_int,
        metavar="N",
        help="most tokens of a forward pass; less if memory runs out (default: 65536, and 2048 without a GPU)",
    )
    launch_groups.add_devices(parser)
    groups.add_verbose(parser.add_argument_group("logging"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Console script."""
    command.run(_PROG, _predict, argv)


def _predict(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging(debug=args.verbose)
    if launch_groups.on_devices(args.devices, argv):
        return
    command.clean_up_when_terminated()

    from evo2_megatron.tasks.heads.predict_head import predict_head  # torch loads here, not for --help

    predict_head(
        args.data,
        args.ckpt_dir,
        args.output_file,
        sequence_column=args.sequence_column,
        id_column=args.id_column,
        both_strands=args.both_strands,
        base_ckpt_dir=groups.base_checkpoint(args),
        precision=groups.precision(args),
        quantize_weights=args.quantize_weights,
        max_batch_tokens=args.max_batch_tokens,
        tracks=args.tracks,
    )


if __name__ == "__main__":
    main()
