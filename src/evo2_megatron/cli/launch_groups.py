# SPDX-License-Identifier: Apache-2.0
"""The flag of commands that run in several processes, one a device."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from functools import partial

from evo2_megatron.cli import groups
from evo2_megatron.config import ParallelConfig

_AUTO = "auto"


def add_devices(parser: argparse.ArgumentParser, *, divides: bool = False) -> argparse._ArgumentGroup:
    """Add ``--devices`` in a group of its own, which is returned.

    ``model_on_devices`` acts on it if it ``divides`` a model, else ``on_devices``.
    """
    group = parser.add_argument_group("launch")
    group.add_argument(
        "--devices",
        type=_devices,
        metavar="N",
        help="start N processes on this machine, one a GPU where there are any; auto: as many as there are GPUs"
        + (", over which a model that is too large for one is divided" if divides else "")
        + "; if torchrun has started them, it must agree (default: 1, or what torchrun says)",
    )
    return group


def on_devices(devices: int | str | None, argv: Sequence[str] | None, *, ended_by: Collection[int] = ()) -> bool:
    """``tasks.launch.on_devices`` of what ``--devices`` says and ``main`` was given; a model is not divided."""
    if devices is None:
        return False

    from evo2_megatron.tasks import launch  # torch loads here, not for --help

    return launch.on_devices(_number(devices), argv, ended_by=ended_by)


def model_on_devices(
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    *,
    parallel: ParallelConfig,
    copies: bool = True,
    ended_by: Collection[int] = (),
) -> bool:
    """The same for a command that runs the model of ``--ckpt-dir``: auto divides one that is too large for a GPU.

    Args:
        args: With the flags of ``add_devices`` and ``groups.add_precision``; those of ``groups.add_base_checkpoint``
            and ``model_groups.add_quantize_weights`` count where there are any.
        argv: What ``main`` was given.
        parallel: The layout that was asked for; any but the default is kept.
        copies, ended_by: As for ``tasks.launch.on_devices``.
    """
    if args.devices is None:
        return False

    from evo2_megatron.tasks import launch  # torch loads here, not for --help

    divide = None
    if args.devices == _AUTO and parallel.model_size == 1:
        from evo2_megatron.tasks import division

        divide = partial(
            division.tensor_parallel_size,
            args.ckpt_dir,
            base_ckpt_dir=vars(args).get("base_ckpt_dir"),
            precision=groups.precision(args),
            quantize_weights=vars(args).get("quantize_weights"),
        )
    return launch.on_devices(_number(args.devices), argv, divide=divide, copies=copies, ended_by=ended_by)


def _number(devices: int | str) -> int | None:
    return None if devices == _AUTO else int(devices)


def _devices(text: str) -> int | str:
    if text == _AUTO:
        return text
    try:
        return groups.positive_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor {_AUTO}") from None
