# SPDX-License-Identifier: Apache-2.0
"""Draw how training runs went, from the TensorBoard files in their folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evo2_megatron.config import UserError
from evo2_megatron.tasks.transfer import disk_errors, new_files

_KINDS = {"training": "", "validation": " validation", "test": " test"}
"""Kinds of a curve, and how Bridge ends their tags."""

_LOSSES = {
    "lm loss": "loss, nat per token",
    "ce loss": "cross-entropy, nat",
    "bce loss": "binary cross-entropy, nat",
    "mse loss": "squared error, standardised",
}
_OTHERS = {"learning-rate": "learning rate", "grad-norm": "gradient norm"}
_TAGS = [name + ending for name in (*_LOSSES, "accuracy") for ending in _KINDS.values()] + list(_OTHERS)
_MARKERS = {"validation": "o", "test": "*"}
"""Of curves with few points."""


class Curve(NamedTuple):
    """Values over steps, one each, ascending."""

    steps: np.ndarray
    values: np.ndarray

    def smoothed(self, size: int) -> Curve:
        """The mean of the ``size`` values around each; near the ends of those of them that there are.

        Around, and not before: a mean of earlier values lags behind, so that falling training losses would look higher
        than the validation losses of the same steps.
        """
        if size == 1:
            return self
        # each mean by itself: in differences of running sums, a value that is infinite, no number or huge would take
        # all later ones with it
        places = range(len(self.values))
        around = (self.values[max(place - (size - 1) // 2, 0) : place + size // 2 + 1] for place in places)
        return Curve(self.steps, np.array([part.mean(dtype=np.float64) for part in around]))


def plot_runs(runs: Sequence[Path], output: Path, *, smooth: int = 1) -> None:
    """Draw loss, learning rate and gradient norm of one run or several to a PNG file; of heads their accuracy, too.

    Args:
        runs: Folders of runs, or their ``tb_logs``.
        output: File to write; its folder is made.
        smooth: Draw the mean over this many logged steps of training loss and gradient norm, and what they are the
            means of behind it.

    Raises:
        UserError: A folder is not there or has no curves, or the file cannot be written; nothing is.
    """
    curves = {_name(run, runs): read_curves(run) for run in runs}
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = _panels(curves.values())
    height = 2.4 * len(panels) + 1
    ratios = [2, *[1] * (len(panels) - 1)]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, height), sharex=True, layout="constrained", height_ratios=ratios
    )
    for number, (name, of_run) in enumerate(curves.items()):
        for panel, (_, tags) in zip(axes, panels):
            for tag, kind in tags.items():
                if tag in of_run:
                    style = {"color": f"C{number}", "label": f"{name}, {kind}"}
                    _draw(panel, kind, of_run[tag], 1 if tag == "learning-rate" else smooth, style)
    for panel, (title, tags) in zip(axes, panels):
        panel.set_ylabel(title)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if "learning-rate" in tags:
            panel.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    try:
        with disk_errors(), new_files([output]) as (partial,):
            figure.savefig(partial, format="png", dpi=150)
    finally:
        plt.close(figure)


def _panels(curves: Iterable[dict[str, Curve]]) -> list[tuple[str, dict[str, str]]]:
    """Titles from the top, and for each its tags with the kinds of their curves."""
    found = {tag for of_run in curves for tag in of_run}
    losses = {name: title for name, title in _LOSSES.items() if name in found or f"{name} validation" in found}
    panels = [
        (" or ".join(losses.values()) or "loss", {name + end: kind for name in losses for kind, end in _KINDS.items()})
    ]
    if any(tag.startswith("accuracy") for tag in found):
        panels.append(("accuracy", {"accuracy" + end: kind for kind, end in _KINDS.items()}))
    return panels + [(title, {tag: "training"}) for tag, title in _OTHERS.items()]


def _draw(panel, kind: str, curve: Curve, smooth: int, style: dict[str, str]) -> None:
    if kind in _MARKERS:
        panel.plot(*curve, marker=_MARKERS[kind], markersize=4, linestyle="--", linewidth=1, **style)
        return
    if smooth > 1:
        panel.plot(*curve, linewidth=0.7, alpha=0.3, color=style["color"])
    panel.plot(*curve.smoothed(smooth), linewidth=1.3, **style)


def read_curves(run: Path) -> dict[str, Curve]:
    """The scalars of a run by their tags; where a step was done again after a restart, the last value counts.

    Raises:
        UserError: There is no such folder, or nothing to draw in it.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not run.is_dir():
        raise UserError(f"there is no folder {run}; give the folder of a run, --result-dir/--experiment-name")
    folder = run / "tb_logs" if (run / "tb_logs").is_dir() else run
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in _TAGS:
        if tag in events.Tags()["scalars"]:
            last = {event.step: event.value for event in events.Scalars(tag)}
            steps = sorted(last)
            curves[tag] = Curve(np.array(steps), np.array([last[step] for step in steps]))
    if not curves:
        runs = sorted(logs.parent for logs in run.glob("*/tb_logs"))
        if runs:
            raise UserError(f"{folder} has no loss curve; give the folder of a run, such as {runs[0]}")
        raise UserError(f"{folder} has no loss curve; was the run started with --disable-tensorboard-logger?")
    return curves


def _name(run: Path, runs: Sequence[Path]) -> str:
    """The shortest end of the path that tells it from the others."""
    parts = run.absolute().parts
    if parts[-1] in ("tb_logs", "checkpoints"):
        parts = parts[:-1]
    for length in range(1, len(parts)):
        end = parts[-length:]
        others = [other.absolute().parts for other in runs if other != run]
        if not any(other[-length:] == end for other in others):
            return "/".join(end)
    return str(run)
