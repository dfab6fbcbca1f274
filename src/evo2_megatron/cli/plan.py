# SPDX-License-Identifier: Apache-2.0
"""Say how much memory and how many operations a training step takes on every GPU, without a GPU.

The model and the schedule of train_evo2 run on tensors that have a shape but no memory. Not counted: the CUDA context,
buffers of the communication library, and gaps between tensors, together a few GB.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evo2_megatron.cli import groups

if TYPE_CHECKING:
    from evo2_megatron.tasks.plan import Plan

PROG = "evo2_plan"


def build_parser() -> argparse.ArgumentParser:
    """Flags of train_evo2 that decide about memory, and the machine."""
    parser = groups.Parser(PROG, __doc__)
    model = parser.add_argument_group("model")
    groups.add_sizes(model)
    model.add_argument(
        "--vocab-size", type=groups.positive_int, default=512, metavar="N", help="rows of embedding (default: 512)"
    )
    batch = parser.add_argument_group("sequences and batch")
    batch.add_argument(
        "--seq-length", type=groups.positive_int, metavar="N", help="context length in tokens (default: 8192)"
    )
    groups.add_batch(batch)
    groups.add_parallel(parser)
    groups.add_precision(parser.add_argument_group("precision"))
    groups.add_recompute(parser)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--num-gpus",
        type=groups.positive_int,
        metavar="N",
        help="GPUs of all nodes together; the optimizer is split over the copies of the model (default: one copy)",
    )
    machine.add_argument("--gpu-memory", type=float, default=80.0, metavar="GB", help="of one GPU (default: 80)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``evo2_plan``."""
    groups.run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    groups.set_up_logging()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # that fake groups have no real backend

    from evo2_megatron.tasks.plan import nearest_fit, plan

    parallel = groups.parallel(args)
    num_gpus = args.num_gpus or parallel.model_size
    options = {
        "seq_length": args.seq_length,
        "precision": groups.precision(args),
        **groups.sizes(args),
        **groups.batch(args),
        **groups.recompute(args),
    }
    given = {name: value for name, value in options.items() if value is not None} | {"vocab_size": args.vocab_size}
    planned = plan(num_gpus, args.recipe, parallel=parallel, **given)
    _show(planned)
    gpu_bytes = args.gpu_memory * 1e9
    needed = f"{planned.worst.total_bytes / 1e9:.1f} GB on stage {planned.worst.stage}"
    if planned.worst.total_bytes <= gpu_bytes:
        print(f"fits {args.gpu_memory:g} GB: {needed}")
        return
    print(f"does not fit {args.gpu_memory:g} GB: {needed}")
    layout = nearest_fit(num_gpus, gpu_bytes, args.recipe, parallel=parallel, **given)
    if layout is not None:
        sizes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context}"
        print(f"fits on as many GPUs with {sizes}")


def _show(planned: Plan) -> None:
    print(f"parameters {planned.parameters:,}, model FLOPs per step {planned.model_flops:.3g} on all GPUs together")
    print("stage    parameters  weights+gradients  optimizer  activations     total  FLOPs per step  (GB, per GPU)")
    for stage in planned.stages:
        gigabytes = (stage.weight_bytes, stage.optimizer_bytes, stage.activation_bytes, stage.total_bytes)
        figures = "{:19.2f}{:11.2f}{:13.2f}{:10.2f}".format(*(number / 1e9 for number in gigabytes))
        print(f"{stage.stage:5}{stage.parameters:14,}{figures}{stage.flops:16.3g}")


if __name__ == "__main__":
    main()
