# SPDX-License-Identifier: Apache-2.0
"""Run by tests: train several times in one process, since importing Megatron takes longer than a small run.

Argument: JSON of ``{"runs": [keyword arguments of train], "compare": [[checkpoint, checkpoint], ...]}``. Writes
``RUN <number>`` before what a run prints, ``ERROR <message>`` where it refuses, and ``DIFFERENT <JSON list of names>``
for each comparison.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_PATHS = (
    "result_dir", "finetune_ckpt_dir", "dataset_config", "tokenizer", "sequence_db_dir", "train_window_db",
    "valid_window_db", "test_window_db",
)  # fmt: skip


def main() -> None:
    from evo2_megatron.cli.command import set_up_logging
    from evo2_megatron.config import ParallelConfig, UserError
    from evo2_megatron.tasks.training.train import train

    first_rank = os.environ.get("RANK", "0") == "0"
    set_up_logging()
    job = json.loads(sys.argv[1])
    for number, given in enumerate(job["runs"]):
        if first_rank:
            print(f"RUN {number}", flush=True)
        given |= {name: Path(given[name]) for name in _PATHS if name in given}
        given |= {"parallel": ParallelConfig(**given.get("parallel", {}))}
        try:
            train(**given)
        except UserError as error:
            if first_rank:
                print(f"ERROR {error}", flush=True)
    for first, second in job.get("compare", []) if first_rank else ():
        print("DIFFERENT", json.dumps(differing_tensors(first, second)), flush=True)


def differing_tensors(first: str, second: str) -> list[str]:
    """Names of the tensors that are not equal to the last bit or not in both.

    Optimizer state in flat buckets does not count: the gaps between parameters hold whatever was in memory.
    """
    import torch
    from megatron.core.dist_checkpointing import load_plain_tensors

    from evo2_megatron.config import ParallelConfig
    from evo2_megatron.runtime.distributed import process_groups

    with process_groups(ParallelConfig()):
        a, b = (
            {name: tensor for name, tensor in load_plain_tensors(folder).items() if ".bucket_idx_" not in name}
            for folder in (first, second)
        )
    both = [name for name in a.keys() & b.keys() if isinstance(a[name], torch.Tensor)]
    assert any(name.startswith("decoder") for name in both)
    return sorted(a.keys() ^ b.keys()) + sorted(name for name in both if not torch.equal(a[name], b[name]))


if __name__ == "__main__":
    main()
