# SPDX-License-Identifier: Apache-2.0
"""Serve a trained model over HTTP: generate, score, embed, effects of variants; one request or many at a time."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Sequence
from pathlib import Path

from evo2_megatron.cli import command, generation_groups, groups, launch_groups, model_groups
from evo2_megatron.config import ParallelConfig

PROG = "evo2_serve"


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = command.Parser(PROG, __doc__)
    generation_groups.add_checkpoint(parser)
    parser.add_argument_group("variants").add_argument(
        "--fasta",
        type=Path,
        metavar="FILE",
        help="genome of the variants that /v1/variants is asked about, plain, gzip or bgzip (default: they come with "
        "their sequence)",
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="interface to listen on; 0.0.0.0 is all of them, for anybody who reaches it (default: 127.0.0.1)",
    )
    network.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="port, or 0 for any that is free (default: 8000)"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-seq-length",
        type=groups.positive_int,
        metavar="N",
        help="longest sequence, prompt and completion together (default: what the model was trained for, if memory "
        "allows)",
    )
    limits.add_argument(
        "--max-batch-size",
        type=groups.positive_int,
        default=16,
        metavar="N",
        help="sequences that are generated at a time (default: 16)",
    )
    limits.add_argument(
        "--max-queue",
        type=groups.positive_int,
        default=128,
        metavar="N",
        help="requests that may wait; further ones get status 503 and when to try again (default: 128)",
    )
    model_groups.add_precision_and_kernels(parser)
    launch_groups.add_devices(parser, divides=True).add_argument(
        "--tensor-parallel-size",
        type=groups.positive_int,
        default=1,
        metavar="N",
        help="processes that split each weight matrix; of --devices, the rest are copies of the model (default: 1)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``evo2_serve``."""
    command.run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging()
    parallel = ParallelConfig(tensor=args.tensor_parallel_size)
    if launch_groups.model_on_devices(args, argv, parallel=parallel, ended_by=(signal.SIGTERM, signal.SIGINT)):
        return

    from evo2_megatron.tasks.server.engine import ModelSettings  # torch loads here, not for --help
    from evo2_megatron.tasks.server.serve import serve

    settings = ModelSettings(
        ckpt_dir=args.ckpt_dir,
        base_ckpt_dir=groups.base_checkpoint(args),
        precision=groups.precision(args),
        fp8=model_groups.fp8_choice(args),
        provider_overrides=model_groups.provider_overrides(args),
        with_self_test=bool(groups.self_test(args)),
        tensor_parallel_size=args.tensor_parallel_size,
        max_seq_length=args.max_seq_length,
        max_batch_size=args.max_batch_size,
        max_queue=args.max_queue,
    )
    serve(settings, fasta=args.fasta, host=args.host, port=args.port)


def _port(text: str) -> int:
    value = groups.non_negative_int(text)
    if value >= 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 65535")
    return value


if __name__ == "__main__":
    main()
