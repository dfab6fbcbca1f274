# SPDX-License-Identifier: Apache-2.0
"""Say how much memory and how many operations training, scoring or generation takes on every GPU, without a GPU.

The model and the schedule of train_evo2, predict_evo2 or infer_evo2 run on tensors that have a shape but no memory.
Not counted: the CUDA context, buffers of the communication library, and gaps between tensors, together a few GB.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evo2_megatron.cli import command, groups, model_groups, training_groups
from evo2_megatron.config import UserError
from evo2_megatron.tasks.planning.plan_cost import cost

if TYPE_CHECKING:
    from evo2_megatron.tasks.planning.plan import StagePlan

PROG = "evo2_plan"

_RECOMPUTE = (
    "--no-activation-checkpointing",
    "--selective-activation-checkpointing",
    "--activation-checkpoint-recompute-num-layers",
)


def build_parser() -> argparse.ArgumentParser:
    """Flags of train_evo2 that decide about memory, and the machine."""
    parser = command.Parser(PROG, __doc__)
    parser.add_argument_group("job").add_argument(
        "--for",
        dest="use",
        choices=("train", "score", "generate"),
        default="train",
        help="a step of training, a batch of predict_evo2, or prompt and caches of infer_evo2 (default: train)",
    )
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
    batch.add_argument(
        "--num-sequences",
        type=groups.positive_int,
        metavar="N",
        help="to score or generate: sequences that go through the model together (default: 1)",
    )
    batch.add_argument(
        "--chunk-length",
        type=groups.positive_int,
        metavar="N",
        help="to score or generate: longer sequences and prompts are processed in pieces of N tokens (default: 65536 "
        "and 2048)",
    )
    groups.add_parallel(parser)
    precision = parser.add_argument_group("precision")
    groups.add_precision(precision, default="bf16_mixed")
    model_groups.add_quantize_weights(precision, default="none")
    groups.add_recompute(parser)
    training_groups.add_lora(parser)
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--num-gpus",
        type=groups.positive_int,
        metavar="N",
        help="GPUs of all nodes together; the optimizer is split over the copies of the model (default: one copy)",
    )
    machine.add_argument(
        "--gpu-memory", type=groups.positive_float, default=80.0, metavar="GB", help="of one GPU (default: 80)"
    )
    _add_cost(parser)
    return parser


def _add_cost(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("time and price", "To train or score.")
    group.add_argument(
        "--tflops",
        type=groups.positive_float,
        metavar="X",
        help="10^12 operations per second that a GPU gets done, as train_evo2 logs them: also say how long it takes "
        "(default: say nothing)",
    )
    group.add_argument(
        "--num-tokens",
        type=groups.positive_float,
        metavar="N",
        help="tokens of the whole job, such as 1e9 (default: 1e6)",
    )
    group.add_argument(
        "--gpu-hour-price", type=groups.positive_float, metavar="X", help="also say what these cost (default: do not)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``evo2_plan``."""
    command.run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # that fake groups have no real backend

    if args.tflops is None and (args.num_tokens or args.gpu_hour_price):
        raise UserError("--num-tokens and --gpu-hour-price take the speed of a GPU; add --tflops")
    if args.use == "generate":
        _refuse(args, "--tflops")  # new tokens wait for memory, not for operations
    if args.use == "train":
        _refuse(args, "--num-sequences", "--chunk-length")
        _plan_training(args)
    else:
        lora = (f"--{name.replace('_', '-')}" for name in training_groups.lora(args) if name != "quantize_weights")
        _refuse(args, "--recipe", "--micro-batch-size", "--global-batch-size", "--num-gpus", *_RECOMPUTE, *lora)
        _plan_inference(args)


def _refuse(args: argparse.Namespace, *flags: str) -> None:
    for flag in flags:
        if getattr(args, flag.lstrip("-").replace("-", "_")) not in (None, False):
            raise UserError(f"{flag} says nothing about --for {args.use}; leave it out")


def _plan_training(args: argparse.Namespace) -> None:
    from evo2_megatron.tasks.planning.plan import nearest_fit, plan

    parallel = groups.parallel(args)
    num_gpus = args.num_gpus or parallel.model_size
    given = _given(args, groups.batch(args) | groups.recompute(args) | training_groups.lora(args))
    planned = plan(num_gpus, args.recipe, parallel=parallel, **given)
    print(f"parameters {planned.parameters:,}, model FLOPs per step {planned.model_flops:.3g} on all GPUs together")
    print("stage      parameters  weights+gradients  optimizer  activations     total  FLOPs per step  (GB, per GPU)")
    for stage in planned.stages:
        gigabytes = (stage.weight_bytes, stage.optimizer_bytes, stage.activation_bytes, stage.total_bytes)
        figures = "{:19.2f}{:11.2f}{:13.2f}{:10.2f}".format(*(number / 1e9 for number in gigabytes))
        print(f"{stage.stage:5}{stage.parameters:16,}{figures}{stage.flops:16.3g}")
    fits = _fits(planned.worst, args.gpu_memory)
    _say_cost(args, planned.model_flops / num_gpus, planned.num_tokens, num_gpus)
    if fits:
        return
    layout = nearest_fit(num_gpus, args.gpu_memory * 1e9, args.recipe, parallel=parallel, **given)
    if layout is not None:
        sizes = f"tensor {layout.tensor} x pipeline {layout.pipeline} x context {layout.context}"
        print(f"fits on as many GPUs with {sizes}")


def _plan_inference(args: argparse.Namespace) -> None:
    from evo2_megatron.tasks.planning import plan_inference as planning

    inference = planning.Inference(
        args.use, args.num_sequences or 1, args.chunk_length, args.quantize_weights or "none"
    )
    given = _given(args) | {"parallel": groups.parallel(args)}
    stages = planning.plan_inference(inference, **given)
    print("stage      parameters    weights  caches+activations     total  FLOPs per batch  (GB, per GPU)")
    for stage in stages:
        gigabytes = (stage.weight_bytes, stage.activation_bytes, stage.total_bytes)
        figures = "{:11.2f}{:20.2f}{:10.2f}".format(*(number / 1e9 for number in gigabytes))
        print(f"{stage.stage:5}{stage.parameters:16,}{figures}{stage.flops:17.3g}")
    _fits(max(stages, key=lambda stage: stage.total_bytes), args.gpu_memory)
    # stages work on a batch one after the other
    flops = sum(stage.flops for stage in stages)
    options = {name: value for name, value in given.items() if name != "vocab_size"}
    _say_cost(args, flops, planning.batch_tokens(inference, **options), given["parallel"].model_size)
    longest = planning.longest_sequence(inference, args.gpu_memory * 1e9, **given)
    if longest:
        most = planning.positions(**options)
        all_of_them = ", all that the model has positions for" if longest == most else ""
        print(f"longest sequence within {args.gpu_memory:g} GB: {longest:,} tokens{all_of_them}")
    else:
        print(f"not even {planning.SHORTEST} tokens fit; use --tensor-parallel-size or --pipeline-parallel-size")


def _given(args: argparse.Namespace, more: dict[str, Any] | None = None) -> dict[str, Any]:
    options = {"seq_length": args.seq_length, "precision": groups.precision(args)} | groups.sizes(args) | (more or {})
    return {name: value for name, value in options.items() if value is not None} | {"vocab_size": args.vocab_size}


def _fits(worst: StagePlan, gigabytes: float) -> bool:
    fits = worst.total_bytes <= gigabytes * 1e9
    verdict = "fits" if fits else "does not fit"
    print(f"{verdict} {gigabytes:g} GB: {worst.total_bytes / 1e9:.1f} GB on stage {worst.stage}")
    return fits


def _say_cost(args: argparse.Namespace, flops: float, num_tokens: int, num_gpus: int) -> None:
    """One line, if there is a speed to go by; ``flops``: of one GPU."""
    if args.tflops is None:
        return
    found, wanted = cost(flops, num_tokens, num_gpus, args.tflops), args.num_tokens or 1e6
    what = "step" if args.use == "train" else "batch"
    hours = found.gpu_hours(wanted)
    price = f", price {hours * args.gpu_hour_price:,.4g}" if args.gpu_hour_price else ""
    print(
        f"at {args.tflops:g} TFLOP/s: {found.seconds:.3g} s per {what}, {found.tokens_per_second:,.0f} tokens per "
        f"second and GPU; {wanted:,.0f} tokens take {hours:,.4g} GPU hours{price}"
    )


if __name__ == "__main__":
    main()
