# SPDX-License-Identifier: Apache-2.0
"""What a LoRA run adds to training: its options' errors, the base model of a resumed run, and the adapters' start."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from evo2_megatron.checkpoint.adapter import read_adapters, trained_tensors
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.names import is_trained, parameter_shapes
from evo2_megatron.checkpoint.run_config import RunConfig
from evo2_megatron.config import UserError, uses_fp8
from evo2_megatron.recipes.options import LORA_TARGETS, TrainingOptions

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.core.transformer import MegatronModule

    from evo2_megatron.model.lora import Evo2LoRA
    from evo2_megatron.model.provider import StripedHyenaProvider

logger = logging.getLogger(__name__)


def check_options(options: TrainingOptions, given: Collection[str]) -> None:
    """Raise UserError for LoRA options that cannot work, whatever the model.

    Args:
        options: All of them.
        given: Names of those that the user chose.
    """
    if not options.lora_finetune:
        for name in given:
            if name.startswith("lora_") or name == "quantize_weights":
                raise UserError(f"--{name.replace('_', '-')} goes with --lora-finetune; add that, or leave it out")
        return
    check_quantized(options)
    if options.lora_dim % options.parallel.tensor:
        raise UserError(
            f"--lora-dim {options.lora_dim} is not a multiple of --tensor-parallel-size {options.parallel.tensor}, "
            "which splits the adapters by rank; choose one that is"
        )
    if not 0 <= options.lora_dropout < 1:
        raise UserError(f"--lora-dropout is {options.lora_dropout}; it must be from 0 to below 1")


def check_base(options: TrainingOptions) -> None:
    """Raise UserError where there is nothing to adapt."""
    if options.lora_finetune and options.finetune_ckpt_dir is None:
        raise UserError("--lora-finetune needs a pretrained checkpoint to adapt; give one with --finetune-ckpt-dir")


def check_quantized(options: TrainingOptions) -> None:
    """Raise UserError where quantized weights meet a number format that does not go with them."""
    precision = options.precision or ""
    if options.quantize_weights != "none" and (uses_fp8(precision) or precision.startswith("fp16")):
        raise UserError(
            f"--quantize-weights {options.quantize_weights} takes and gives bfloat16, and precision {precision} is "
            "something else; choose --mixed-precision-recipe bf16_mixed or fp32"
        )


def base_of_own(checkpoint: Path, run_config: RunConfig, options: TrainingOptions) -> Path:
    """The whole model below a run's own checkpoint: the base of its adapters, or without LoRA the checkpoint itself.

    It is the base that the run began with, even if ``finetune_ckpt_dir`` has newer checkpoints by now; only where that
    is gone, it is what ``finetune_ckpt_dir`` holds.

    Raises:
        UserError: The run was another kind of training, or had other adapters.
    """
    if run_config.is_lora != options.lora_finetune:
        was, now = ("LoRA adapters", "all weights") if run_config.is_lora else ("all weights", "LoRA adapters")
        raise UserError(
            f"{checkpoint.parent} is of a run that trained {was}, and this one is to train {now}; choose another "
            "--result-dir or --experiment-name"
        )
    if not run_config.is_lora:
        return checkpoint
    trained = read_adapters(run_config)
    for name in ("dim", "alpha", "target_modules", "skip_freeze_modules"):
        before, now = getattr(trained, name), getattr(options, f"lora_{name}")
        if before != now:
            raise UserError(
                f"--lora-{name.replace('_', '-')} is {_shown(now)}, but {checkpoint} was trained with "
                f"{_shown(before)}; resume with the same, or choose another --result-dir"
            )
    recorded = run_config.pretrained_checkpoint
    if recorded is not None and recorded.is_dir():
        return resolve_checkpoint_path(recorded)
    base = resolve_checkpoint_path(options.finetune_ckpt_dir.absolute(), flag="--finetune-ckpt-dir")
    logger.warning("The base model of this run is no longer in %s; taking %s", recorded, base)
    return base


def _shown(value: object) -> str:
    return ",".join(value) or "empty" if isinstance(value, list) else str(value)


def check_modules(adapters: Evo2LoRA, provider: StripedHyenaProvider) -> None:
    """Say what will be trained in a model, before it is built.

    Args:
        adapters: Of the run.
        provider: The finished configuration of the model, with its number of embedding rows.

    Raises:
        UserError: Lists of modules that do not fit the model.
    """
    from evo2_megatron.model.provider import architecture_of

    architecture = architecture_of(provider)
    choice, trained = trained_tensors(adapters, architecture, vocab_size=provider.vocab_size)
    whole = {n: s for n, s in parameter_shapes(architecture, vocab_size=provider.vocab_size).items() if is_trained(n)}
    for pattern in choice.unmatched:
        if pattern not in LORA_TARGETS:  # a name that models with other layers have
            names = sorted({name.split(".")[-2] for name in whole})
            raise UserError(
                f"--lora-target-modules and --lora-skip-freeze-modules: {pattern!r} matches no module with weights; "
                f"this model has {', '.join(names)}"
            )
    _check_wide(choice.kept, provider)
    if not trained:
        raise UserError("--lora-target-modules and --lora-skip-freeze-modules leave nothing to train; name modules")
    _check_stages(trained, provider)
    kept = _num_parameters(shape for name, shape in trained.items() if name in whole)
    logger.info(
        "LoRA: %d parameters of adapters on %d layers and %d of the model's own are trained, %d are frozen",
        _num_parameters(trained.values()) - kept, len(choice.adapted), kept, _num_parameters(whole.values()) - kept,
    )  # fmt: skip


def _check_wide(kept: Iterable[str], provider: StripedHyenaProvider) -> None:
    """What is trained whole must not be quantized."""
    narrow = LORA_TARGETS if provider.quantize_weights != "none" else ()
    for path in sorted(kept):
        if path.rpartition(".")[2] in narrow:
            raise UserError(
                f"--lora-skip-freeze-modules matches {path}, whose weights --quantize-weights keeps in few bits; give "
                "it an adapter with --lora-target-modules, or leave --quantize-weights out"
            )


def _check_stages(trained: Iterable[str], provider: StripedHyenaProvider) -> None:
    """Megatron cannot save the optimizer of a pipeline stage that trains nothing."""
    from evo2_megatron.model.stack import stage_layers

    num_stages = provider.pipeline_model_parallel_size
    stages = [stage_layers(provider.num_layers, stage=stage, num_stages=num_stages) for stage in range(num_stages)]
    idle = set(range(num_stages))
    for name in trained:
        first, *rest = name.removeprefix("decoder.").split(".")
        if first == "layers":
            idle -= {stage for stage, layers in enumerate(stages) if int(rest[0]) in layers}
        else:
            idle.discard(0 if first == "embedding" else num_stages - 1)
    if idle:
        layers = stages[min(idle)]
        raise UserError(
            f"--lora-target-modules and --lora-skip-freeze-modules leave pipeline stage {min(idle)}, layers "
            f"{layers[0]} to {layers[-1]}, nothing to train; name modules in it, or use fewer stages"
        )


def _num_parameters(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def add_adapters(config: ConfigContainer, rank: int) -> None:
    """Have Bridge's setup give the model its adapters, when what is registered so far has filled in the base model.

    Bridge would load the base itself, with a looser reader than ours that knows fewer formats, if it saw ``peft`` when
    it builds the model. Later it must see it, to save and resume adapters only.
    """
    adapters, config.peft = config.peft, None

    def begin(model: list[MegatronModule]) -> list[MegatronModule]:
        config.peft = adapters
        if rank == 0:
            config.to_yaml(config.logger.save_config_filepath)  # written before, without the section
        return adapters(model, training=True)

    config.model.register_pre_wrap_hook(begin)
