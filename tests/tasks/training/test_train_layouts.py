# SPDX-License-Identifier: Apache-2.0
"""Every parallel layout trains to the same losses, and goes on from a checkpoint of any other, optimizer included."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from model.layout_worker import LAYOUTS, PATTERN
from processes import environment

WORKER = Path(__file__).with_name("train_layouts_worker.py")
LOSS = re.compile(r"iteration +(\d+)/.* lm loss: (\S+) \|")


@pytest.mark.slow
def test_all_layouts_train_alike(megatron, tmp_path):
    checkpoint = write_tiny_checkpoint(
        tmp_path / "checkpoint", hybrid_override_pattern=PATTERN, num_layers=len(PATTERN), seq_length=8192
    )
    job = json.dumps({"folder": str(tmp_path / "runs"), "checkpoint": str(checkpoint)})
    done = subprocess.run(
        [sys.executable, str(WORKER), job], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    texts = re.split(r"^RUN (.*)\n", done.stdout, flags=re.MULTILINE)[1:]
    losses = {
        name: {int(step): float(loss) for step, loss in LOSS.findall(text)}
        for name, text in zip(texts[::2], texts[1::2])
    }
    assert len(losses) == 2 * len(LAYOUTS)
    alone = losses["one/one"]
    resumed = next(found for name, found in losses.items() if name.startswith("one/") and name != "one/one")
    assert list(alone) == [1, 2, 3] and list(resumed) == [4, 5]
    want = alone | resumed
    assert want[5] < want[1]
    for name, found in losses.items():
        assert list(found) in ([1, 2, 3], [4, 5]), name
        for step, loss in found.items():
            assert loss == pytest.approx(want[step], rel=1e-5), f"{name}, step {step}"
