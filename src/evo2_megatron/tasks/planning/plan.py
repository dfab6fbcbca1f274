# SPDX-License-Identifier: Apache-2.0
"""What a training step needs on every GPU: the project's own model and schedule, run on tensors without memory."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from evo2_megatron.config import ParallelConfig, UserError, uses_fp8
from evo2_megatron.recipes.options import TrainingOptions
from evo2_megatron.recipes.published import training_options
from evo2_megatron.runtime import megatron, quiet_loggers
from evo2_megatron.runtime.training_repairs import operations_of_step
from evo2_megatron.tasks.training import train_lora

if TYPE_CHECKING:
    from evo2_megatron.runtime.memory_tracker import MemoryTracker


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One process of a pipeline stage; the others of the stage need the same."""

    stage: int
    parameters: int
    """Of this process."""

    weight_bytes: int
    """Weights and the buffers that their gradients are summed in."""

    optimizer_bytes: int
    """This process's share of main weights and of Adam's moments."""

    activation_bytes: int
    """Most that a step adds to the two."""

    flops: float
    """Matrix products, convolutions and attention of one step, recomputed ones included."""

    @property
    def total_bytes(self) -> int:
        """Most memory at any time."""
        return self.weight_bytes + self.optimizer_bytes + self.activation_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A training step on all processes."""

    stages: list[StagePlan]
    parameters: int
    """Of the whole model, weights shared by two stages counted once."""

    model_flops: float
    """Operations of one step, all processes, as the TFLOP/s of train_evo2 counts them: see ``model.flops``."""

    num_tokens: int
    """Of the samples of a step."""

    @property
    def worst(self) -> StagePlan:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.total_bytes)


def plan(num_gpus: int, recipe: str | None = None, *, vocab_size: int = 512, **given: Any) -> Plan:
    """Plan one step.

    Args:
        num_gpus: Processes, one a GPU.
        recipe: Name of a training recipe to start from (see ``recipes.published``).
        vocab_size: Rows of the embedding.
        given: Fields of ``recipes.options.TrainingOptions``.

    Raises:
        UserError: Options that cannot work, or 8-bit precision, whose memory only a GPU shows.
    """
    options = planned_options(recipe, **given)
    train_lora.check_options(options, given)
    options.parallel.check_world_size(num_gpus)
    return _summary(
        [_plan_stage(options, stage, num_gpus, vocab_size) for stage in range(options.parallel.pipeline)],
        options,
        vocab_size,
    )


def planned_options(recipe: str | None = None, **given: Any) -> TrainingOptions:
    """What is to be planned, in bfloat16 unless told otherwise; UserError for 8 bits, which only a GPU can show."""
    options = training_options(recipe, {"mock_data": True, "precision": "bf16_mixed"} | given)
    if uses_fp8(options.precision):
        raise UserError(f"{options.precision} cannot be planned without a GPU; plan with bf16_mixed")
    return options


@contextlib.contextmanager
def on_stage(options: TrainingOptions, stage: int, num_gpus: int) -> Iterator[MemoryTracker]:
    """Run a block as the first process of a pipeline stage, on tensors without memory, and follow what it makes."""
    from evo2_megatron.runtime.fake_processes import fake_processes
    from evo2_megatron.tasks.training import train_checks

    layout = options.parallel
    # Megatron numbers the stages slowest
    with fake_processes(layout, rank=stage * (num_gpus // layout.pipeline), world_size=num_gpus):
        train_checks.check(options)
        from evo2_megatron.runtime.memory_tracker import MemoryTracker

        # Megatron prints the number of parameters
        with (
            quiet_loggers.silenced(quiet_loggers.RERUNS, train_lora.__name__),
            contextlib.redirect_stdout(io.StringIO()),
            MemoryTracker() as tracker,
        ):
            yield tracker


def nearest_fit(
    num_gpus: int, gpu_bytes: float, recipe: str | None = None, *, parallel: ParallelConfig, **given: Any
) -> ParallelConfig | None:
    """The first layout within ``gpu_bytes`` with one of the sizes doubled or quadrupled; None: no such one.

    Args:
        num_gpus: As for ``plan``, like ``recipe`` and ``given``.
        gpu_bytes: Memory of a GPU.
        parallel: The layout that does not fit.
    """
    for factor in (2, 4):
        for name in ("context", "tensor", "pipeline"):
            layout = replace(parallel, **{name: getattr(parallel, name) * factor})
            try:
                with quiet_loggers.silenced(train_lora.__name__):
                    planned = plan(num_gpus, recipe, parallel=layout, **given)
            except UserError:
                continue  # the model, the batch or the number of GPUs does not divide so
            if planned.worst.total_bytes <= gpu_bytes:
                return layout
    return None


def _summary(stages: list[StagePlan], options: TrainingOptions, vocab_size: int) -> Plan:
    whole = replace(options, parallel=ParallelConfig())
    megatron.enter_training()
    from evo2_megatron.runtime.fake_processes import fake_processes
    from evo2_megatron.tasks.planning.plan_step import step_config

    with fake_processes(whole.parallel, rank=0, world_size=1):
        config = step_config(whole, vocab_size)
        parameters = sum(p.numel() for p in config.model.provide().parameters())
        flops = operations_of_step(config, options.global_batch_size)
    num_tokens = options.global_batch_size * options.seq_length
    return Plan(stages=stages, parameters=parameters, model_flops=flops, num_tokens=num_tokens)


def _plan_stage(options: TrainingOptions, stage: int, num_gpus: int, vocab_size: int) -> StagePlan:
    layout = options.parallel
    num_microbatches = options.global_batch_size // (options.micro_batch_size * (num_gpus // layout.model_size))
    # more of them than this are never alive together
    run = min(num_microbatches, layout.pipeline + 1)
    with on_stage(options, stage, num_gpus) as tracker:
        from evo2_megatron.tasks.planning import plan_step

        config = plan_step.step_config(options, vocab_size)
        model = plan_step.build_model(config)
        weights = tracker.live_bytes
        optimizer = plan_step.build_optimizer(config, model)
        before = tracker.live_bytes
        tracker.forget_peak()
        plan_step.run_step(config, model, run)
        del optimizer
        return StagePlan(
            stage=stage,
            parameters=sum(p.numel() for p in model.parameters()),
            weight_bytes=weights,
            optimizer_bytes=before - weights,
            activation_bytes=tracker.peak_bytes - before,
            flops=tracker.flops * num_microbatches / run,
        )
