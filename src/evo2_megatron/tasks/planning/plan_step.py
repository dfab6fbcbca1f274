# SPDX-License-Identifier: Apache-2.0
"""The model, optimizer and one step of ``train_evo2`` without its loop: on real tensors, or on meta tensors to plan.

Megatron Bridge can be imported only after ``runtime.megatron.enter_training``: do that before importing this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.losses import create_masked_next_token_loss_function
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule
from torch import Tensor

from evo2_megatron.config import UserError
from evo2_megatron.recipes.options import TrainingOptions
from evo2_megatron.recipes.pretrain import pretrain_config
from evo2_megatron.tasks.training import train_lora


def step_config(options: TrainingOptions, vocab_size: int) -> ConfigContainer:
    """What ``train_evo2`` would use, with ``vocab_size`` rows of embedding; UserError where they cannot be split."""
    config = pretrain_config(options)
    config.mixed_precision.setup(config.model, config.optimizer, config.ddp)
    config.ddp.check_for_nan_in_grad = False  # a number that meta tensors do not have
    config.model.vocab_size = vocab_size
    config.model.finalize()
    if config.peft is not None:
        train_lora.check_modules(config.peft, config.model)
        config.model.register_pre_wrap_hook(config.peft)
    tensor = options.parallel.tensor
    if vocab_size % tensor:
        raise UserError(
            f"--vocab-size {vocab_size} is not a multiple of --tensor-parallel-size {tensor}, which splits the "
            "embedding by its rows; choose one that is"
        )
    return config


def build_model(config: ConfigContainer) -> MegatronModule:
    """This process's stage behind Megatron's data parallelism: weights and gradient buffers."""
    (model,) = config.model.provide_distributed_model(ddp_config=config.ddp, wrap_with_ddp=True)
    model.config.finalize_model_grads_func = _finalize_gradients
    return model


def _finalize_gradients(model: list[MegatronModule], num_tokens: Tensor | None = None, **arguments: Any) -> None:
    # the number is compared with 0 to scale gradients in place, and meta tensors have no numbers
    known = num_tokens is not None and not num_tokens.is_meta
    finalize_model_grads(model, num_tokens if known else None, **arguments)


def build_optimizer(config: ConfigContainer, model: MegatronModule) -> MegatronOptimizer:
    """This process's share of main weights and of Adam's two moments."""
    config.optimizer.finalize()
    optimizer = get_megatron_optimizer(config.optimizer, [model], use_gloo_process_groups=False)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = part.optimizer
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            # what Adam itself begins with
            adam.state[parameter] |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return optimizer


def run_step(config: ConfigContainer, model: MegatronModule, num_microbatches: int) -> None:
    """Forward and backward of ``num_microbatches`` in Megatron's own schedule, on made-up tokens."""
    seq_length, size = config.model.seq_length, config.train.micro_batch_size
    of_one = seq_length // config.model.context_parallel_size
    device = next(model.parameters()).device

    def forward(batches: Iterator[Tensor], model: MegatronModule) -> tuple[Tensor, Callable[..., Any]]:
        ids_BL = next(batches)
        mask_BL = torch.ones(ids_BL.shape, device=device)
        output = model(ids_BL, None, None, labels=ids_BL, loss_mask=mask_BL)
        return output, create_masked_next_token_loss_function(mask_BL, False, False)

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=(torch.full((size, of_one), ord("A"), device=device) for _ in range(num_microbatches)),
        model=[model],
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=size,
        forward_only=False,
    )
