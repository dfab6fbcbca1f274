# SPDX-License-Identifier: Apache-2.0
"""A trained model ready to generate: what a checkpoint says before its weights are read, and its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from evo2_megatron.checkpoint.adapter import base_checkpoint
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.load import LoadedModel, find_tokenizer, language_model_config
from evo2_megatron.config import Fp8Choice, ParallelConfig, UserError
from evo2_megatron.data import tokenizer
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks import self_test

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

logger = logging.getLogger(__name__)

_GIB = 2**30


class GenerationCheckpoint(NamedTuple):
    """A checkpoint as far as it is known without its weights."""

    path: Path
    """The folder of one iteration."""

    base: Path
    """Of LoRA adapters, the checkpoint of the whole model; else ``path``."""

    vocab_size: int
    """Tokens of its tokenizer."""

    seq_length: int
    """Longest sequence that it was trained for, in tokens, as its run configuration says."""


def find_checkpoint(ckpt_dir: Path, base_ckpt_dir: Path | None = None) -> GenerationCheckpoint:
    """Look into a checkpoint, or a folder of iterations.

    Raises:
        UserError: There is none, or it is damaged.
    """
    path = resolve_checkpoint_path(ckpt_dir)
    run_config = language_model_config(path)
    base = base_checkpoint(path, run_config, base_ckpt_dir)
    vocab_size = tokenizer.read_vocab_size(find_tokenizer(path, base))
    return GenerationCheckpoint(path, base, vocab_size, run_config.seq_length)


def check_layout(parallel: ParallelConfig) -> None:
    """Raise UserError for a layout that generation does not have, or that these processes cannot make."""
    layout_of_generation(parallel)
    parallel.check_world_size(distributed.world_size())


def layout_of_generation(parallel: ParallelConfig) -> ParallelConfig:
    """With sequence parallelism off, as one token cannot be split; UserError if the layout splits sequences."""
    if parallel.context > 1:
        raise UserError("generation does not split a sequence over processes; use --context-parallel-size 1")
    if parallel.sequence_parallel:
        raise UserError("generation goes token by token, which cannot be split; leave out --sequence-parallel")
    return dataclasses.replace(parallel, sequence_parallel=False)


@contextlib.contextmanager
def running_model(
    checkpoint: GenerationCheckpoint,
    *,
    parallel: ParallelConfig = ParallelConfig(),
    precision: str | None = None,
    provider_overrides: Mapping[str, Any] | None = None,
    fp8: Fp8Choice = "as_asked",
    with_self_test: bool = False,
) -> Iterator[StripedHyenaModel]:
    """The model of a checkpoint in evaluation mode, inside process groups that end with the block.

    Args:
        checkpoint: From ``find_checkpoint``.
        parallel: Tensor and pipeline sizes.
        precision: As for ``checkpoint.load.load_model``, like ``provider_overrides`` and ``fp8``.
        with_self_test: Compare the model with the numbers stored in its checkpoint first.

    Raises:
        UserError: The layout or the checkpoint does not allow it.
    """
    check_layout(parallel)
    with distributed.process_groups(parallel):
        model = _load(checkpoint, parallel, precision, provider_overrides, fp8, with_self_test)
        log_memory("After model setup")
        yield model
        log_memory("After generation")


def _load(
    checkpoint: GenerationCheckpoint,
    parallel: ParallelConfig,
    precision: str | None,
    overrides: Mapping[str, Any] | None,
    fp8: Fp8Choice,
    with_self_test: bool,
) -> StripedHyenaModel:
    parallel = layout_of_generation(parallel)
    loaded = self_test.load_model_checked(
        checkpoint.path,
        with_self_test=with_self_test,
        parallel=parallel,
        precision=precision,
        provider_overrides=overrides,
        base_ckpt_dir=None if checkpoint.base == checkpoint.path else checkpoint.base,
        fp8=fp8,
    )
    return decoder_of(loaded)


def decoder_of(loaded: LoadedModel) -> StripedHyenaModel:
    """The part of a loaded model that generates; the whole goes on to score as before.

    Raises:
        UserError: Adapters in an 8-bit recipe, which Megatron cannot run one token at a time.
    """
    from megatron.core.utils import unwrap_model

    # of the wrapper for 16 bits, which only casts what goes in and comes out
    model = unwrap_model(loaded.model)
    if model.config.fp8 or model.config.fp4:
        if loaded.run_config.is_lora:
            raise UserError(
                f"precision {loaded.precision} cannot generate with LoRA adapters beside the weights; merge them with "
                "evo2_merge_lora, or choose --mixed-precision-recipe bf16_mixed"
            )
        from megatron.core.fp8_utils import prepare_model_for_fp8_inference

        # such matrix products want multiples of 8 or 16 rows, and a decoding step has one: pads them
        prepare_model_for_fp8_inference(model)
    return model


def log_memory(when: str) -> None:
    """Figures of this process: of the GPU's allocator, or the process's resident memory where there is none."""
    if distributed.rank() == 0:
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        logger.info("[MEMORY] %s: %.2f GiB, peak %.2f GiB", when, now / _GIB, peak / _GIB)
