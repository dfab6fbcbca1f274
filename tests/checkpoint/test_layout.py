# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a path means."""

import pytest

from evo2_megatron.checkpoint.layout import TRACKER, iteration_name, resolve_checkpoint_path, tokenizer_dir
from evo2_megatron.config import UserError


def make_iterations(folder, *, complete=(), interrupted=()):
    for number in (*complete, *interrupted):
        (folder / iteration_name(number)).mkdir()
    for number in complete:
        (folder / iteration_name(number) / "run_config.yaml").touch()


def test_a_checkpoint_is_itself(tmp_path):
    (tmp_path / "run_config.yaml").touch()
    make_iterations(tmp_path, complete=[3])
    assert resolve_checkpoint_path(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "tracker, expected", [(None, 100), ("20\n", 20), ("70", 100), ("release", 100), ("\xff", 100)]
)
def test_a_folder_of_iterations(tmp_path, tracker, expected):
    # as text, 9 would be the highest
    make_iterations(tmp_path, complete=[9, 20, 100], interrupted=[101])
    (tmp_path / "iter_x").mkdir()
    if tracker is not None:
        (tmp_path / TRACKER).write_bytes(tracker.encode("latin-1"))
    assert resolve_checkpoint_path(tmp_path) == tmp_path / iteration_name(expected)


def test_the_folder_of_a_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    make_iterations(tmp_path / "checkpoints", complete=[9], interrupted=[12])
    assert resolve_checkpoint_path(tmp_path) == tmp_path / "checkpoints" / iteration_name(9)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        resolve_checkpoint_path(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        resolve_checkpoint_path(tmp_path / "file")
    with pytest.raises(UserError, match="neither a run_config.yaml nor a folder named iter_<number>; give"):
        resolve_checkpoint_path(tmp_path)
    make_iterations(tmp_path, interrupted=[7])
    with pytest.raises(UserError, match="iter_0000007 has no run_config.yaml"):
        resolve_checkpoint_path(tmp_path)


@pytest.mark.parametrize("folder", ["run/checkpoints", "run"])
def test_the_folder_above_a_run(tmp_path, folder):
    """``--result-dir``, where ``--experiment-name`` is missing."""
    (tmp_path / folder).mkdir(parents=True)
    make_iterations(tmp_path / folder, complete=[9])
    with pytest.raises(UserError, match=rf"give the folder of a run \(here is {tmp_path}/run\), its 'checkpoints'"):
        resolve_checkpoint_path(tmp_path)


def test_tokenizer_dir(tmp_path):
    assert tokenizer_dir(tmp_path) is None
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").touch()
    assert tokenizer_dir(tmp_path) == tmp_path / "tokenizer"
