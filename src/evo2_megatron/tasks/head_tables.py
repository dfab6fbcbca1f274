# SPDX-License-Identifier: Apache-2.0
"""Files of what a prediction head tells of sequences."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from evo2_megatron.config import UserError
from evo2_megatron.data.labelled import Labelled, Labels
from evo2_megatron.tasks.transfer import check_no_input, file_behind

SUFFIXES = (".tsv", ".csv", ".parquet")


def check_target(target: Path, beside: Path, source: Path) -> None:
    """Raise UserError for a file that cannot be written: of no kind, in no folder, or what is read.

    Args:
        target: The table.
        beside: Its manifest.
        source: The sequences.
    """
    if target.suffix not in SUFFIXES:
        raise UserError(f"{target}: the suffix says what is written; give one of {', '.join(SUFFIXES)}")
    for path in (target, beside):
        file_behind(path)
    check_no_input((target, beside), [source])
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {target}: {existing} is no folder that this user may write to")


def write(path: Path, suffix: str, labels: Labels, rows: Labelled, values_NC: np.ndarray) -> None:
    """Write one line per sequence: ``id``, ``length``, labels where they are known (``true_...``), predictions.

    Args:
        path: File to write.
        suffix: One of ``SUFFIXES``.
        labels: What was learnt.
        rows: The sequences, with labels where they have some.
        values_NC: Probabilities of classes or labels, or numbers, float64.
    """
    columns = {"id": rows.names, "length": [len(ids) for ids in rows.ids]}
    if not np.isnan(rows.targets).all():
        for name, target_N in zip(labels.columns, rows.targets.T):
            columns[f"true_{name}"] = _known(labels, target_N)
    if labels.task == "classification":
        columns["prediction"] = [labels.classes[number] for number in values_NC.argmax(1)]
    kind = "prediction" if labels.task == "regression" else "probability"
    for name, value_N in zip(labels.outputs, values_NC.T):
        columns[f"{kind}_{name}"] = value_N.astype(np.float32)
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table(columns), path)
        return
    with path.open("w", newline="") as file:
        # Arrow's own writer puts every text in quotes
        writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(_texts(column) for column in columns.values())))


def _texts(column: list | np.ndarray) -> list:
    """Numbers with nine digits, which tell every float32 apart; what is not known is empty."""
    return [f"{value:.9g}" if isinstance(value, float) else value for value in np.asarray(column).tolist()]


def _known(labels: Labels, target_N: np.ndarray) -> list[str | float | int | None]:
    known = [None if np.isnan(target) else float(target) for target in target_N]
    if labels.task == "regression":
        return known
    whole = [None if target is None else int(target) for target in known]
    if labels.task == "multilabel":
        return whole
    return [None if target is None else labels.classes[target] for target in whole]
