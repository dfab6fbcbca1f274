# SPDX-License-Identifier: Apache-2.0
"""Flags that several commands share, with every accepted spelling, and types of arguments."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from evo2_megatron.architectures import ARCHITECTURES
from evo2_megatron.config import PRECISION_RECIPES, ParallelConfig


def add_parallel(parser: argparse._ActionsContainer) -> None:
    """Add the flags that ``parallel`` reads."""
    # first spelling is ours; the rest are what the former commands called it, and the abbreviations old scripts use
    group = parser.add_argument_group("parallelism")
    sizes = {
        "tensor": ("processes that split each weight matrix", "--tensor-model-parallel"),
        "pipeline": ("processes that split the stack of layers", "--pipeline-model-parallel"),
        "context": ("processes that split each sequence", "--context-parallel", "--context-model-parallel-size"),
    }
    for name, (meaning, *old) in sizes.items():
        group.add_argument(
            f"--{name}-parallel-size",
            *dict.fromkeys((f"--{name}-model-parallel-size", *old)),
            dest=f"{name}_parallel_size",
            type=positive_int,
            default=1,
            metavar="N",
            help=f"{meaning} (default: 1)",
        )
    group.add_argument(
        "--sequence-parallel",
        action=argparse.BooleanOptionalAction,
        help="split activations along the sequence between tensor-parallel regions (default: if tensor size > 1)",
    )


def parallel(args: argparse.Namespace) -> ParallelConfig:
    """The layout asked for on the command line."""
    return ParallelConfig(
        tensor=args.tensor_parallel_size,
        pipeline=args.pipeline_parallel_size,
        context=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel,
    )


def add_sizes(group: argparse._ActionsContainer) -> None:
    """Add ``--recipe``, read as ``args.recipe``, and the flags that ``sizes`` reads: which model is trained."""
    group.add_argument(
        "--recipe",
        metavar="NAME",
        help="what Arc trained a model with, in place of the defaults; other flags win over it (default: none; an "
        "unknown name lists them)",
    )
    known = ", ".join(sorted(ARCHITECTURES))
    group.add_argument("--model-size", metavar="KEY", help=f"one of {known} (default: evo2_1b_base)")
    group.add_argument("--num-layers", type=positive_int, metavar="N", help="layers (default: the model size's)")
    group.add_argument(
        "--hybrid-override-pattern",
        metavar="SYMBOLS",
        help="S, D, H or * for each layer (default: the model size's)",
    )
    group.add_argument(
        "--ffn-hidden-size",
        type=positive_int,
        metavar="N",
        help="channels of one half of the gated MLP (default: the model size's)",
    )
    group.add_argument(
        "--rotary-base", type=positive_int, metavar="N", help="of the rotary embedding (default: the model size's)"
    )
    group.add_argument(
        "--seq-len-interpolation-factor",
        type=float,
        metavar="X",
        help="positions are divided by this (default: the model size's)",
    )


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``TrainingOptions`` that choose the model; None where the user did not speak."""
    return {
        "model_size": args.model_size,
        "num_layers": args.num_layers,
        "hybrid_override_pattern": args.hybrid_override_pattern,
        "ffn_hidden_size": args.ffn_hidden_size,
        "rotary_base": args.rotary_base,
        "seq_len_interpolation_factor": args.seq_len_interpolation_factor,
    }


def add_batch(group: argparse._ActionsContainer) -> None:
    """Add the flags that ``batch`` reads."""
    group.add_argument(
        "--micro-batch-size", type=positive_int, metavar="N", help="samples at a time in each replica (default: 1)"
    )
    group.add_argument(
        "--global-batch-size", type=positive_int, metavar="N", help="samples of one optimizer step (default: 8)"
    )


def batch(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``TrainingOptions``; None where the user did not speak."""
    return {"micro_batch_size": args.micro_batch_size, "global_batch_size": args.global_batch_size}


def add_recompute(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``recompute`` reads."""
    group = parser.add_argument_group("activation recompute")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--no-activation-checkpointing", action="store_true", help="keep all activations (default: recompute them)"
    )
    kind.add_argument(
        "--selective-activation-checkpointing",
        action="store_true",
        help="recompute attention only, which saves next to nothing: no scores are kept anyway (default: layers)",
    )
    group.add_argument(
        "--activation-checkpoint-recompute-num-layers",
        type=positive_int,
        metavar="N",
        help="layers recomputed together, of which the first's input alone is kept (default: the model size's)",
    )


def recompute(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``TrainingOptions``; None where the user did not speak."""
    kind = "selective" if args.selective_activation_checkpointing else None
    return {
        "recompute": "none" if args.no_activation_checkpointing else kind,
        "recompute_num_layers": args.activation_checkpoint_recompute_num_layers,
    }


_PRECISION_DEFAULT = "the checkpoint's; else bf16_mixed, and fp32 without a GPU"


def add_precision(parser: argparse._ActionsContainer, *, default: str = _PRECISION_DEFAULT) -> None:
    """Add ``--mixed-precision-recipe``, read as ``precision(args)``; None means that the user did not say.

    ``default``: what happens then.
    """
    parser.add_argument(
        "--mixed-precision-recipe",
        choices=PRECISION_RECIPES,
        metavar="NAME",
        help="number formats, one of: fp32, " + ", ".join(n for n in PRECISION_RECIPES if "_" in n) + "; "
        f"hyphens may replace underscores (default: {default})",
    )


def precision(args: argparse.Namespace) -> str | None:
    """The precision recipe with underscores, or None if not given."""
    return args.mixed_precision_recipe and args.mixed_precision_recipe.replace("-", "_")


def add_kernels(parser: argparse._ActionsContainer) -> None:
    """Add ``--use-subquadratic-ops``; True if given, else None."""
    parser.add_argument(
        "--use-subquadratic-ops",
        action="store_true",
        default=None,
        help="compiled convolutions on CUDA: subquadratic-ops-torch, or Triton without it; the same results",
    )


def use_subquadratic_ops(args: argparse.Namespace) -> bool | None:
    """True if asked for, else None: the checkpoint or the recipe decides."""
    return args.use_subquadratic_ops


def add_base_checkpoint(parser: argparse._ActionsContainer) -> None:
    """Add ``--base-ckpt-dir``, read as ``base_checkpoint(args)``."""
    parser.add_argument(
        "--base-ckpt-dir",
        type=Path,
        metavar="DIR",
        help="of LoRA adapters: where the base model is now (default: where it was in training)",
    )


def base_checkpoint(args: argparse.Namespace) -> Path | None:
    """The folder given, or None: the checkpoint says."""
    return args.base_ckpt_dir


def add_conversion(parser: argparse.ArgumentParser, *, needs_seq_length: bool = False) -> argparse._ArgumentGroup:
    """Add the flags that ``conversion`` reads, ``--verify`` and ``--verbose``; returns the group of the result."""
    result, model = parser.add_argument_group("result"), parser.add_argument_group("model")
    result.add_argument("--mbridge-ckpt-dir", type=Path, required=True, metavar="DIR", help="folder for iter_0000001")
    known = sorted(ARCHITECTURES)
    model.add_argument("--model-size", choices=known, required=True, metavar="KEY", help=f"one of {', '.join(known)}")
    model.add_argument(
        "--tokenizer-path",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face tokenizer with as many tokens as the weights have embedding rows",
    )
    model.add_argument(
        "--seq-length",
        type=positive_int,
        required=needs_seq_length,
        metavar="N",
        help="longest sequence in tokens" + ("" if needs_seq_length else " (default: that of the model size)"),
    )
    model.add_argument(
        "--mixed-precision-recipe",
        choices=PRECISION_RECIPES,
        default="bf16_mixed",
        metavar="NAME",
        help="number formats to run the model in (default: bf16_mixed); with fp32, weights are stored in float32",
    )
    model.add_argument(
        "--vortex-style-fp8",
        action=argparse.BooleanOptionalAction,
        help="whether the model was trained with 8-bit arithmetic in the Hyena input projections, as Arc's 1B, 20B "
        "and 40B were; the checkpoint then asks to be run so (default: it does not ask)",
    )
    checks = parser.add_argument_group("checks")
    add_verify(checks)
    add_self_test_numbers(checks)
    add_verbose(parser.add_argument_group("logging"))
    return result


def conversion(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``tasks.conversion.convert.Result``."""
    return {
        "directory": args.mbridge_ckpt_dir,
        "tokenizer": args.tokenizer_path,
        "model_size": args.model_size,
        "recipe": precision(args),
        "seq_length": args.seq_length,
        "vortex_style_fp8": args.vortex_style_fp8,
        "self_test": self_test(args),
    }


def add_verify(parser: argparse._ActionsContainer) -> None:
    """Add ``--verify``."""
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run source and result on the same sequences in float32 and refuse a result whose logits differ",
    )


def add_self_test_numbers(parser: argparse._ActionsContainer) -> None:
    """Add ``--self-test`` and ``--no-self-test`` of commands that write a checkpoint, read by ``self_test``."""
    parser.add_argument(
        "--self-test",
        action=argparse.BooleanOptionalAction,
        help="score fixed sequences with the result and store how probable they are, for the --self-test of "
        "predict_evo2 and infer_evo2; one layer in memory at a time (default: for weights under 2 GB)",
    )


def add_self_test(parser: argparse._ActionsContainer) -> None:
    """Add ``--self-test`` of commands that run a model, read by ``self_test``."""
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="first score the sequences stored in the checkpoint, and end if the model finds them less or more "
        "probable than when it was converted",
    )


def self_test(args: argparse.Namespace) -> bool | None:
    """Whether to; None: the task decides."""
    return args.self_test


def add_verbose(parser: argparse._ActionsContainer) -> None:
    """Add ``-v`` and ``--verbose``."""
    parser.add_argument("-v", "--verbose", action="store_true", help="log everything")


def positive_int(text: str) -> int:
    """Argument type: a whole number of 1 or more."""
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def positive_float(text: str) -> float:
    """Argument type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def comma_list(text: str) -> list[str]:
    """Argument type: names with commas between them; spaces around them and empty ones do not count."""
    return [name.strip() for name in text.split(",") if name.strip()]


def non_negative_int(text: str) -> int:
    """Argument type: a whole number of 0 or more."""
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # argparse would show the name of our function
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
