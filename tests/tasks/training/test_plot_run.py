# SPDX-License-Identifier: Apache-2.0
"""Curves from real TensorBoard files, and a picture with something in it."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from evo2_megatron.cli import plot_run
from evo2_megatron.config import UserError
from evo2_megatron.tasks.training.plot_run import Curve, plot_runs, read_curves


def write_run(folder, losses, first=1):
    with SummaryWriter(str(folder / "tb_logs")) as writer:
        for step, loss in enumerate(losses, first):
            writer.add_scalar("lm loss", loss, step)
            writer.add_scalar("learning-rate", 1e-3, step)
            writer.add_scalar("grad-norm", 2.0, step)
        writer.add_scalar("lm loss validation", losses[-1] + 0.1, first + len(losses) - 1)
    return folder


def test_steps_done_again_after_a_restart(tmp_path):
    write_run(tmp_path, [5.0, 4.0, 3.0])
    write_run(tmp_path, [3.5, 2.5], first=3)
    curve = read_curves(tmp_path)["lm loss"]
    assert curve.steps.tolist() == [1, 2, 3, 4] and curve.values.tolist() == [5.0, 4.0, 3.5, 2.5]
    assert read_curves(tmp_path / "tb_logs").keys() == {"lm loss", "lm loss validation", "learning-rate", "grad-norm"}


@pytest.mark.parametrize(
    "size, expected", [(1, [4, 2, 6, 0]), (2, [3, 4, 3, 0]), (3, [3, 4, 8 / 3, 3]), (9, [3, 3, 3, 3])]
)
def test_smoothing(size, expected):
    curve = Curve(np.arange(4), np.array([4.0, 2.0, 6.0, 0.0])).smoothed(size)
    assert curve.values.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("spike", [np.inf, np.nan, 1e30])
def test_a_spike_leaves_what_comes_after_it(spike):
    curve = Curve(np.arange(9), np.array([2.0, 2.0, spike, *[0.5] * 6]))
    assert curve.smoothed(1).values[3:].tolist() == [0.5] * 6
    assert curve.smoothed(3).values[[0, *range(4, 9)]].tolist() == [2.0] + [0.5] * 5


def test_picture(tmp_path, capsys):
    import matplotlib.image

    runs = [
        write_run(tmp_path / name, [5.0, 4.0 - shift, 3.0 - shift]) for shift, name in enumerate(("a/evo2", "b/evo2"))
    ]
    plot_run.main([*map(str, runs), "--output", str(tmp_path / "new" / "both.png"), "--smooth", "2"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "both.png")
    image = matplotlib.image.imread(tmp_path / "new" / "both.png")[:, :, :3]
    assert image.shape[0] > 500 and image.shape[1] > 500
    # a line of each run in its colour
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        assert (abs(image - np.array(colour) / 255).max(-1) < 0.02).sum() > 500
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["both.png"]


def test_names_in_the_legend(tmp_path):
    from evo2_megatron.tasks.training.plot_run import _name

    runs = [tmp_path / "a" / "evo2", tmp_path / "b" / "evo2", tmp_path / "c" / "other" / "tb_logs"]
    assert [_name(run, runs) for run in runs] == ["a/evo2", "b/evo2", "other"]


def test_nothing_to_draw(tmp_path, capsys):
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        plot_runs([tmp_path / "nowhere"], tmp_path / "x.png")
    with pytest.raises(SystemExit) as ending:
        plot_run.main([str(tmp_path), "-o", str(tmp_path / "x.png")])
    assert ending.value.code == 2 and not (tmp_path / "x.png").exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "has no loss curve; was the run" in error
    run = write_run(tmp_path / "run", [5.0, 4.0])
    with pytest.raises(UserError, match=f"has no loss curve; give the folder of a run, such as {run}"):
        plot_runs([tmp_path], tmp_path / "x.png")


def test_a_file_that_cannot_be_written(tmp_path):
    run = write_run(tmp_path / "run", [5.0, 4.0])
    (tmp_path / "file").touch()
    for output, named in ((tmp_path / "file" / "x.png", tmp_path / "file"), (tmp_path / "run", tmp_path / "run")):
        with pytest.raises(UserError, match=f"{named}(: .*; no result was written| is a folder)"):
            plot_runs([run], output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_files_that_are_broken(tmp_path):
    write_run(tmp_path, [5.0, 4.0, 3.0])
    (events,) = (tmp_path / "tb_logs").iterdir()
    events.write_bytes(b"\0" * events.stat().st_size)
    with pytest.raises(UserError, match="has no loss curve"):
        read_curves(tmp_path)
