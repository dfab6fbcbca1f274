# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that appear when complete, and what is left of one whose writer was killed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evo2_megatron.checkpoint import layout
from evo2_megatron.checkpoint.write import check_new, new_checkpoint, remove_abandoned
from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import tokenizer_dir

WRITE = """
import sys, time
from pathlib import Path
from evo2_megatron.checkpoint.write import new_checkpoint
with new_checkpoint(Path(sys.argv[1])) as partial:
    (partial / "weights").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is writing a checkpoint to ``tmp_path/c``."""
    process = subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path / "c")], stdout=-1, text=True)
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_next_run_removes_what_a_killed_one_left(writer, tmp_path, caplog):
    folder = tmp_path / "c"
    writer.kill()
    writer.wait()
    (left,) = names(folder)
    assert left == f".iter_0000001.{writer.pid}.partial"
    with new_checkpoint(folder) as partial:
        assert names(folder) == [partial.name] and names(partial) == []
    assert names(folder) == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert f"Removing {folder / left}, which a run that was killed has left" in caplog.text


def test_who_still_writes_is_left_alone(writer, tmp_path):
    before = names(tmp_path / "c")
    remove_abandoned(tmp_path / "c")
    assert names(tmp_path / "c") == before and (tmp_path / "c" / before[0] / "weights").read_text() == "half"
    writer.kill()
    writer.wait()
    remove_abandoned(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    remove_abandoned(tmp_path / "c")


def test_other_files_stay(tmp_path):
    (tmp_path / ".iter_0000001.1.partial").mkdir()
    (tmp_path / "notes").write_text("mine")
    remove_abandoned(tmp_path)
    assert names(tmp_path) == ["notes"]


def test_a_disk_that_is_full_at_last_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("evo2_megatron.checkpoint.write.shutil.copyfile", full)
    with pytest.raises(OSError, match="No space"), new_checkpoint(tmp_path / "c") as partial:
        (partial / "train_state.pt").touch()
    assert not (tmp_path / "c").exists()
    monkeypatch.undo()
    with new_checkpoint(tmp_path / "c") as partial:
        (partial / "train_state.pt").touch()
    assert names(tmp_path / "c") == ["iter_0000001", "latest_checkpointed_iteration.txt", "latest_train_state.pt"]
    assert names(tmp_path / "c/iter_0000001") == ["SHA256SUMS", "train_state.pt"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_ctrl_c_at_the_very_end_leaves_a_whole_checkpoint(tmp_path, monkeypatch, number):
    def replace(*paths):
        real(*paths)
        done.append(paths)
        if len(done) == number:
            raise KeyboardInterrupt

    done, real = [], os.replace
    monkeypatch.setattr("evo2_megatron.checkpoint.write.os.replace", replace)
    with pytest.raises(KeyboardInterrupt), new_checkpoint(tmp_path / "c") as partial:
        (partial / "train_state.pt").touch()
    assert names(tmp_path / "c") == ["iter_0000001", "latest_checkpointed_iteration.txt", "latest_train_state.pt"]
    assert names(tmp_path / "c/iter_0000001") == ["SHA256SUMS", "train_state.pt"]


def test_a_kill_at_the_very_end_is_made_good(tmp_path):
    hidden = tmp_path / "iter_0000001/.latest_checkpointed_iteration.txt"
    hidden.parent.mkdir()
    hidden.write_text("1\n")
    with pytest.raises(UserError, match="exists already"):
        check_new(tmp_path)
    assert (tmp_path / hidden.name.removeprefix(".")).read_text() == "1\n" and not hidden.exists()


def test_a_folder_that_cannot_be_made_is_refused_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is no folder that this user may write to; choose another"):
        check_new(tmp_path / "file/new/folder")


def test_a_tokenizer_on_a_full_disk(tmp_path):
    """One error of the operating system, and not a list."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as full:
        layout.copy_tokenizer(tokenizer_dir(), tmp_path)
    assert full.value.errno == errno.ENOSPC
