# SPDX-License-Identifier: Apache-2.0
"""The flag of commands that run in several processes, one a device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from evo2_megatron.cli import groups

_AUTO = "auto"


def add_devices(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add ``--devices``, which ``on_devices`` acts on, in a group of its own, which is returned."""
    group = parser.add_argument_group("launch")
    group.add_argument(
        "--devices",
        type=_devices,
        metavar="N",
        help="start N processes on this machine, one a GPU where there are any; auto: as many as there are GPUs; if "
        "torchrun has started them, it must agree (default: 1, or what torchrun says)",
    )
    return group


def on_devices(devices: int | str | None, argv: Sequence[str] | None, *, until_stopped: bool = False) -> bool:
    """``tasks.launch.on_devices`` of what ``--devices`` says and ``main`` was given."""
    if devices is None:
        return False

    from evo2_megatron.tasks import launch  # torch loads here, not for --help

    return launch.on_devices(None if devices == _AUTO else int(devices), argv, until_stopped=until_stopped)


def _devices(text: str) -> int | str:
    if text == _AUTO:
        return text
    try:
        return groups.positive_int(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor {_AUTO}") from None
