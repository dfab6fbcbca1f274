# SPDX-License-Identifier: Apache-2.0
"""Runs of ``train_head`` in one process, since importing Megatron takes longer than a small run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_TRAIN = """
import json, sys
from pathlib import Path
from evo2_megatron.config import UserError
from evo2_megatron.recipes.head_options import HeadOptions
from evo2_megatron.tasks.train_head import train_head
for given in json.loads(sys.argv[1]):
    paths = {name: Path(value) for name, value in given.items() if name.endswith(("_data", "_dir"))}
    lists = {name: tuple(given[name]) for name in ("label_columns", "classes") if name in given}
    try:
        train_head(HeadOptions(**(given | paths | lists)))
    except UserError as error:
        print("ERROR", error, flush=True)
"""


def train_all(jobs: list[dict[str, Any]]) -> list[str]:
    """Fields of HeadOptions for each job; the errors of those that could not begin, in order."""
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN, json.dumps(jobs)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix("ERROR ") for line in done.stdout.splitlines() if line.startswith("ERROR")]


def scalars(run: Path, tag: str) -> dict[int, float]:
    """Steps and their first values in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb_logs"))
    events.Reload()
    first = {event.step: event.value for event in reversed(events.Scalars(tag))}
    return dict(sorted(first.items()))
