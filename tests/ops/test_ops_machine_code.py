# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels compile for GPUs, and fit on them; no GPU is needed for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks/machine_code.py"

CASES = [(gpu, 8192) for gpu in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")] + [("sm_90", 700), ("sm_90", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("gpu, length", CASES)
def test_the_kernels_are_machine_code_that_fits(gpu, length, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--gpus", gpu, "--length", str(length)]
    done = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    num_kernels = len(done.stdout.splitlines()) - 1
    assert num_kernels == done.stdout.count(gpu) == 26
