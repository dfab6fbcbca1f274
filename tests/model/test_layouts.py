# SPDX-License-Identifier: Apache-2.0
"""Two tensor-parallel processes give the loss, gradients and cached logits of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("layout_worker.py")


@pytest.mark.slow
def test_tensor_parallel_equals_one_process(tmp_path):
    results = []
    for tensor in (1, 2):
        output = tmp_path / f"{tensor}.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(tensor)]
        subprocess.run(
            [*command, str(WORKER), str(tensor), str(output)], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        results.append(torch.load(output))

    one, two = results
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two["decoded"], one["decoded"], rtol=1e-4, atol=1e-5)
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(
            two["gradients"][name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name
        )
