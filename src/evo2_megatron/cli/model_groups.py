# SPDX-License-Identifier: Apache-2.0
"""Flag groups of the commands that run a trained model: how it computes, and how long sequences go through."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from evo2_megatron.cli import groups
from evo2_megatron.config import Fp8Choice, WeightFormat


def add_precision_and_kernels(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``groups.precision``, ``fp8_choice`` and ``provider_overrides`` read."""
    group = parser.add_argument_group("precision and kernels")
    groups.add_precision(group)
    group.add_argument(
        "--vortex-style-fp8",
        action="store_true",
        default=None,
        help="8-bit arithmetic in the Hyena input projections only, as the FP8-sensitive checkpoints were trained",
    )
    add_fp8_choice(group)
    add_quantize_weights(group)
    groups.add_kernels(group)


def add_quantize_weights(parser: argparse._ActionsContainer, *, default: str = "as in training") -> None:
    """Add ``--quantize-weights``; ``default``: what happens without it."""
    parser.add_argument(
        "--quantize-weights",
        choices=get_args(WeightFormat),
        help="keep the frozen weights of the linear layers in 8 or 4 bits: 50 or 28 %% of the memory of 16 bits, and "
        f"results that differ, with 4 more than with 8 (default: {default})",
    )


def add_fp8_choice(parser: argparse._ActionsContainer) -> None:
    """Add the flags that ``fp8_choice`` reads."""
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--fp8-emulation",
        action="store_true",
        help="round inputs and weights of the Hyena input projections to FP8, on any device (default: only with "
        "hardware for it)",
    )
    choice.add_argument(
        "--allow-precision-mismatch",
        action="store_true",
        help="run a checkpoint that asks for FP8 input projections without them (default: refuse)",
    )


def fp8_choice(args: argparse.Namespace) -> Fp8Choice:
    """What to do about 8-bit input projections."""
    if args.fp8_emulation:
        return "emulate"
    return "allow_mismatch" if args.allow_precision_mismatch else "as_asked"


def provider_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the model's configuration that were asked for; the checkpoint decides about the others."""
    switches = {
        "vortex_style_fp8": args.vortex_style_fp8,
        "use_subquadratic_ops": args.use_subquadratic_ops,
        "quantize_weights": args.quantize_weights,
    }
    return {name: value for name, value in switches.items() if value is not None}


def add_chunk_length(parser: argparse._ActionsContainer, what: str) -> None:
    """Add ``--chunk-length``; ``what`` goes through the model in pieces."""
    parser.add_argument(
        "--chunk-length",
        type=groups.positive_int,
        metavar="N",
        help=f"longer {what} are processed in pieces of N tokens; less memory, same result (default: 65536, and 4096 "
        "without a GPU)",
    )


def add_both_strands(parser: argparse._ActionsContainer) -> None:
    """Add ``--both-strands``."""
    parser.add_argument(
        "--both-strands", action="store_true", help="mean of the results of a sequence and its reverse complement"
    )
