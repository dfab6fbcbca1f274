# SPDX-License-Identifier: Apache-2.0
"""Flag groups that only training has: sharded windows and LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evo2_megatron.cli.groups import comma_list, positive_int


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``windows`` reads, which go with ``--sharded-eden-data``."""
    group = parser.add_argument_group("sharded windows")
    group.add_argument(
        "--sequence-db-dir",
        type=Path,
        metavar="DIR",
        help="of <sample>/glm_dataset_<sample>.sqlite (default: none)",
    )
    for flag, split in (("--train", "training"), ("--val", "validation"), ("--test", "test")):
        meaning = f"{split} windows, made by bionemo_precompute_windows (default: none)"
        group.add_argument(f"{flag}-window-db", type=Path, metavar="FILE", help=meaning)
    for flag, kind in (("--stride", positive_int), ("--window-min-length-threshold", int)):
        group.add_argument(flag, type=kind, metavar="N", help="that the windows must have (default: any)")
    group.add_argument(
        "--rc-aug", action="store_true", default=None, help="read half of the training windows on the opposite strand"
    )
    group.add_argument(
        "--former-window-layout",
        action="store_true",
        default=None,
        help="as with the former loader, every window loses its last two bases and ends with EOS, and N and IUPAC "
        "codes are scored (default: EOS where a contig ends, and A, C, G and T are scored)",
    )


def windows(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``recipes.options.TrainingOptions``; None where the user did not speak."""
    return {
        "sharded_windows": args.sharded_eden_data,
        "sequence_db_dir": args.sequence_db_dir,
        "train_window_db": args.train_window_db,
        "valid_window_db": args.val_window_db,
        "test_window_db": args.test_window_db,
        "stride": args.stride,
        "window_min_length": args.window_min_length_threshold,
        "reverse_complement": args.rc_aug,
        "former_windows": args.former_window_layout,
    }


def add_lora(parser: argparse._ActionsContainer) -> argparse._ArgumentGroup:
    """Add the flags that ``lora`` reads, but for ``--quantize-weights``; the group that they are in."""
    group = parser.add_argument_group(
        "LoRA",
        "A module is named by its own name, or by a path in which * stands for any text; see docs/lora.md.",
    )
    group.add_argument(
        "--lora-finetune",
        action="store_true",
        default=None,
        help="freeze the weights that training starts from and train low-rank adapters",
    )
    group.add_argument("--lora-dim", type=positive_int, metavar="N", help="rank of the adapters (default: 16)")
    group.add_argument(
        "--lora-alpha", type=positive_int, metavar="N", help="adapters are scaled by this over the rank (default: 32)"
    )
    group.add_argument("--lora-dropout", type=float, metavar="X", help="on the adapters' input (default: 0.1)")
    group.add_argument(
        "--lora-target-modules",
        type=comma_list,
        metavar="LIST",
        help="modules that get an adapter "
        "(default: dense_projection,dense,linear_qkv,linear_proj,linear_fc1,linear_fc2)",
    )
    group.add_argument(
        "--lora-skip-freeze-modules",
        type=comma_list,
        metavar="LIST",
        help="modules that stay trainable, without an adapter (default: none)",
    )
    return group


def lora(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``tasks.training.train.train``; None where the user did not speak."""
    return {
        "lora_finetune": args.lora_finetune,
        "lora_dim": args.lora_dim,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "lora_target_modules": args.lora_target_modules,
        "lora_skip_freeze_modules": args.lora_skip_freeze_modules,
        "quantize_weights": args.quantize_weights,
    }
