# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.recipes.options import TrainingOptions
from evo2_megatron.tasks.training import train_checks, wandb_run


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """Nobody is logged in and nobody can be asked."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # so that what the test leaves is undone
        monkeypatch.delenv(name)


def test_the_id_is_kept(tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("WANDB_MODE", "online")
    wandb_run.set_up(tmp_path, offline=True)
    chosen = os.environ["WANDB_RUN_ID"]
    assert os.environ["WANDB_MODE"] == "offline" and os.environ["WANDB_RESUME"] == "allow"
    assert (tmp_path / "wandb_run_id").read_text() == chosen and len(chosen) == 8
    monkeypatch.setenv("WANDB_RUN_ID", "of-another-run")
    wandb_run.set_up(tmp_path, offline=True)
    assert os.environ["WANDB_RUN_ID"] == chosen
    # what a full disk leaves
    (tmp_path / "wandb_run_id").write_text("")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    wandb_run.set_up(tmp_path, offline=True)
    assert (tmp_path / "wandb_run_id").read_text() == "chosen"


def test_online_without_an_account(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="No API key configured; run wandb login or set WANDB_API_KEY, or give"):
        wandb_run.set_up(tmp_path, offline=False)
    assert not (tmp_path / "wandb_run_id").exists()


def test_without_the_package(monkeypatch):
    real = train_checks.importlib.util.find_spec
    monkeypatch.setattr(train_checks.importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(UserError, match="needs the package wandb: pip install wandb"):
        train_checks.check(TrainingOptions(mock_data=True, model_size="evo2_tiny", wandb_project="p"))
