# SPDX-License-Identifier: Apache-2.0
"""Flag groups of the commands that run a trained model: how it computes, and how long sequences go through."""

from __future__ import annotations

import argparse
from typing import Any

from evo2_megatron.cli import groups
from evo2_megatron.config import Fp8Choice


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
    add_int8_weights(group)
    groups.add_kernels(group)


def add_int8_weights(parser: argparse._ActionsContainer, *, default: str = "if the checkpoint was trained so") -> None:
    """Add ``--int8-weights``; ``default``: what happens without it."""
    parser.add_argument(
        "--int8-weights",
        action=argparse.BooleanOptionalAction,
        help="keep the weights of the linear layers in 8 bits: a quarter of the memory of float32, half of that of "
        f"16 bits, and results that differ a little (default: {default})",
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
        "int8_weights": args.int8_weights,
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
