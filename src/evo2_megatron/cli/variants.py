# SPDX-License-Identifier: Apache-2.0
"""Score variants, of a VCF file or all in some intervals: how much less probable the genome is with each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command, groups, launch_groups, model_groups

PROG = "variants_evo2"


def build_parser() -> argparse.ArgumentParser:
    """All flags; None stands for "not given"."""
    parser = command.Parser(PROG, __doc__)
    source = parser.add_argument_group("source")
    variants = source.add_mutually_exclusive_group(required=True)
    variants.add_argument(
        "--vcf", type=Path, metavar="FILE", help="variants: VCF, plain, gzip or bgzip (default: none)"
    )
    variants.add_argument(
        "--saturate",
        type=Path,
        metavar="FILE",
        help="in place of variants, all three substitutions of every base in the intervals of a BED file "
        "(default: none)",
    )
    source.add_argument(
        "--fasta",
        type=Path,
        required=True,
        metavar="FILE",
        help="the genome they are about, plain, gzip or bgzip",
    )
    source.add_argument(
        "--ckpt-dir", type=Path, required=True, metavar="DIR", help="Megatron Bridge checkpoint, or a folder of them"
    )
    groups.add_base_checkpoint(source)
    groups.add_self_test(source)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="folder for the results, replacing earlier ones"
    )
    output.add_argument(
        "--output-format",
        nargs="+",
        choices=("tsv", "parquet", "vcf", "vcf.gz", "bedgraph", "bigwig"),
        default=["tsv"],
        metavar="FORMAT",
        help="tsv, parquet, or the VCF file with the scores in INFO: vcf, or vcf.gz (bgzip); with --saturate also the "
        "mean score of each base: bedgraph, bigwig (default: tsv)",
    )
    output.add_argument(
        "--log-prob-collapse-option",
        choices=("sum", "mean"),
        default="mean",
        help="difference of the log-likelihoods, or that per token (default: mean)",
    )
    _add_windows(parser)
    groups.add_parallel(parser)
    launch_groups.add_devices(parser, divides=True)
    model_groups.add_precision_and_kernels(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``variants_evo2``."""
    command.run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging()
    if launch_groups.model_on_devices(args, argv, parallel=groups.parallel(args)):
        return

    # torch loads here, so --help stays instant
    from evo2_megatron.tasks.scoring.prediction_settings import ModelChanges
    from evo2_megatron.tasks.scoring.variant_sources import Saturation, VcfFile
    from evo2_megatron.tasks.scoring.variants import VariantSettings, score_variants

    command.clean_up_when_terminated()
    score_variants(
        VcfFile(args.vcf) if args.vcf is not None else Saturation(args.saturate),
        args.fasta,
        args.ckpt_dir,
        output_dir=args.output_dir,
        formats=tuple(dict.fromkeys(args.output_format)),
        settings=VariantSettings(
            window_length=args.window_length,
            window_step=args.window_step,
            score=args.log_prob_collapse_option,
            both_strands=args.both_strands,
            prepend_bos=args.prepend_bos,
            shared_context=not args.no_shared_context,
            max_seq_length=args.max_seq_length,
            max_batch_tokens=args.max_batch_tokens,
            chunk_length=args.chunk_length,
        ),
        changes=ModelChanges(
            fp8=model_groups.fp8_choice(args),
            **model_groups.provider_overrides(args),
        ),
        parallel=groups.parallel(args),
        precision=groups.precision(args),
        base_ckpt_dir=groups.base_checkpoint(args),
        with_self_test=groups.self_test(args),
    )


def _add_windows(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("windows")
    number = {"type": groups.positive_int, "metavar": "N"}
    group.add_argument(
        "--window-length",
        **number,
        help="bases around a variant (default: 8192, or what the model was trained for if that is less)",
    )
    group.add_argument(
        "--window-step",
        **number,
        default=1,
        help="begin windows at multiples of N bases: variants that lie close share a reference window, which saves "
        "time, and are less than N bases off its middle (default: 1)",
    )
    model_groups.add_both_strands(group)
    group.add_argument(
        "--prepend-bos", action="store_true", help="start windows with the token between documents, as in training"
    )
    group.add_argument(
        "--max-seq-length", **number, help="longest window to accept (default: what the model was trained for)"
    )
    group.add_argument(
        "--no-shared-context",
        action="store_true",
        help="run each window from its start: slower, same scores; needed with --context-parallel-size",
    )
    group.add_argument(
        "--max-batch-tokens",
        **number,
        help="most tokens at a time; fewer if memory runs out (default: 65536, and 8448 without a GPU)",
    )
    model_groups.add_chunk_length(group, "windows")


if __name__ == "__main__":
    main()
