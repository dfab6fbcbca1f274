# SPDX-License-Identifier: Apache-2.0
"""Score or embed every sequence of a FASTA file with a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command, groups, launch_groups, model_groups
from evo2_megatron.config import UserError

PROG = "predict_evo2"


def build_parser() -> argparse.ArgumentParser:
    """All flags; None stands for "not given"."""
    parser = command.Parser(PROG, __doc__)
    source = parser.add_argument_group("source")
    source.add_argument(
        "--fasta", type=Path, metavar="FILE", help="sequences, plain or gzip (default: none, with --self-test only)"
    )
    source.add_argument(
        "--ckpt-dir", type=Path, required=True, metavar="DIR", help="Megatron Bridge checkpoint, or a folder of them"
    )
    groups.add_base_checkpoint(source)
    groups.add_self_test(source)
    _add_output(parser)
    _add_sequences(parser)
    _add_windows(parser)
    _add_model(parser)
    groups.add_parallel(parser)
    model_groups.add_precision_and_kernels(parser)
    _add_launch(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``predict_evo2``."""
    command.run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging()
    if args.eden_tokenizer:
        raise UserError("--eden-tokenizer: the tokenizer comes from the checkpoint's folder 'tokenizer'; leave it out")
    if args.log_prob_collapse_option is not None and not args.output_log_prob_seqs:
        raise UserError("--log-prob-collapse-option says how to report log-probabilities; add --output-log-prob-seqs")
    if launch_groups.model_on_devices(args, argv, parallel=groups.parallel(args)):
        return

    if args.fasta is None:
        _self_test_alone(args)
        return

    # torch loads here, so --help stays instant
    from evo2_megatron.tasks.scoring.predict import check_nodes, predict
    from evo2_megatron.tasks.scoring.prediction_settings import Files, ModelChanges, Output, Sequences, Window

    command.clean_up_when_terminated()
    check_nodes(args.num_nodes)
    predict(
        args.fasta,
        args.ckpt_dir,
        output=Output(
            log_probs=(args.log_prob_collapse_option or "mean") if args.output_log_prob_seqs else None,
            base_values=tuple(dict.fromkeys(args.per_base_values)) if args.per_base_values else None,
            embedding_layers=tuple(args.embedding_layer or ()),
            pooling=Window(*args.pooling_window) if args.pooling_window else args.pooling,
        ),
        files=Files(
            output_dir=args.output_dir,
            formats=tuple(dict.fromkeys(args.output_format or ["tsv" if args.window_length else "pt"])),
            write_interval=args.write_interval,
            files_per_subdir=args.files_per_subdir,
        ),
        sequences=Sequences(
            prepend_bos=args.prepend_bos,
            mask_phylogenetic_tags=args.mask_phylogenetic_tags,
            keep_tag_case=args.keep_tag_case,
            both_strands=args.both_strands,
            max_seq_length=args.max_seq_length,
            micro_batch_size=args.micro_batch_size,
            max_batch_tokens=args.max_batch_tokens,
            min_length=args.min_length,
            chunk_length=args.chunk_length,
            window_length=args.window_length,
            window_overlap=args.window_overlap,
        ),
        changes=ModelChanges(
            num_layers=args.num_layers,
            hybrid_override_pattern=args.hybrid_override_pattern,
            seq_len_interpolation_factor=args.seq_len_interpolation_factor,
            fp8=model_groups.fp8_choice(args),
            **model_groups.provider_overrides(args),
        ),
        parallel=groups.parallel(args),
        precision=groups.precision(args),
        base_ckpt_dir=groups.base_checkpoint(args),
        with_self_test=groups.self_test(args),
    )


def _self_test_alone(args: argparse.Namespace) -> None:
    if not groups.self_test(args):
        raise UserError("the following arguments are required: --fasta (or --self-test, to check the model alone)")

    from evo2_megatron.tasks import self_test

    self_test.run(
        args.ckpt_dir,
        parallel=groups.parallel(args),
        precision=groups.precision(args),
        provider_overrides=model_groups.provider_overrides(args),
        base_ckpt_dir=groups.base_checkpoint(args),
        fp8=model_groups.fp8_choice(args),
    )


def _window(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST, two numbers such as 101:200")
    return int(first), int(last)


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="folder for the results, replacing earlier ones (default: none)"
    )
    group.add_argument(
        "--output-log-prob-seqs", action="store_true", help="log-probabilities in nat instead of logits"
    )
    group.add_argument(
        "--log-prob-collapse-option",
        choices=("sum", "mean", "per_token"),
        help="their sum over the sequence, their mean per scored base, or one per base (default: mean)",
    )
    group.add_argument(
        "--per-base-values",
        nargs="+",
        choices=("log_prob", "entropy"),
        metavar="NAME",
        help="with per_token: log_prob, and entropy of the prediction over the whole vocabulary in nat (default: "
        "log_prob)",
    )
    group.add_argument(
        "--embedding-layer",
        type=int,
        nargs="+",
        metavar="N",
        help="hidden states after these layers instead of logits; 0 is the first layer, -1 the last (default: logits)",
    )
    pooling = group.add_mutually_exclusive_group()
    pooling.add_argument(
        "--pooling",
        choices=("mean", "last"),
        help="one vector per sequence, the mean over its bases or that of the last (default: one per base)",
    )
    pooling.add_argument(
        "--pooling-window",
        type=_window,
        metavar="FIRST:LAST",
        help="the same, the mean over these bases, counted from 1 (default: none)",
    )
    group.add_argument(
        "--output-format",
        nargs="+",
        choices=("pt", "tsv", "parquet", "npz", "safetensors", "bedgraph", "bigwig"),
        metavar="FORMAT",
        help="pt; of log-probabilities also tsv, parquet, and per base bedgraph, bigwig; of embeddings parquet, npz, "
        "safetensors; of logits npz, safetensors (default: pt, and tsv with --window-length)",
    )
    group.add_argument(
        "--write-interval",
        choices=("epoch", "batch"),
        default="epoch",
        help="one file per copy of the model at the end, from memory; or one per batch at once (default: epoch)",
    )
    group.add_argument(
        "--files-per-subdir",
        type=groups.positive_int,
        metavar="N",
        help="with --write-interval batch: N files each in subdir_1, subdir_2, ... (default: all in one folder)",
    )


def _add_sequences(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sequences")
    group.add_argument(
        "--micro-batch-size",
        type=groups.positive_int,
        metavar="N",
        help="most sequences at a time (default: as --max-batch-tokens allows)",
    )
    group.add_argument(
        "--max-batch-tokens",
        type=groups.positive_int,
        metavar="N",
        help="most tokens at a time, of sequences of similar length; fewer if memory runs out (default: 65536, and "
        "2048 without a GPU)",
    )
    model_groups.add_both_strands(group)
    group.add_argument(
        "--min-length",
        type=groups.positive_int,
        default=1,
        metavar="N",
        help="pad every batch at least to this many tokens (default: do not)",
    )
    group.add_argument(
        "--prepend-bos",
        action="store_true",
        help="start sequences with the token between documents, so that the first base is scored too",
    )
    group.add_argument(
        "--mask-phylogenetic-tags", action="store_true", help="do not score lineage tags inside sequences"
    )
    group.add_argument(
        "--keep-tag-case",
        action="store_true",
        help="show lineage tags to the model as they are, not in upper case as in training",
    )
    group.add_argument(
        "--max-seq-length",
        type=groups.positive_int,
        metavar="N",
        help="longest sequence to accept, in tokens (default: what the model was trained for)",
    )
    model_groups.add_chunk_length(group, "sequences")
    group.add_argument("--eden-tokenizer", action="store_true", help=argparse.SUPPRESS)


def _add_windows(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("windows of long sequences")
    group.add_argument(
        "--window-length",
        type=groups.positive_int,
        metavar="N",
        help="with --output-log-prob-seqs: score longer sequences, genomes, in windows of N bases (default: whole)",
    )
    group.add_argument(
        "--window-overlap",
        type=groups.non_negative_int,
        metavar="N",
        help="bases that each base has before it in its window, at least (default: half of the window)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("changes to the model")
    group.add_argument(
        "--num-layers", type=groups.positive_int, metavar="N", help="use the first N layers only (default: all)"
    )
    group.add_argument(
        "--hybrid-override-pattern",
        metavar="PATTERN",
        help="the same, as the pattern of the layers to use: SDH* (default: all)",
    )
    group.add_argument(
        "--seq-len-interpolation-factor",
        type=groups.positive_int,
        metavar="N",
        help="divide positions by N in the attention layers (default: the checkpoint's)",
    )


def _add_launch(parser: argparse.ArgumentParser) -> None:
    launch_groups.add_devices(parser, divides=True).add_argument(
        "--num-nodes",
        type=groups.positive_int,
        metavar="N",
        help="machines, checked against what torchrun started (default: not checked)",
    )


if __name__ == "__main__":
    main()
