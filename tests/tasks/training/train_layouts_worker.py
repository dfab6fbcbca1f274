# SPDX-License-Identifier: Apache-2.0
"""Run by test_train_layouts.py: train under every layout, on four processes, and resume under the next one.

Argument: JSON of ``{"folder": ..., "checkpoint": ...}``. Writes ``RUN <name>`` before what a run prints.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from evo2_megatron.runtime.megatron import enter_training
from model.layout_worker import LAYOUTS, PATTERN
from processes import fork

LOADS = ("evo2_megatron.recipes.pretrain", "evo2_megatron.tasks.training.train", "megatron.bridge.training.pretrain")
STEPS_BEFORE, STEPS = 3, 5
OPTIONS = {
    "mock_data": True,
    "model_size": "evo2_tiny",
    "num_layers": len(PATTERN),
    "hybrid_override_pattern": PATTERN,
    "seq_length": 1040,
    "micro_batch_size": 1,
    "global_batch_size": 4,
    "max_steps": STEPS,
    "eval_interval": STEPS,
    "eval_iters": 1,
    "log_interval": 1,
    "lr": 3e-3,
    "warmup_steps": 1,
    "workers": 0,
    "optim_full_reshardable": True,
}


def train_one(options, parallel):
    from evo2_megatron.cli.command import set_up_logging
    from evo2_megatron.tasks.training.train import train

    set_up_logging()
    train(**options, parallel=parallel)


def main(folder, checkpoint):
    names = list(LAYOUTS)
    for first, then in zip(names, names[1:] + names[:1]):
        options = OPTIONS | {"result_dir": folder / first, "finetune_ckpt_dir": checkpoint}
        for name, stop in ((first, STEPS_BEFORE), (then, None)):
            print(f"RUN {first}/{name}", flush=True)
            fork(4, train_one, options | {"early_stop_on_step": stop}, replace(LAYOUTS[name]), loads=LOADS)


if __name__ == "__main__":
    enter_training()
    job = json.loads(sys.argv[1])
    main(Path(job["folder"]), Path(job["checkpoint"]))
