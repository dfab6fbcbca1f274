# SPDX-License-Identifier: Apache-2.0
"""The Slurm script starts one torchrun a node, and these train together; only Slurm's own two programs are made up."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train.sbatch"
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames $SLURM_JOB_NODELIST" ] && echo 127.0.0.1 && echo 127.0.0.2
"""
# what srun does on the nodes of a job: the command once on each, and its status
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" & agents+=($!)
done
status=0
for agent in "${agents[@]}"; do wait "$agent" || status=$?; done
exit $status
"""
TRAIN = [
    *("--mock-data", "--model-size", "evo2_tiny", "--seq-length", "64", "--micro-batch-size", "1"),
    *("--global-batch-size", "2", "--max-steps", "2", "--eval-interval", "2", "--eval-iters", "0"),
    *("--workers", "0", "--disable-tensorboard-logger"),
]


def submit(folder, num_nodes, *arguments):
    """Run the script as Slurm would on the job's first node."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "ACTIVATE": "/dev/null",
        "MASTER_PORT": str(port),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": str(num_nodes),
    }
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def test_syntax():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_there_is_time_for_a_checkpoint(tmp_path):
    """Slurm's signal comes two minutes before the end; torchrun would kill what has not ended after 30 seconds."""
    (tmp_path / "torchrun").write_text("#!/bin/sh\necho $TORCH_ELASTIC_SHUTDOWN_TIMEOUT\n")
    (tmp_path / "torchrun").chmod(0o755)
    assert "#SBATCH --signal=TERM@120" in SCRIPT.read_text()
    assert submit(tmp_path, 1).stdout == "120\n"


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_agents_meet_and_train(tmp_path, num_nodes):
    done = submit(tmp_path, num_nodes, *TRAIN, "--result-dir", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    assert f"{num_nodes} process(es) = tensor 1 x pipeline 1 x context 1 x data {num_nodes}" in done.stderr
    assert (tmp_path / "results" / "evo2" / "checkpoints" / "iter_0000002" / "run_config.yaml").is_file()


def test_a_failure_is_the_job_s(tmp_path):
    done = submit(tmp_path, 1, "--no-such-flag")
    assert done.returncode != 0
    assert "train_evo2: error: " in done.stderr
