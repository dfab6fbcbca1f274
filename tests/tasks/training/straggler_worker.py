# SPDX-License-Identifier: Apache-2.0
"""Run by tests under torchrun: a run in which rank 1 takes 1.2 s longer for each forward pass and 0.5 s for a batch.

Argument: the folder for results.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def main() -> None:
    from evo2_megatron.cli.command import set_up_logging
    from evo2_megatron.runtime import megatron
    from evo2_megatron.tasks.training.train import train

    set_up_logging()
    megatron.enter_training()
    from evo2_megatron.model import forward_step
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

    if os.environ["RANK"] == "1":
        forward, get_batch = StripedHyenaModel.forward, forward_step.get_batch

        def slow_forward(*args, **kwargs):
            time.sleep(1.2)
            return forward(*args, **kwargs)

        def slow_batch(*args, **kwargs):
            time.sleep(0.5)
            return get_batch(*args, **kwargs)

        StripedHyenaModel.forward, forward_step.get_batch = slow_forward, slow_batch
    train(
        mock_data=True, model_size="evo2_tiny", seq_length=64, micro_batch_size=1, global_batch_size=2, max_steps=4,
        eval_interval=4, eval_iters=0, log_interval=2, workers=0, tensorboard=False, log_straggler=True,
        result_dir=Path(sys.argv[1]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
