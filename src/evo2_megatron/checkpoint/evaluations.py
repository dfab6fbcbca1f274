# SPDX-License-Identifier: Apache-2.0
"""What validations of a run found, in ``evaluations.json`` beside its checkpoints, and which checkpoint was best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evo2_megatron.checkpoint.layout import replace_text
from evo2_megatron.config import UserError

FILE = "evaluations.json"


class Evaluation(NamedTuple):
    """One validation."""

    step: int
    loss: float


def read_evaluations(folder: Path, *, until: int | None = None) -> list[Evaluation]:
    """Validations in the order of their steps; none where there is no file.

    Args:
        folder: Of the run's checkpoints.
        until: Step that the run goes on from: later ones were of a part that was lost.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / FILE
    try:
        found = [Evaluation(int(step), float(loss)) for step, loss in json.loads(path.read_text())]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError):
        raise UserError(f"{path} is no list of pairs of step and loss; remove it to go on without") from None
    return [evaluation for evaluation in found if until is None or evaluation.step <= until]


def write_evaluations(folder: Path, evaluations: Sequence[Evaluation]) -> None:
    """Replace the file, at once."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / FILE, json.dumps(evaluations))


def best(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """That of the lowest loss, of equal ones the first; None without any."""
    return min(evaluations, key=lambda evaluation: evaluation.loss, default=None)


def has_stalled(evaluations: Sequence[Evaluation], patience: int | None) -> bool:
    """Whether the last ``patience`` validations were no better than one before them; None: never."""
    if patience is None or len(evaluations) <= patience:
        return False
    before, last = evaluations[:-patience], evaluations[-patience:]
    return min(e.loss for e in last) >= min(e.loss for e in before)
