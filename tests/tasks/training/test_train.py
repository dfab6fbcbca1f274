# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

WORKER = Path(__file__).with_name("train_runs.py")
SOURCE = Path(__file__).parents[3] / "src"

SMALL = {
    "mock_data": True,
    "model_size": "evo2_tiny",
    "seq_length": 64,
    "micro_batch_size": 2,
    "global_batch_size": 4,
    "max_steps": 6,
    "eval_interval": 3,
    "eval_iters": 1,
    "log_interval": 1,
    "workers": 0,
    # the random state matters only where something is drawn
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}

LOG_LINE = re.compile(
    r"iteration +(?P<step>\d+)/ +\d+ \| consumed samples: +(?P<samples>\d+) \|.* learning rate: (?P<lr>\S+) \|"
    r".* lm loss: (?P<loss>\S+) \|.* tokens per second: (?P<speed>[\d.]+) \| time left: \d+:\d\d:\d\d \|"
)


class Run(NamedTuple):
    """What one run printed."""

    losses: dict[int, float]
    samples: dict[int, int]
    text: str


def environment() -> dict[str, str]:
    # torchrun's variables of an outer run must not reach the inner one
    outer = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in outer} | {
        "PYTHONPATH": str(SOURCE),
        "OMP_NUM_THREADS": "1",
    }


def command(job: dict, processes: int) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    return [*launcher, str(WORKER), json.dumps(job, default=str)]


def train_all(
    runs: list[dict], *, compare: list[tuple[Path, Path]] = (), processes: int = 1
) -> tuple[list[Run], list[list[str]]]:
    """Train one after the other; what each printed, and the tensors in which pairs of checkpoints differ."""
    if processes > 1:
        # torchrun's processes can form a group only once
        return [launch({"runs": [run], "compare": []}, processes)[0][0] for run in runs], []
    return launch({"runs": runs, "compare": compare}, 1)


def launch(job: dict, processes: int) -> tuple[list[Run], list[list[str]]]:
    done = subprocess.run(
        command(job, processes), env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    printed, *comparisons = done.stdout.split("DIFFERENT ")
    texts = re.split(r"^RUN \d+\n", printed, flags=re.MULTILINE)[1:]
    different = [json.loads(line) for line in comparisons]
    assert (len(texts), len(different)) == (len(job["runs"]), len(job["compare"]))
    return [read(text) for text in texts], different


def read(text: str) -> Run:
    lines = [match for line in text.splitlines() if (match := LOG_LINE.search(line))]
    assert all(float(match["speed"]) > 0 for match in lines)
    losses = {int(match["step"]): float(match["loss"]) for match in lines}
    return Run(losses, {int(match["step"]): int(match["samples"]) for match in lines}, text)


def checkpoint(result_dir: Path, step: int) -> Path:
    return result_dir / "evo2" / "checkpoints" / f"iter_{step:07d}"


def run_config(folder: Path) -> dict:
    return yaml.safe_load((folder / "run_config.yaml").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict[str, Run], list[list[str]], Path]:
    """All the runs that the tests below look at, in one process."""
    root = tmp_path_factory.mktemp("runs")
    tune = SMALL | {"finetune_ckpt_dir": checkpoint(root / "whole", 6), "max_steps": 4, "lr": 1e-4}
    parent = checkpoint(root / "whole", 6).parent
    windows = SMALL | {"mock_data": False, "sharded_windows": True, "reverse_complement": True} | _windows(root)
    named = {
        "whole": SMALL | {"result_dir": root / "whole"},
        "first half": SMALL | {"result_dir": root / "halves", "early_stop_on_step": 3},
        "second half": SMALL | {"result_dir": root / "halves"},
        "nothing left": SMALL | {"result_dir": root / "halves"},
        "finished, wider model": SMALL | {"result_dir": root / "halves", "ffn_hidden_size": 96},
        "tune": tune | {"result_dir": root / "tuned", "early_stop_on_step": 2},
        "tune on": tune | {"result_dir": root / "tuned"},
        "tune from parent": tune | {"result_dir": root / "from_parent", "finetune_ckpt_dir": parent, "max_steps": 1},
        "tune other model": tune | {"result_dir": root / "other", "model_size": "striped_hyena_tiny_nv"},
        "tune wider model": tune | {"result_dir": root / "other", "ffn_hidden_size": 96},
        "tune other tokenizer": tune | {"result_dir": root / "other", "tokenizer": _tokenizer(512)},
        "odd pattern": SMALL | {"result_dir": root / "other", "num_layers": 6},
        "windows": windows | {"result_dir": root / "windows"},
        "windows, first half": windows | {"result_dir": root / "window_halves", "early_stop_on_step": 3},
        "windows, second half": windows | {"result_dir": root / "window_halves"},
        "too large": SMALL | {"result_dir": root / "large", "ffn_hidden_size": 10**11},
        "tune nothing": tune | {"result_dir": root / "other", "finetune_ckpt_dir": root},
    }
    done, different = train_all(
        list(named.values()),
        compare=[
            (checkpoint(root / "whole", 6), checkpoint(root / "halves", 6)),
            (checkpoint(root / "windows", 6), checkpoint(root / "window_halves", 6)),
        ],
    )
    return dict(zip(named, done, strict=True)), different, root


def _windows(root: Path) -> dict:
    """Databases of one sample whose contigs repeat three bases: something that can be learnt."""
    from evo2_megatron.data.window_database import WindowPlan, write_window_database

    contigs = {f"BCR__EXT-S__{i}": "ACG" * (30 + 10 * i) for i in range(5)}
    (root / "S").mkdir()
    with sqlite3.connect(root / "S" / "glm_dataset_S.sqlite") as database:
        database.execute("CREATE TABLE sequences (contig_id TEXT PRIMARY KEY, nt_sequence TEXT)")
        database.executemany("INSERT INTO sequences VALUES (?, ?)", contigs.items())
    plan = WindowPlan(window_size=SMALL["seq_length"], stride=60, min_length=0)
    write_window_database(root / "w.db", [(name, len(text)) for name, text in contigs.items()], plan)
    paths = {f"{split}_window_db": root / "w.db" for split in ("train", "valid", "test")}
    return {"sequence_db_dir": root, "stride": 60, **paths}


def _tokenizer(size: int) -> Path:
    from evo2_megatron.data.tokenizer import tokenizer_dir

    return tokenizer_dir(size)


def test_loss_falls(runs):
    losses = runs[0]["whole"].losses
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    # a random model spreads over 256 tokens: ln 256 = 5.55 nat
    assert 5.4 < losses[1] < 5.8
    assert losses[6] < losses[1] - 0.15


def test_resumed_run_equals_uninterrupted_run(runs):
    named, different, _ = runs
    whole, first, second = named["whole"], named["first half"], named["second half"]
    assert list(first.losses) == [1, 2, 3] and list(second.losses) == [4, 5, 6]
    assert first.losses | second.losses == whole.losses
    assert first.samples | second.samples == whole.samples
    # the weights, to the last bit: after three steps, they depend on all of the optimizer's state
    assert different[0] == []


def test_training_from_sharded_windows(runs):
    named, different, _ = runs
    whole, first, second = (named[f"windows{part}"] for part in ("", ", first half", ", second half"))
    assert whole.losses[6] < whole.losses[1] - 0.15
    assert first.losses | second.losses == whole.losses
    assert different[1] == []


def test_finished_run_is_left_alone(runs):
    assert runs[0]["nothing left"].text.strip() == ""
    other = runs[0]["finished, wider model"].text
    assert "iter_0000006 was trained with ffn_hidden_size" in other and "not 96; resume with the same flags" in other


def test_run_directory(runs):
    run = runs[2] / "whole" / "evo2"
    assert {path.name for path in run.iterdir()} == {".lock", "checkpoints", "tb_logs", "config.yaml"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "iter_0000003", "iter_0000006", "latest_checkpointed_iteration.txt", "latest_train_state.pt", "progress.txt"
    }  # fmt: skip
    names = {path.name for path in (run / "checkpoints" / "iter_0000006").iterdir()}
    assert {".metadata", "common.pt", "metadata.json", "run_config.yaml", "train_state.pt", "tokenizer"} <= names
    assert any((run / "tb_logs").iterdir())
    # each was written once: rewriting a complete checkpoint would be a chance to lose it
    assert (run / "checkpoints" / "progress.txt").read_text().count("Iteration: 6") == 1


def test_no_chatter(runs):
    lines = runs[0]["whole"].text.splitlines()
    assert len(lines) == 6 + 2 + 4  # steps, checkpoints, evaluations: two on the way, two at the end


def test_fine_tuning_starts_from_the_weights(runs):
    named, _, root = runs
    tuned = named["tune"].losses
    assert list(tuned) == [1, 2]
    # what six steps have taught is not lost
    assert tuned[1] < named["whole"].losses[5]
    assert named["tune from parent"].losses[1] == tuned[1]
    origin = run_config(checkpoint(root / "tuned", 2))["checkpoint"]["pretrained_checkpoint"]
    assert origin == str(checkpoint(root / "whole", 6))


def test_memory_that_runs_out(runs):
    error = runs[0]["too large"].text.strip()
    assert error.startswith("ERROR not enough memory for ") and "\n" not in error and "evo2_plan says" in error


def test_fine_tuning_resumes_its_own_run(runs):
    named, _, root = runs
    assert list(named["tune on"].losses) == [3, 4]
    assert named["tune on"].samples == {3: 12, 4: 16}
    assert checkpoint(root / "tuned", 4).is_dir()


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "tune other model",
            "ERROR --model-size striped_hyena_tiny_nv has remove_activation_post_first_layer False, but",
        ),
        ("tune wider model", "has ffn_hidden_size 96, but"),
        ("tune other tokenizer", "has 512 tokens, the model in"),
        ("odd pattern", "has 4 symbols for 6 layers"),
        ("tune nothing", "is no checkpoint"),
    ],
)
def test_what_does_not_fit_leaves_nothing_behind(runs, name, message):
    error = runs[0][name].text.strip()
    assert error.startswith("ERROR ") and "\n" not in error and message in error
    assert not (runs[2] / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"ckpt_async_save": True},
        {"optim_full_reshardable": True, "precision": "bf16_mixed"},
        {"processes": 2},
        {"processes": 2, "overlap_grad_reduce": True, "overlap_param_gather": True, "precision": "bf16_mixed"},
        {"processes": 2, "parallel": {"tensor": 2}},
        {"processes": 2, "parallel": {"pipeline": 2}},
        {"workers": 1},
        {"recompute": "none"},
    ],
    ids=str,
)
def test_resume_in_every_layout(layout, tmp_path):
    options = SMALL | layout
    processes = options.pop("processes", 1)
    (whole, first, second), different = train_all(
        [
            options | {"result_dir": tmp_path / "whole"},
            options | {"result_dir": tmp_path / "halves", "early_stop_on_step": 3},
            options | {"result_dir": tmp_path / "halves"},
        ],
        compare=[(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "halves", 6))] if processes == 1 else [],
        processes=processes,
    )
    assert list(whole.losses) == [1, 2, 3, 4, 5, 6]
    assert first.losses | second.losses == whole.losses
    assert not any(different)


@pytest.mark.slow
def test_resume_in_another_layout(tmp_path):
    options = SMALL | {"result_dir": tmp_path, "early_stop_on_step": 3, "optim_full_reshardable": True}
    options |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    (_, whole), _ = train_all([options, options | {"result_dir": tmp_path / "whole", "early_stop_on_step": 6}])
    (second,), _ = train_all([options | {"early_stop_on_step": 6, "parallel": {"tensor": 2}}], processes=2)
    assert second.losses == pytest.approx({step: whole.losses[step] for step in (4, 5, 6)}, rel=1e-5)


@pytest.mark.slow
def test_layouts_agree(tmp_path):
    """Data parallelism changes nothing but the order of sums; tensor and pipeline splits draw other random weights."""
    calm = SMALL | {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    (one,), _ = train_all([calm | {"result_dir": tmp_path / "one"}])
    (two,), _ = train_all([calm | {"result_dir": tmp_path / "two"}], processes=2)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
