# SPDX-License-Identifier: Apache-2.0
"""Convert checkpoints of Savanna, NeMo 2 and Vortex to Megatron Bridge's format, which every command here reads.

Weights are read tensor by tensor while they are written, so memory does not grow with the model. A result gets its
name only when it is complete and, with ``verify``, its logits were compared with those of the source.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evo2_megatron.architectures import FP8_SENSITIVE, Architecture, architecture
from evo2_megatron.checkpoint import distcp, names, nemo2, write
from evo2_megatron.checkpoint.run_config import NOT_SAID
from evo2_megatron.checkpoint.savanna import read_savanna
from evo2_megatron.checkpoint.savanna_files import find_savanna_files
from evo2_megatron.checkpoint.tensors import StoredTensor, WholeTensors, as_dtype
from evo2_megatron.checkpoint.torch_file import read_torch_file, whole_files
from evo2_megatron.checkpoint.translate import Format, Weights, check_numbers, rounded_like
from evo2_megatron.checkpoint.vortex import asks_for_fp8, check_config, from_vortex
from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import read_vocab_size
from evo2_megatron.runtime import megatron
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.conversion.verify_logits import check_memory, verify_checkpoint
from evo2_megatron.tasks.transfer import check_space, disk_errors, moving

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The checkpoint to be written."""

    directory: Path
    """Folder of checkpoints; ``iter_0000001`` is made in it."""

    tokenizer: Path
    """Folder of a Hugging Face tokenizer with as many tokens as the weights have embedding rows."""

    model_size: str
    recipe: str = "bf16_mixed"
    """Precision that the model is meant to run in; with ``fp32``, weights are stored in float32, else in bfloat16."""

    seq_length: int | None = None
    """Longest sequence in tokens; None: that of the model size."""

    vortex_style_fp8: bool | None = None
    """The model was trained with 8-bit input projections and is meant to run so. None: not said; then the checkpoint
    does not ask for it, and for sizes whose published weights need it, says that nobody said."""

    self_test: bool | None = None
    """Score fixed sequences and store the result for ``--self-test``; None: if the weights are small."""


@disk_errors()
def savanna_to_mbridge(
    source: str, result: Result, *, revision: str | None = None, unfused_names: bool = False, verify: bool = False
) -> Path:
    """Convert a Savanna checkpoint.

    Args:
        source: File, folder of model-parallel files, or Hugging Face repository (see ``find_savanna_files``).
        result: What to write.
        revision: Commit, branch or tag of the repository.
        unfused_names: Name the norms as models without Transformer Engine's fused layers do; ours read both.
        verify: Compare logits before the result gets its name.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: The source is not a complete model of this size, or the result cannot be written.
    """
    _check_before(result, verify)
    files = find_savanna_files(source, revision=revision)
    weights = read_savanna(files, architecture(result.model_size))
    origin = {"format": "savanna", "source": source, "revision": files.revision}
    return _write_tensors(weights, result, "savanna", origin, unfused_names=unfused_names, verify=verify)


@disk_errors()
def vortex_to_mbridge(source: Path, result: Result, *, config: Path | None = None, verify: bool = False) -> Path:
    """Convert a Vortex file.

    Args:
        source: The ``.pt`` file.
        result: What to write.
        config: The YAML file that Vortex builds the model from; its sizes must be those of the model size, and its
            rotary base, its scaling and its longest sequence are taken.
        verify: Compare logits before the result gets its name.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: The source is not a complete model of this size, or the result cannot be written.
    """
    _check_before(result, verify)
    model = architecture(result.model_size)
    if config is not None:
        model = check_config(config, model)
        _check_fp8_said(config, result)
    if not source.is_file():
        raise UserError(f"--vortex-ckpt-path {source} is no file; give Vortex's .pt file")
    state = read_torch_file(whole_files([source]), str(source))
    if not isinstance(state, Mapping):
        raise UserError(f"{source} holds no state dict; give Vortex's .pt file")
    weights = from_vortex(state, model, source=str(source))
    return _write_tensors(weights, result, "vortex", {"format": "vortex", "source": str(source)}, verify=verify)


@disk_errors()
def nemo2_to_mbridge(source: Path, result: Result, *, verify: bool = False) -> Path:
    """Convert a NeMo 2 checkpoint; its tensors are copied byte for byte.

    Args:
        source: Folder with ``weights`` in torch_dist format.
        result: What to write; its directory must not exist.
        verify: Compare logits before the result gets its name.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: The source is not a complete model of this size, or the result cannot be written.
    """
    write.remove_abandoned(result.directory)
    _check_before(result, verify)
    if result.directory.exists():
        raise UserError(f"--mbridge-ckpt-dir {result.directory} exists already; choose another or remove it")
    folder, index, renamed = nemo2.find_weights(source)
    entries = distcp.tensor_entries(index)
    shapes = {ours: tuple(entries[theirs].size) for theirs, ours in renamed.items()}
    model = replace(
        architecture(result.model_size),
        tied_embeddings=names.OUTPUT not in shapes,
        output_bias="output_layer.bias" in shapes,
    )
    rows = shapes.get(names.EMBEDDING, (0,))[0]
    names.check_tensors(
        shapes,
        names.parameter_shapes(model, vocab_size=rows),
        source=str(folder),
        remedy="check that --model-size is the one the checkpoint was made with",
    )
    stored = distcp.stored_tensors(folder, index, renamed)
    check_numbers(stored, source=str(folder))
    sizes = [distcp.entry_bytes(index, name) for name in renamed]

    def fill(partial: Path, on_bytes: distcp.OnBytes) -> None:
        distcp.copy_tensors(folder, index, renamed, partial, on_bytes=on_bytes)

    def check(partial: Path) -> None:
        verify_checkpoint(partial, WholeTensors(stored), model, names="megatron")

    origin = {"format": "nemo2", "source": str(source)}
    return _write(fill, sizes, model, rows, result, origin, check if verify else None)


def _check_fp8_said(config: Path, result: Result) -> None:
    """Vortex's files of all published models ask for 8 bits; where it matters, the user has to choose."""
    if result.vortex_style_fp8 is None and result.model_size in FP8_SENSITIVE and asks_for_fp8(config):
        raise UserError(
            f"{config} says that this {result.model_size} was trained with 8-bit input projections "
            "(use_fp8_input_projections); give --vortex-style-fp8 so that the checkpoint says so, or "
            "--no-vortex-style-fp8 if it was trained on in 16 bits"
        )


def _fp8_not_said(result: Result, has_scales: bool) -> bool:
    """Whether it matters that nobody said how the input projections were trained; warns if so."""
    if result.vortex_style_fp8 is not None or result.model_size not in FP8_SENSITIVE:
        return False
    logger.warning(
        "Arc's weights of %s need 8-bit input projections%s, and their predictions are worse without. Convert again "
        "with --vortex-style-fp8 if these are Arc's, so that the checkpoint says so, or with --no-vortex-style-fp8 if "
        "they were trained on in 16 bits",
        result.model_size,
        " (and the source has FP8 state)" if has_scales else "",
    )
    return True


def _check_before(result: Result, verify: bool) -> None:
    """What can be wrong before anything large is read or downloaded."""
    write.check_new(result.directory)
    model, tokens = architecture(result.model_size), read_vocab_size(result.tokenizer)
    if verify:
        check_memory(model, tokens)


def _write_tensors(
    weights: Weights,
    result: Result,
    format: Format,
    origin: Mapping[str, Any],
    *,
    unfused_names: bool = False,
    verify: bool,
) -> Path:
    dtype = torch.float32 if result.recipe == "fp32" else torch.bfloat16
    stored = {
        name: as_dtype(tensor, torch.float32 if names.is_kept_in_float32(name) else dtype)
        for name, tensor in weights.ours.items()
    }
    is_rounded = _warn_of_rounding(weights.ours, dtype)
    source = rounded_like(weights.theirs, stored, weights.architecture, format)
    rows = stored[names.EMBEDDING].shape[0]
    if unfused_names:
        stored = {names.unfused(name): tensor for name, tensor in stored.items()}
    sizes = [tensor.nbytes for tensor in stored.values()]

    def fill(partial: Path, on_bytes: distcp.OnBytes) -> None:
        distcp.write_tensors(stored, partial, on_bytes=on_bytes)

    def check(partial: Path) -> None:
        unrounded = WholeTensors(weights.theirs) if is_rounded else None
        verify_checkpoint(partial, WholeTensors(source), weights.architecture, names=format, unrounded=unrounded)

    checks = check if verify else None
    return _write(fill, sizes, weights.architecture, rows, result, origin, checks, weights.fp8_scales)


def _warn_of_rounding(ours: Mapping[str, StoredTensor], dtype: torch.dtype) -> bool:
    """Say so if weights lose digits in a dtype, and tell whether they do."""
    finer = [
        name
        for name, tensor in ours.items()
        if tensor.dtype not in (dtype, torch.bfloat16) and not names.is_kept_in_float32(name)
    ]
    is_rounded = dtype is torch.bfloat16 and bool(finer)
    if is_rounded:
        logger.warning(
            "%d tensors are in %s and are rounded to bfloat16; --mixed-precision-recipe fp32 keeps them",
            len(finer),
            str(ours[finer[0]].dtype).removeprefix("torch."),
        )
    return is_rounded


def _write(
    fill: Callable[[Path, distcp.OnBytes], None],
    sizes: Collection[int],
    model: Architecture,
    rows: int,
    result: Result,
    origin: Mapping[str, Any],
    check: Callable[[Path], None] | None,
    fp8_scales: Mapping[int, tuple[float, float]] = {},
) -> Path:
    tokens = read_vocab_size(result.tokenizer)
    if tokens != rows:
        raise UserError(
            f"the tokenizer in {result.tokenizer} has {tokens} tokens but the weights have {rows} embedding rows, and "
            f"cutting or padding them would change the model; give a tokenizer of {rows} tokens, such as "
            f"tokenizers/nucleotide_fast_tokenizer_{rows}, with --tokenizer-path"
        )
    origin = {**origin, "model_size": result.model_size}
    if _fp8_not_said(result, bool(fp8_scales)):
        origin["vortex_style_fp8"] = NOT_SAID
    with write.new_checkpoint(result.directory) as partial:
        check_space(result.directory, sum(sizes))
        # first, so that what it could refuse is refused before the long part
        write.describe(
            partial,
            _provider(model, rows, result),
            tokenizer=result.tokenizer,
            recipe=result.recipe,
            converted_from=origin,
            fp8_scales=fp8_scales,
        )
        with moving(len(sizes), sum(sizes)) as on_bytes:
            fill(partial, on_bytes)
        if self_test.wants_numbers(result.self_test, sum(sizes)):
            self_test.store(partial, model)
        if check is not None:
            check(partial)
    return result.directory / write.layout.iteration_name(1)


def _provider(model: Architecture, rows: int, result: Result) -> StripedHyenaProvider:
    megatron.enter()
    from evo2_megatron.model.provider import provider_for

    changed = {
        "vocab_size": rows,
        "share_embeddings_and_output_weights": model.tied_embeddings,
        "add_bias_output": model.output_bias,
        "rotary_base": model.rotary_base,
        "seq_len_interpolation_factor": model.position_scale,
        "vortex_style_fp8": bool(result.vortex_style_fp8),
        "seq_length": result.seq_length or model.max_tokens,
    }
    return provider_for(result.model_size, **changed)
