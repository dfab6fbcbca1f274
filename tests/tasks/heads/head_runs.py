# SPDX-License-Identifier: Apache-2.0
"""Runs of ``train_head`` in one process, since importing Megatron takes longer than a small run."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

LENGTH = 24
NUM_VALIDATION = 13  # no multiple of the batch

_TRAIN = """
import json, sys
from pathlib import Path
from evo2_megatron.config import UserError
from evo2_megatron.recipes.head_options import HeadOptions
from evo2_megatron.tasks.heads.train_head import train_head
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


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["name", *rows[0]])
        writer.writeheader()
        writer.writerows({"name": f"s{number}", **row} for number, row in enumerate(rows))
    return str(path)


def make_rows(count):
    """Unequal lengths, and classes that differ in what they are made of."""
    rng, rows = random.Random(0), []
    for number in range(count):
        label = int(number % 3 > 0)
        weights = ([5, 1, 1, 5], [1, 5, 5, 1])[label]
        bases = "".join(rng.choices("ACGT", weights=weights, k=rng.randint(9, LENGTH)))
        gc = sum(map(bases.count, "GC")) / len(bases)
        row = {"sequence": bases, "label": ("AT", "GC")[label], "gc": 100 * gc, "starts": int(bases[0] in "AC")}
        rows.append(row | {"rich": "" if number % 4 == 0 else int(gc > 0.5)})
    return rows


def predicted(runs, name, tmp_path, **options):
    from evo2_megatron.tasks.heads.predict_head import predict_head

    source = options.pop("source", runs[0] / "val.csv")
    target = tmp_path / "predictions.tsv"
    metrics = predict_head(source, runs[0] / name, target, **options)
    with target.open() as file:
        return list(csv.DictReader(file, delimiter="\t")), metrics


def model_section(runs, name):
    """What the first checkpoint of a run says of its model."""
    (path, *_) = sorted((runs[0] / name / "checkpoints").glob("iter_*/run_config.yaml"))
    return yaml.safe_load(path.read_text())["model"]


def give_output(monkeypatch, value):
    """From now on the first output of the third sequence, or of its first base, is this."""
    from evo2_megatron.tasks.heads import head_runner

    run = head_runner._HeadRunner.__call__

    def changed(self, items):
        batch = run(self, items)
        batch["outputs"][batch["seq_idx"] == 2, 0] = value
        return batch

    monkeypatch.setattr(head_runner._HeadRunner, "__call__", changed)
