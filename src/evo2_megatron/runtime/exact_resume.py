# SPDX-License-Identifier: Apache-2.0
"""What a training run needs so that, resumed, it computes what it would have without the interruption.

On a machine with a GPU and Transformer Engine, nothing.
"""

from __future__ import annotations

import functools
from typing import Any

from evo2_megatron.runtime import megatron


@functools.cache
def install() -> None:
    """Repair what this machine's substitutes for Transformer Engine and CUDA break; call after ``megatron.enter``."""
    from megatron.core.optimizer import distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _repair_torch_adam(distrib_optimizer.DistributedOptimizer)
    if not megatron.on_cuda():
        _keep_random_state_when_loading_data()


def _repair_torch_adam(cls: Any) -> None:
    """Two defects of Megatron Core 0.16.1's distributed optimizer around PyTorch's Adam.

    It asks a fresh optimizer for the number of steps done, before anything is loaded, and fails. And it hands one and
    the same step counter to all parameters, which each then count up, so that Adam's bias correction runs ahead.

    Ends when Megatron's tests resume without Transformer Engine.
    """
    import torch

    original_state_dict, original_load = cls.state_dict, cls.load_state_dict

    @functools.wraps(original_state_dict)
    def state_dict(self: Any) -> Any:
        adam = self.optimizer
        if not adam.state:
            for group in adam.param_groups:
                for parameter in group["params"]:
                    # what Adam itself begins with
                    adam.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return original_state_dict(self)

    @functools.wraps(original_load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original_load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    cls.state_dict, cls.load_state_dict = state_dict, load_state_dict


def _keep_random_state_when_loading_data() -> None:
    """Dropout on a CPU draws from the generator from which a DataLoader draws its workers' seeds, too.

    Bridge makes the loaders after it has restored the random state, so that a resumed run would go on with another.
    """
    import torch
    from torch.utils.data import DataLoader

    original = DataLoader.__iter__

    @functools.wraps(original)
    def iterate(self: DataLoader) -> Any:
        state = torch.get_rng_state()
        try:
            return original(self)
        finally:
            torch.set_rng_state(state)

    DataLoader.__iter__ = iterate
