# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from evo2_megatron.checkpoint import run_checkpoints
from evo2_megatron.checkpoint.layout import TRACKER
from evo2_megatron.config import UserError


def make(folder: Path, *numbers: int, files: tuple[str, ...] = (".metadata", "run_config.yaml")) -> None:
    for number in numbers:
        part = folder / f"iter_{number:07d}"
        part.mkdir(parents=True)
        for name in files:
            (part / name).write_text("x")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_newest(tmp_path):
    assert run_checkpoints.newest(tmp_path / "none") is None
    make(tmp_path, 3, 12)
    make(tmp_path, 15, files=(".metadata",))
    for text in ("", "15", "12"):  # missing, of one that was not finished, right
        if text:
            (tmp_path / TRACKER).write_text(text)
        assert run_checkpoints.newest(tmp_path) == tmp_path / "iter_0000012"
    (tmp_path / TRACKER).write_text("3")
    with pytest.raises(UserError, match="has iter_0000012, newer than iter_0000003 that .*; move the newer ones away"):
        run_checkpoints.newest(tmp_path)


def test_tidy(tmp_path):
    run_checkpoints.tidy(tmp_path / "none", None)
    make(tmp_path, 3, 12)
    make(tmp_path, 15, files=(".metadata", "common.pt"))  # whole weights: left to be written over
    make(tmp_path, 18, files=("common.pt", "__0_0.distcp"))
    make(tmp_path, 1)
    (tmp_path / "iter_0000001").rename(tmp_path / ".iter_0000001.removed")
    (tmp_path / TRACKER).write_text("")  # cut off
    run_checkpoints.tidy(tmp_path, tmp_path / "iter_0000012")
    assert names(tmp_path) == {"iter_0000003", "iter_0000012", "iter_0000015", TRACKER}
    assert (tmp_path / TRACKER).read_text() == "12"


def test_keep_newest_counts_complete_ones(tmp_path):
    make(tmp_path, 3, 6, 9, 100)
    make(tmp_path, 103, files=(".metadata",))
    run_checkpoints.keep_newest(tmp_path, 2)
    assert names(tmp_path) == {"iter_0000009", "iter_0000100", "iter_0000103"}


def test_what_others_keep_there_is_theirs(tmp_path):
    make(tmp_path, 3, 6, 9)
    (tmp_path / "iter_0000009").rename(tmp_path / "iter_0000006_copy")
    (tmp_path / "iter_notes").mkdir()
    (tmp_path / "iter_list.txt").write_text("x")
    assert run_checkpoints.newest(tmp_path) == tmp_path / "iter_0000006"
    run_checkpoints.tidy(tmp_path, tmp_path / "iter_0000006")
    run_checkpoints.keep_newest(tmp_path, 1)
    assert names(tmp_path) == {"iter_0000006", "iter_0000006_copy", "iter_notes", "iter_list.txt", TRACKER}


def test_one_run_at_a_time(tmp_path):
    other = "import sys; from pathlib import Path; from evo2_megatron.checkpoint.run_checkpoints import locked\n"
    other += "with locked(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", other, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match="another run is writing to"), run_checkpoints.locked(tmp_path):
            pass
        process.kill()
        process.wait()
        with run_checkpoints.locked(tmp_path):
            pass


def test_room(tmp_path):
    run_checkpoints.check_room(tmp_path, 1)
    with pytest.raises(UserError, match=r"a checkpoint takes about 1e\+09 GB, and the disk of .* make room"):
        run_checkpoints.check_room(tmp_path, 10**18)


def test_what_the_disk_refuses_is_one_line(tmp_path, megatron):
    from torch.distributed.checkpoint.api import CheckpointException

    def fail(state, error):
        raise error

    make(tmp_path, 3)
    state = SimpleNamespace(cfg=SimpleNamespace(checkpoint=SimpleNamespace(save=str(tmp_path))))
    full = OSError(28, "No space left on device")
    for error in (full, CheckpointException("write", {1: (full, None)})):
        with pytest.raises(
            UserError, match=r"MB free \(No space left on device\); iter_0000003 is complete"
        ) as caught:
            run_checkpoints._with_one_line(fail)(state, error)
        assert "\n" not in str(caught.value)


def test_run_config_is_whole_or_not_there(tmp_path, megatron, monkeypatch):
    from megatron.bridge.training.config import ConfigContainer

    from evo2_megatron.recipes.options import TrainingOptions
    from evo2_megatron.recipes.pretrain import pretrain_config

    run_checkpoints.make_saving_safe()
    config = pretrain_config(TrainingOptions(mock_data=True, model_size="evo2_tiny"))
    config.to_yaml(str(tmp_path / "run_config.yaml"))
    assert names(tmp_path) == {"run_config.yaml"}
    (tmp_path / "run_config.yaml").unlink()
    monkeypatch.setattr("yaml.safe_dump", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ConfigContainer.to_yaml(config, str(tmp_path / "run_config.yaml"))
    assert "run_config.yaml" not in names(tmp_path)
