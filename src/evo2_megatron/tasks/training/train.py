# SPDX-License-Identifier: Apache-2.0
"""Train or fine-tune a model with Megatron Bridge's own loop; a second call with the same options resumes."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from evo2_megatron.checkpoint import layout, load, run_checkpoints
from evo2_megatron.checkpoint.adapter import check_whole
from evo2_megatron.checkpoint.load_weights import load_weights
from evo2_megatron.checkpoint.run_config import read_run_config
from evo2_megatron.config import PRECISION_RECIPES, UserError
from evo2_megatron.data import tokenizer
from evo2_megatron.recipes.options import TrainingOptions, precision_recipe
from evo2_megatron.recipes.published import training_options
from evo2_megatron.runtime import distributed, megatron, out_of_memory, training_repairs
from evo2_megatron.runtime.device_peaks import peak_tflops
from evo2_megatron.runtime.precision import precision_settings
from evo2_megatron.tasks.training import same_run, train_checks, train_lora, wandb_run
from evo2_megatron.tasks.training.starting_weights import load_and_compare

if TYPE_CHECKING:
    from megatron.bridge.training.callbacks import Callback, CallbackContext
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.mixed_precision import MixedPrecisionConfig
    from megatron.core.transformer import MegatronModule
    from torch import Tensor

    from evo2_megatron.tasks.training.torch_profile import TorchProfile
    from evo2_megatron.tasks.training.training_progress import TrainingProgress

logger = logging.getLogger(__name__)


class Start(NamedTuple):
    """Where a run begins."""

    checkpoint: Path | None
    """Weights to begin with; None: random ones."""

    base: Path | None
    """The whole model to begin with: the same, unless the checkpoint is this run's own and holds LoRA adapters."""

    step: int
    """Optimizer steps that this run has already done."""

    resumes: bool
    """Whether the checkpoint is this run's own."""


def train(recipe: str | None = None, **given: Any) -> None:
    """Train until ``max_steps``; call it on every process that torchrun started.

    Args:
        recipe: Name of a training recipe to start from (see ``recipes.published``).
        given: Fields of ``recipes.options.TrainingOptions``; the rest are the recipe's, or else the defaults.

    Raises:
        UserError: Options that are wrong, contradict each other, or ask for what this machine or version cannot do.
    """
    options = training_options(recipe, given)
    train_checks.check(options)
    train_lora.check_options(options, given)
    train_lora.check_base(options)
    start = find_start(options)
    if start.resumes:
        same_run.check_same_layout(start.checkpoint, options)
    if start.checkpoint is not None:
        options = _with_defaults_of(start, options, given)
        train_lora.check_quantized(options)  # the precision may be the checkpoint's
    options = train_checks.fit_to_machine(options)
    enter()

    from evo2_megatron.model.forward_step import forward_step
    from evo2_megatron.recipes.pretrain import pretrain_config

    config = pretrain_config(options)
    _check_model(config)
    if start.checkpoint is not None:
        _begin_from(start, config, options)
    end = min(options.max_steps, options.early_stop_on_step or options.max_steps)
    if start.step >= end:  # of this run, and not of one with other settings
        logger.info("Nothing to do: %s has done step %s of %s", options.checkpoint_dir, start.step, end)
        return
    _log_plan(options, start)
    run(config, options, start, forward_step)


def enter() -> None:
    """Make Megatron Bridge importable, and its training loop do what it says."""
    megatron.enter_training()
    training_repairs.install()
    run_checkpoints.make_saving_safe()


def find_start(options: TrainingOptions) -> Start:
    """This run's own newest checkpoint, or else the one to fine-tune, or else nothing."""
    own = options.checkpoint_dir
    checkpoint = run_checkpoints.newest(own)
    if checkpoint is not None:
        base = train_lora.base_of_own(checkpoint, read_run_config(checkpoint), options)
        return Start(checkpoint, base, layout.iteration_of(checkpoint), resumes=True)
    if options.finetune_ckpt_dir is None:
        return Start(None, None, 0, resumes=False)
    given = layout.resolve_checkpoint_path(options.finetune_ckpt_dir.absolute(), flag="--finetune-ckpt-dir")
    return Start(given, given, 0, resumes=False)


def _with_defaults_of(start: Start, options: TrainingOptions, given: dict[str, Any]) -> TrainingOptions:
    """Tokenizer and precision of the checkpoint to begin with, where the user did not choose."""
    checkpoint = start.checkpoint
    run_config = read_run_config(checkpoint)
    check_whole(read_run_config(start.base))
    stored = load.stored_shapes(start.base)
    if "tokenizer" not in given:
        tokens = tokenizer.read_vocab_size(load.find_tokenizer(checkpoint, start.base))
        options = replace(options, tokenizer=tokenizer.tokenizer_dir(tokens))
    elif isinstance(options.tokenizer, Path):
        tokens, rows = tokenizer.read_vocab_size(options.tokenizer), stored[load.EMBEDDING][0]
        if tokens > rows:
            raise UserError(
                f"the tokenizer in {options.tokenizer} has {tokens} tokens, the model in {checkpoint} {rows}; leave "
                "--hf-tokenizer-model-path out to use the checkpoint's"
            )
    if run_config.model.get("vortex_style_fp8") and not start.resumes:
        logger.warning(
            "%s was trained with FP8 input projections; training goes on without them, for a model that needs none: "
            "expect a high loss at first", checkpoint,
        )  # fmt: skip
    if options.precision is None:
        options = replace(options, precision=run_config.recipe() or _recipe_of_values(checkpoint))
    return options


def _recipe_of_values(checkpoint: Path) -> str | None:
    """Name of the precision recipe whose values a checkpoint holds: a trained one holds these instead of the name."""
    megatron.enter()
    values = read_run_config(checkpoint).precision_values()
    if values is None:
        return None
    for name in PRECISION_RECIPES:
        if _without_flags(precision_settings(name)) == _without_flags(values):
            return name
    raise UserError(f"{checkpoint} was trained with changed precision settings; choose a --mixed-precision-recipe")


def _without_flags(precision: MixedPrecisionConfig) -> dict[str, Any]:
    """Precision settings less those that flags of their own change."""
    flags = ("fp8_wgrad", "fp8_param", "fp8_param_gather", "grad_reduce_in_fp32")
    return {name: value for name, value in asdict(precision).items() if name not in flags}


def _check_model(config: ConfigContainer) -> None:
    """Let the provider raise what it has to say about pattern and layout before anything is written."""
    model = copy.deepcopy(config.model)
    config.mixed_precision.setup(model)
    model.finalize()


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {run_dir}: {error.strerror}; choose another --result-dir") from None
    if not os.access(run_dir, os.W_OK):
        raise UserError(f"cannot write to {run_dir}; choose another --result-dir")


def _begin_from(start: Start, config: ConfigContainer, options: TrainingOptions) -> None:
    """Make Bridge start where ``start`` says."""
    stored = load.stored_shapes(start.base)
    # as many rows as the checkpoint: Megatron would cut the table, or fill it up with zeros, without a word
    config.model.vocab_size = stored[load.EMBEDDING][0]
    if start.resumes:
        same_run.check_resumed_model(start.checkpoint, config)
        if config.peft is None:
            return
    same_run.check_same_model(start.base, config.model, options)

    def fill_in(model: list[MegatronModule]) -> list[MegatronModule]:
        (stage,) = model
        fill = functools.partial(load_weights, stage, start.base, stored, dropped_layers=())
        load_and_compare(stage, fill, precision_recipe(options))
        return model

    config.model.register_pre_wrap_hook(fill_in)
    if config.peft is not None:
        train_lora.check_modules(config.peft, config.model)
        train_lora.add_adapters(config, distributed.rank())


def run(
    config: ConfigContainer,
    options: TrainingOptions,
    start: Start,
    forward_step: Callable[..., tuple[Tensor, Any]],
    callbacks: Sequence[Callback] = (),
    *,
    unit: Literal["tokens", "samples"] = "tokens",
) -> None:
    """Run Megatron Bridge's loop in the folder of a run, which no other run may use meanwhile.

    Args:
        config: Of the run; what it begins with is loaded by hooks of its model.
        options: Folders, logging and profiling.
        start: Where it begins; what belongs to resuming is set in ``config`` here.
        forward_step: One micro-batch through the model, as Bridge asks for it.
        callbacks: What else Bridge is to call.
        unit: What speed is counted in.

    Raises:
        UserError: The folder cannot be used, or a checkpoint cannot be written.
    """
    from megatron.bridge.training.utils import checkpoint_utils

    if start.resumes:
        same_run.check_optimizer(start.checkpoint)
        # the newest complete one, which need not be the one that the tracker names
        config.checkpoint.ckpt_step = start.step
        # they keep what they read for the life of the process, which may have trained before
        checkpoint_utils.read_run_config.cache_clear()
        checkpoint_utils.read_train_state.cache_clear()
    else:
        # the tracker may name a first checkpoint that was never finished
        config.checkpoint.load = None
    _make_run_dir(options.run_dir)
    first = distributed.rank() == 0
    with run_checkpoints.locked(options.run_dir) if first else nullcontext():
        if first:
            run_checkpoints.tidy(options.checkpoint_dir, start.checkpoint if start.resumes else None)
        _run_loop(config, options, start, forward_step, callbacks, unit)


def _run_loop(
    config: ConfigContainer,
    options: TrainingOptions,
    start: Start,
    forward_step: Callable[..., tuple[Tensor, Any]],
    further: Sequence[Callback],
    unit: Literal["tokens", "samples"],
) -> None:
    from megatron.bridge.training.callbacks import CallbackManager
    from megatron.bridge.training.pretrain import pretrain

    from evo2_megatron.tasks.training.run_endings import EarlyEnd
    from evo2_megatron.tasks.training.stragglers import StragglerReport
    from evo2_megatron.tasks.training.training_progress import TrainingProgress, quiet_console

    speaks = distributed.rank() == distributed.world_size() - 1  # where Megatron writes its log lines
    progress = TrainingProgress(
        bar=speaks and os.isatty(2) and not options.debug,
        unit=unit,
        peak_tflops=options.peak_tflops or peak_tflops(precision_recipe(options)),
    )
    callbacks = CallbackManager()
    early_end = EarlyEnd(options.checkpoint_dir)
    callbacks.add([early_end, progress, *further])
    if start.resumes:
        callbacks.register("on_train_start", functools.partial(same_run.continue_schedule, start.checkpoint))
    callbacks.register("on_train_start", functools.partial(_record_origin, options, start))
    callbacks.register("on_train_start", functools.partial(_check_room, options))
    if options.log_straggler:
        callbacks.add(StragglerReport(options.run_dir / "stragglers.tsv"))
    profile = _profile(config, options, start)
    if profile is not None:
        callbacks.add(profile)
    if options.enable_preemption:
        callbacks.register("on_train_start", _listen_for_preemption)
    distributed.tell_of_idle_gpus()
    distributed.be_alone_without_torchrun()
    if options.wandb_project is not None and speaks:
        wandb_run.set_up(options.run_dir, offline=options.wandb_offline)
    with nullcontext() if options.debug else quiet_console(progress), early_end.tidy():
        try:
            with out_of_memory.told(_too_large(options)):
                pretrain(config, forward_step, callbacks)
        finally:
            if profile is not None:
                profile.finish()
    _log_result(options, progress)


def _too_large(options: TrainingOptions) -> str:
    return (
        f"not enough memory for {options.micro_batch_size} sequence(s) of {options.seq_length} tokens at a time on "
        "each process; lower --micro-batch-size or --seq-length, or divide the model; evo2_plan says what fits"
    )


def _profile(config: ConfigContainer, options: TrainingOptions, start: Start) -> TorchProfile | None:
    """What records this process's steps, if there are any to record."""
    from evo2_megatron.tasks.training.torch_profile import TorchProfile

    if not options.torch_profiling and not options.nsys_profiling:
        return None
    first, last = options.profiled_steps
    if start.step >= last:
        logger.warning("Steps %s to %s, which were to be profiled, are done: no profile", first + 1, last)
    elif options.nsys_profiling:
        # Bridge 0.3.1 begins before this step and no other, which a resumed run may have done
        config.profiling.profile_step_start = max(first, start.step)
    if not options.torch_profiling or distributed.rank() not in options.nsys_ranks:
        return None
    return TorchProfile(options.run_dir / "tb_logs", rank=distributed.rank(), start=first, end=last)


def _record_origin(options: TrainingOptions, start: Start, context: CallbackContext) -> None:
    """Keep in run_config.yaml what was fine-tuned; earlier, Bridge would load it, with a looser loader than ours."""
    if options.finetune_ckpt_dir is not None:
        # adapters belong to one checkpoint, and not to the newest that a folder has
        origin = start.base if options.lora_finetune else options.finetune_ckpt_dir.absolute()
        context.state.cfg.checkpoint.pretrained_checkpoint = str(origin)


def _check_room(options: TrainingOptions, context: CallbackContext) -> None:
    """Look, before the first step, whether a checkpoint will find room: weights, and for those trained the optimizer's
    three float32 values each. Adapters are saved without their base."""

    def num_bytes(parameter: Tensor) -> int:
        each = (parameter.element_size() + 12) if parameter.requires_grad else parameter.element_size()
        return 0 if options.lora_finetune and not parameter.requires_grad else parameter.numel() * each

    run_checkpoints.check_room(options.run_dir, distributed.total_over_parameters(context.model, num_bytes))


def _listen_for_preemption(context: CallbackContext) -> None:
    """Bridge 0.3.1 asks its handler after every step whether SIGTERM came, but never installs it."""
    context.state.signal_handler.__enter__()


def _log_plan(options: TrainingOptions, start: Start) -> None:
    processes, layout_ = distributed.world_size(), options.parallel
    logger.info(
        "Training %s in %s on %s: %s process(es) = tensor %s x pipeline %s x context %s x data %s",
        options.model_size, precision_recipe(options), "CUDA" if megatron.on_cuda() else "CPU", processes,
        layout_.tensor, layout_.pipeline, layout_.context, processes // layout_.model_size,
    )  # fmt: skip
    logger.info(
        "Steps %s to %s of %s samples x %s tokens, data: %s", start.step, options.max_steps,
        options.global_batch_size, options.seq_length, options.dataset_config or options.train_window_db or "mock",
    )  # fmt: skip
    if start.checkpoint is not None:
        logger.info("%s %s", "Resuming" if start.resumes else "Fine-tuning", start.checkpoint)


def _log_result(options: TrainingOptions, progress: TrainingProgress) -> None:
    # on the first pipeline stage, which has no loss, the log lines of the last have to do
    loss = "" if progress.loss is None else f", loss {progress.loss:.4f} nat per token"
    speed = progress.num_units / progress.step_seconds if progress.num_units else 0.0
    logger.info(
        "Step %s of %s%s, %s %s in %.1f s of training (%.0f per second); checkpoints in %s", progress.step,
        options.max_steps, loss, progress.num_units, progress.unit, progress.step_seconds, speed,
        options.checkpoint_dir,
    )  # fmt: skip
