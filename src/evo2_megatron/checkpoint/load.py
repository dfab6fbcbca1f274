# SPDX-License-Identifier: Apache-2.0
"""Load a trained model from a Megatron Bridge checkpoint; every command that needs weights comes here.

Nothing is skipped in silence: a tensor that the model has and the checkpoint lacks, one that the model does not know,
and one of another shape are errors. Loading runs no code that a checkpoint names: ``run_config.yaml`` and the index of
the weights are read against lists of known classes, and the rest holds tensors only.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from evo2_megatron.checkpoint.adapter import base_checkpoint, read_adapters
from evo2_megatron.checkpoint.distcp import read_index, tensor_entries
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path, tokenizer_dir
from evo2_megatron.checkpoint.load_weights import load_weights
from evo2_megatron.checkpoint.names import EMBEDDING
from evo2_megatron.checkpoint.precision_contract import Fp8Projections, settle
from evo2_megatron.checkpoint.run_config import RunConfig, check_kind, read_run_config
from evo2_megatron.config import Fp8Choice, ParallelConfig, UserError
from evo2_megatron.data.tokenizer import read_vocab_size
from evo2_megatron.data.tokenizer import tokenizer_dir as bundled_tokenizer_dir
from evo2_megatron.runtime import megatron, out_of_memory
from evo2_megatron.runtime.precision import precision_settings

if TYPE_CHECKING:
    from megatron.bridge.training.mixed_precision import MixedPrecisionConfig
    from megatron.core.transformer.module import MegatronModule

    from evo2_megatron.model.fp8_linear import Scales
    from evo2_megatron.model.provider import StripedHyenaProvider

logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A trained model, ready to run."""

    model: MegatronModule
    """In evaluation mode, with float32 logits whatever it computes in; torch.no_grad is the caller's choice."""

    provider: StripedHyenaProvider
    """The configuration that it was built from."""

    tokenizer_dir: Path
    """Folder of its Hugging Face tokenizer: the checkpoint's, or the bundled one of the same size."""

    precision: str
    """Name of the precision recipe; ``custom`` where the checkpoint gives values that no recipe has."""

    fp8_projections: Fp8Projections
    """Whether the checkpoint's wish for 8-bit input projections is met, and how."""

    run_config: RunConfig
    checkpoint: Path


def load_model(
    ckpt_dir: Path,
    *,
    parallel: ParallelConfig,
    precision: str | None = None,
    provider_overrides: Mapping[str, Any] | None = None,
    base_ckpt_dir: Path | None = None,
    fp8: Fp8Choice = "as_asked",
    head: bool = False,
) -> LoadedModel:
    """Build the model that a checkpoint describes, for any parallel layout, and fill in its weights.

    Call it on all processes, inside ``runtime.distributed.process_groups``. The model gets as many embedding rows as
    the checkpoint has. It may have fewer layers than the checkpoint: the first ``num_layers``. Of a LoRA run it is the
    base model with the adapters in place.

    Args:
        ckpt_dir: A checkpoint, or the folder of a run's checkpoints (the newest is taken).
        parallel: The layout that the process groups were made for.
        precision: A recipe's name. None: the checkpoint's; where it names none, bf16_mixed on CUDA and fp32 elsewhere.
        provider_overrides: Fields of StripedHyenaProvider that replace the checkpoint's.
        base_ckpt_dir: Where the base of LoRA adapters is now; None: where it was in training.
        fp8: What to do about 8-bit input projections. Rounded weights replace the model's own.
        head: Whether the checkpoint must be one of a prediction head, or must not.

    Raises:
        UserError: No checkpoint; not one of ours; keys or shapes that do not match; a layout or a precision that this
            model or this machine cannot have.
    """
    megatron.enter()
    checkpoint = resolve_checkpoint_path(ckpt_dir)
    run_config = read_run_config(checkpoint)
    check_kind(run_config, head=head)
    base = base_checkpoint(checkpoint, run_config, base_ckpt_dir)
    stored = stored_shapes(base)
    tokenizer = find_tokenizer(checkpoint, base)
    name, settings = precision_of(run_config, precision)
    provider = provider_of(run_config, stored, parallel, dict(provider_overrides or {}))
    fp8_projections = settle(provider, name, settings, fp8, run_config)
    settings.setup(provider)
    provider.finalize()
    with out_of_memory.told(_too_large(checkpoint, name, provider)):
        model = _filled_model(provider, checkpoint, base, run_config, stored)
    how = "" if provider.quantize_weights == "none" else f", weights in {provider.quantize_weights}"
    logger.info("Loaded %s in precision %s%s", checkpoint, name, how)
    return LoadedModel(model.eval(), provider, tokenizer, name, fp8_projections, run_config, checkpoint)


def _filled_model(
    provider: StripedHyenaProvider,
    checkpoint: Path,
    base: Path,
    run_config: RunConfig,
    stored: Mapping[str, tuple[int, ...]],
) -> MegatronModule:
    from megatron.core.utils import unwrap_model

    from evo2_megatron.model.fp8_linear import fix_projections
    from evo2_megatron.model.head import is_backbone

    # in 16 bits Bridge wraps it: inputs are cast, outputs are float32
    with contextlib.redirect_stdout(sys.stderr):  # it prints its size, where a command's results belong
        (model,) = provider.provide_distributed_model(
            wrap_with_ddp=False, use_cpu_initialization=not megatron.on_cuda()
        )
    of_base = range(provider.num_layers, read_run_config(base).num_layers)
    load_weights(model, base, stored, dropped_layers=of_base, only=is_backbone)
    if run_config.is_lora:
        _add_adapters(model, checkpoint, run_config, range(provider.num_layers, run_config.num_layers))
        trained = "head of %s is" if run_config.has_head else "adapters of %s are"
        logger.info(f"The {trained} added to the base model %s", checkpoint, base)
    if provider.fp8_emulation or provider.fp8_projections:
        fix_projections(unwrap_model(model), _fp8_scales(base))
    return model


def _too_large(checkpoint: Path, precision: str, provider: StripedHyenaProvider) -> str:
    narrower = ", or take --quantize-weights" if provider.quantize_weights == "none" else ""
    return (
        f"not enough memory for the weights of {checkpoint} in precision {precision}; divide them over GPUs with "
        f"--devices and --tensor-parallel-size{narrower}"
    )


def language_model_config(checkpoint: Path) -> RunConfig:
    """``read_run_config`` of a checkpoint that must not be one of a prediction head."""
    run_config = read_run_config(checkpoint)
    check_kind(run_config, head=False)
    return run_config


def _add_adapters(model: MegatronModule, checkpoint: Path, run_config: RunConfig, dropped: range) -> None:
    adapters = read_adapters(run_config)
    adapters(model, training=False)
    load_weights(
        model, checkpoint, tensor_shapes(checkpoint), dropped_layers=dropped, only=adapters.adapter_key_filter
    )


def _fp8_scales(base: Path) -> dict[int, Scales]:
    from evo2_megatron.model.fp8_linear import Scales

    stored = read_run_config(base).fp8_scales
    if stored:
        logger.info("%s has FP8 scales of %d projections", base, len(stored))
    else:
        logger.info("%s has no FP8 scales; all are 1, as in Transformer Engine without a history", base)
    return {layer: Scales(*pair) for layer, pair in stored.items()}


def find_tokenizer(checkpoint: Path, base: Path) -> Path:
    """The checkpoint's tokenizer, or the bundled one that fits where it carries none.

    Args:
        checkpoint: One iteration.
        base: What holds its embedding; the same, unless it is one of LoRA adapters.

    Raises:
        UserError: The tokenizer has more tokens than the model has embedding rows.
    """
    folder, rows = tokenizer_dir(checkpoint), stored_shapes(base)[EMBEDDING][0]
    if folder is None:
        folder = bundled_tokenizer_dir(512 if rows >= 512 else 256)
        logger.info("%s carries no tokenizer; using the bundled one in %s", checkpoint, folder)
    tokens = read_vocab_size(folder)
    if tokens > rows:
        raise UserError(
            f"the tokenizer in {folder} has {tokens} tokens but the model in {checkpoint} only {rows} embedding rows; "
            "put the tokenizer it was trained with into the checkpoint's folder 'tokenizer'"
        )
    return folder


def tensor_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Name and global shape of every tensor in a checkpoint, optimizer state included. Reads no tensor.

    Raises:
        UserError: The folder holds no weights in this format.
    """
    return {name: tuple(entry.size) for name, entry in tensor_entries(read_index(checkpoint)).items()}


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """``tensor_shapes`` of a checkpoint with a whole model in it.

    Raises:
        UserError: The folder holds no weights in this format, or those of another model.
    """
    shapes = tensor_shapes(checkpoint)
    if EMBEDDING not in shapes:
        raise UserError(f"{checkpoint} has no tensor {EMBEDDING}; it is not a checkpoint of an Evo 2 model")
    return shapes


def precision_of(run_config: RunConfig, asked: str | None) -> tuple[str, MixedPrecisionConfig]:
    """Name and settings of the precision that a model runs in; ``asked`` as for ``load_model``.

    Raises:
        UserError: This machine has no hardware for it.
    """
    values = run_config.precision_values() if asked is None else None
    if values is not None:
        name = "custom" if values.fp8 or values.fp4 else _plain_name(values)
    else:
        name = asked or run_config.recipe() or ("bf16_mixed" if megatron.on_cuda() else "fp32")
        values = precision_settings(name)
    if values.fp8 or values.fp4:
        _check_fp8_hardware(name, values)
        # parameters are read in their own precision and quantised where they are used
        values.fp8_param = values.fp8_param_gather = False
    return name, values


def _plain_name(values: MixedPrecisionConfig) -> str:
    return "bf16_mixed" if values.bf16 else "fp16_mixed" if values.fp16 else "fp32"


def _check_fp8_hardware(name: str, values: MixedPrecisionConfig) -> None:
    if values.fp4 or values.fp8_recipe == "mxfp8":
        needed = (10, 0)
    else:
        needed = (9, 0) if values.fp8_recipe == "blockwise" else (8, 9)
    if megatron.have_transformer_engine() and torch.cuda.get_device_capability() >= needed:
        return
    raise UserError(
        f"precision {name} needs Transformer Engine and a GPU of compute capability {needed[0]}.{needed[1]} or newer; "
        "choose --mixed-precision-recipe bf16_mixed, which computes in 16 bits"
    )


def provider_of(
    run_config: RunConfig, stored: Mapping[str, tuple[int, ...]], parallel: ParallelConfig, overrides: dict[str, Any]
) -> StripedHyenaProvider:
    """What builds the model of a checkpoint; not finalized, which is when it is checked against the layout.

    Args:
        run_config: Of the checkpoint.
        stored: Its tensors, or its base's.
        parallel: The layout.
        overrides: As ``provider_overrides`` of ``load_model``.

    Raises:
        UserError: The layout does not divide the embedding, or the model needs a GPU and there is none.
    """
    rows = stored[EMBEDDING][0]
    if rows % parallel.tensor:
        raise UserError(
            f"tensor parallel size {parallel.tensor} does not divide the checkpoint's {rows} embedding rows"
        )
    provider = run_config.provider(
        **{
            "tensor_model_parallel_size": parallel.tensor,
            "pipeline_model_parallel_size": parallel.pipeline,
            "context_parallel_size": parallel.context,
            "sequence_parallel": parallel.splits_activations,
            # not rounded: a tokenizer's size or a layout must not change how many logits there are
            "vocab_size": rows,
            "should_pad_vocab": False,
            # every weight is about to be overwritten
            "perform_initialization": False,
            # on a GPU Megatron compiles that at run time: seconds, a C compiler, and again for other lengths
            "bias_dropout_fusion": False,
        }
        | overrides
    )
    if provider.use_subquadratic_ops and not megatron.on_cuda():
        if overrides.get("use_subquadratic_ops"):
            raise UserError("--use-subquadratic-ops needs a CUDA GPU; leave the flag out, the results are the same")
        logger.info("The checkpoint was trained with subquadratic-ops kernels; without a GPU the plain ones run")
        provider.use_subquadratic_ops = False
    return provider
