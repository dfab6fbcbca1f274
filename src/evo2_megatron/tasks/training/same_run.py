# SPDX-License-Identifier: Apache-2.0
"""What a run must have in common with the checkpoint that it begins with, and what else goes on as before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evo2_megatron.checkpoint.adapter import trained_tensors
from evo2_megatron.checkpoint.load import tensor_shapes
from evo2_megatron.checkpoint.names import check_tensors, is_weight, parameter_shapes
from evo2_megatron.checkpoint.run_config import RunConfig, read_run_config
from evo2_megatron.config import UserError
from evo2_megatron.recipes.options import TrainingOptions
from evo2_megatron.runtime.precision import precision_settings

if TYPE_CHECKING:
    from megatron.bridge.training.callbacks import CallbackContext
    from megatron.bridge.training.config import ConfigContainer

    from evo2_megatron.model.provider import StripedHyenaProvider

_SAME_MODEL = (
    "hybrid_override_pattern", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_groups_hyena_medium",
    "num_groups_hyena_short", "remove_activation_post_first_layer", "add_attn_proj_bias", "use_short_conv_bias",
    "share_embeddings_and_output_weights", "add_bias_output", "rotary_base", "rotary_percent",
    "seq_len_interpolation_factor", "layernorm_epsilon",
)  # fmt: skip
"""Fields that must be those of the checkpoint to begin with, whether or not the shapes of the weights tell."""

_ELSEWHERE = "choose another --result-dir or --experiment-name"


def check_optimizer(checkpoint: Path) -> None:
    """Raise UserError where there are weights alone, converted or stripped, from which no run can go on."""
    if not any(name.startswith("optimizer.") for name in tensor_shapes(checkpoint)):
        raise UserError(
            f"{checkpoint} holds weights and no optimizer state, so that no run goes on from it; begin with its "
            f"weights by --finetune-ckpt-dir, and {_ELSEWHERE}"
        )


def check_same_layout(checkpoint: Path, options: TrainingOptions) -> None:
    """Raise UserError where the optimizer's state of a run that goes on is cut for other processes."""
    sections = read_run_config(checkpoint).sections
    tensor, pipeline = (sections["model"][f"{name}_model_parallel_size"] for name in ("tensor", "pipeline"))
    reshardable = sections["checkpoint"]["dist_ckpt_optim_fully_reshardable"]
    if not reshardable and (tensor, pipeline) != (options.parallel.tensor, options.parallel.pipeline):
        raise UserError(
            f"{checkpoint} was saved by tensor {tensor} x pipeline {pipeline} processes without "
            "--optim-full-reshardable; resume with the same sizes, or fine-tune from it with --finetune-ckpt-dir"
        )


def check_same_model(checkpoint: Path, provider: StripedHyenaProvider, options: TrainingOptions) -> None:
    """Raise UserError where a checkpoint to fine-tune is of another model.

    Args:
        checkpoint: A whole model.
        provider: The model to train.
        options: What was asked for: who chooses other positions wants them.
    """
    for name, ours, theirs in _differences(read_run_config(checkpoint), provider):
        if name in ("seq_len_interpolation_factor", "rotary_base") and getattr(options, name) is not None:
            continue  # extending the context is a reason to fine-tune
        raise UserError(
            f"--model-size {options.model_size} has {name} {ours}, but {checkpoint} was trained with {theirs}; "
            "choose the model size and the flags that it was trained with"
        )


def check_resumed_model(checkpoint: Path, config: ConfigContainer) -> None:
    """Raise UserError where a run that is to go on had another model, other adapters or other number formats.

    Megatron would leave layers that it does not find as they are, at random, and only log their names.

    Args:
        checkpoint: The run's own.
        config: Of the run, with the number of embedding rows in its model.
    """
    from evo2_megatron.model.provider import architecture_of

    own = read_run_config(checkpoint)
    for name, ours, theirs in _differences(own, config.model):
        raise UserError(
            f"{checkpoint} was trained with {name} {theirs}, not {ours}; resume with the same flags, or {_ELSEWHERE}"
        )
    check_same_precision(own, config)
    architecture, rows = architecture_of(config.model), config.model.vocab_size
    if config.peft is None:
        expected = parameter_shapes(architecture, vocab_size=rows)
    else:
        _, expected = trained_tensors(config.peft, architecture, vocab_size=rows)
    check_tensors(
        {name: shape for name, shape in tensor_shapes(checkpoint).items() if is_weight(name)},
        expected,
        source=f"the weights in {checkpoint} are not those of the model that is to go on",
        remedy=f"resume with the same flags, or {_ELSEWHERE}",
    )


def check_same_precision(own: RunConfig, config: ConfigContainer) -> None:
    """Raise UserError where a run that is to go on kept its parameters in another number format."""
    recipe = own.recipe()
    settings = own.precision_values() if recipe is None else precision_settings(recipe)
    before, now = (None if part is None else part.params_dtype for part in (settings, config.mixed_precision))
    if before is not None and before != now:
        before, now = (str(dtype).removeprefix("torch.") for dtype in (before, now))
        raise UserError(
            f"{own.path.parent} was trained with parameters in {before}, not {now}; resume with the "
            f"--mixed-precision-recipe that it had, or {_ELSEWHERE}"
        )
    was_quantized = own.model.get("quantize_weights", "none")
    if was_quantized != config.model.quantize_weights:
        raise UserError(
            f"{own.path.parent} was trained with --quantize-weights {was_quantized}; resume with the same, or "
            f"{_ELSEWHERE}"
        )


def _differences(trained: RunConfig, provider: StripedHyenaProvider) -> list[tuple[str, Any, Any]]:
    """Name, value in the model to train and value in the trained one, of fields that are not the same."""
    theirs = trained.provider()
    pairs = [(name, getattr(provider, name), getattr(theirs, name)) for name in _SAME_MODEL]
    return [pair for pair in pairs if pair[1] != pair[2]]


def continue_schedule(checkpoint: Path, context: CallbackContext) -> None:
    """Put the learning rate of a run that goes on where its optimizer steps are, whatever the batch is now.

    Megatron's schedule counts samples, and takes their number from the checkpoint, whose batch may have been another.

    Args:
        checkpoint: The run's own.
        context: Bridge's, when all is loaded.
    """
    before = read_run_config(checkpoint).sections["train"]["global_batch_size"]
    now, scheduler = context.state.cfg.train.global_batch_size, context.scheduler
    if before != now:
        # steps that found no gradient for overflow do not count there, so that the number of steps is no substitute
        scheduler.num_steps = round(scheduler.num_steps / before) * now
        scheduler.step(increment=0)
