# SPDX-License-Identifier: Apache-2.0
"""Write a Megatron Bridge checkpoint as a file for Arc's Vortex, or again without its optimizer state."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from evo2_megatron.architectures import Architecture, architecture
from evo2_megatron.checkpoint import distcp, layout, names
from evo2_megatron.checkpoint.adapter import check_whole
from evo2_megatron.checkpoint.run_config import read_run_config
from evo2_megatron.checkpoint.strip_optimizer import Stripped, kept_tensors, strip_optimizer
from evo2_megatron.checkpoint.tensors import WholeTensors
from evo2_megatron.checkpoint.torch_file import read_torch_file, whole_files, write_torch_file
from evo2_megatron.checkpoint.vortex import vortex_config, vortex_tensors
from evo2_megatron.checkpoint.write import new_checkpoint, remove_abandoned
from evo2_megatron.config import UserError
from evo2_megatron.runtime import megatron
from evo2_megatron.runtime.file_lock import is_abandoned, lock_alone
from evo2_megatron.tasks.conversion.verify_logits import check_memory, verify_checkpoint
from evo2_megatron.tasks.transfer import check_space, disk_errors, file_behind, moving, new_files

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider

logger = logging.getLogger(__name__)

_CONFIG_JSON = "config.json"


@disk_errors()
def mbridge_to_vortex(
    ckpt_dir: Path,
    output: Path,
    *,
    model_size: str | None = None,
    unfused_names: bool = False,
    bf16_frequencies: bool = False,
    verify: bool = False,
) -> list[Path]:
    """Write ``output``, the YAML file that Vortex builds the model from, and ``config.json`` beside them.

    Args:
        ckpt_dir: A checkpoint, or the folder of a run's checkpoints (the newest is taken).
        output: The ``.pt`` file.
        model_size: Checked against the checkpoint; None: not checked.
        unfused_names: Expect the norms under the names of models without Transformer Engine's fused layers. Both are
            understood anyway; this makes the usual ones an error.
        bf16_frequencies: See ``vortex_tensors``.
        verify: Compare the logits of the checkpoint's model with those that the file's weights give.

    Returns:
        The files written.

    Raises:
        UserError: No such checkpoint, Vortex cannot express it, or a file is in the way.
    """
    files = _files(output)
    checkpoint = layout.resolve_checkpoint_path(ckpt_dir, flag="--mbridge-ckpt-dir")
    run_config = read_run_config(checkpoint)
    check_whole(run_config)
    megatron.enter()
    from evo2_megatron.model.provider import architecture_of

    index = distcp.read_index(checkpoint)
    weights = {name for name in distcp.tensor_entries(index) if names.is_weight(name)}
    if names.EMBEDDING not in weights:
        raise UserError(f"{checkpoint} has no tensor {names.EMBEDDING}; it is not a checkpoint of an Evo 2 model")
    rows = distcp.tensor_entries(index)[names.EMBEDDING].size[0]
    provider = run_config.provider(vocab_size=rows)
    model = architecture_of(provider)
    if model_size is not None:
        _check_size(model, model_size, checkpoint)
    ours = distcp.stored_tensors(checkpoint, index, _usual_names(model, weights, checkpoint, unfused_names))
    theirs = vortex_tensors(ours, model, bf16_frequencies=bf16_frequencies)
    config = vortex_config(model, vocab_size=rows, fp8_projections=provider.vortex_style_fp8)
    if verify:
        check_memory(model, rows)
    total = sum({id(tensor): tensor.nbytes for tensor in theirs.values()}.values())
    with _new_files(files) as (weights_file, config_file, summary_file):
        check_space(weights_file.parent, total)
        with moving(len(theirs), total) as on_bytes:
            write_torch_file(theirs, weights_file, on_bytes=on_bytes)
        config_file.write_text(yaml.safe_dump(config, sort_keys=False))
        summary_file.write_text(json.dumps(_summary(provider, rows), indent=2) + "\n")
        if verify:
            _verify(checkpoint, weights_file, model)
    return files


@contextlib.contextmanager
def _new_files(files: list[Path]) -> Iterator[list[Path]]:
    """``new_files``; what an export of this name that was killed has left, as large as a model, is removed."""
    weights = file_behind(files[0])
    for left in sorted(weights.parent.glob(f".{glob.escape(weights.name)}.*.partial")):
        if is_abandoned(left):
            logger.warning("Removing %s, which a run that was killed has left", left)
            left.unlink()
    with new_files(files) as partial, open(partial[0], "wb") as claim:
        lock_alone(claim, partial[0], choose="--output-path")
        yield partial


def _verify(checkpoint: Path, file: Path, model: Architecture) -> None:
    written = WholeTensors(read_torch_file(whole_files([file]), str(file)))
    verify_checkpoint(checkpoint, written, model, names="vortex")


def _files(output: Path) -> list[Path]:
    """Weights, and what is written beside them."""
    files = [output, output.parent / f"{output.stem}.yml", output.parent / _CONFIG_JSON]
    if output in files[1:]:
        raise UserError(
            f"--output-path {output} is for the weights, and so is called what stands beside them; use .pt"
        )
    for path in files:
        if (
            path.name == _CONFIG_JSON
            and path.is_file()
            and '"hybrid_override_pattern"' in path.read_text(errors="replace")
        ):
            continue  # of an earlier export
        if path.exists():
            raise UserError(f"{path} exists already; choose another --output-path or remove it")
    return files


def _check_size(model: Architecture, model_size: str, checkpoint: Path) -> None:
    """What the size table and the checkpoint must agree in; a run may have set the rest."""
    expected = architecture(model_size)
    fields = (
        "pattern", "hidden_size", "ffn_hidden_size", "num_heads", "num_groups", "gelu_in_every_layer",
        "attention_output_bias", "short_conv_bias",
    )  # fmt: skip
    different = [
        f"{name} {getattr(model, name)} instead of {getattr(expected, name)}"
        for name in fields
        if getattr(model, name) != getattr(expected, name)
    ]
    if different:
        raise UserError(
            f"{checkpoint} is not a model of size {model_size}: {'; '.join(different)}; leave --model-size out to "
            "export what the checkpoint says it is"
        )


def _usual_names(model: Architecture, stored: set[str], checkpoint: Path, unfused_names: bool) -> dict[str, str]:
    renamed = names.usual_names(stored, names.parameter_shapes(model, vocab_size=1))
    if unfused_names and not any(old != new for old, new in renamed.items()):
        raise UserError(
            f"--no-te: {checkpoint} has the names of models with Transformer Engine's fused layers; leave it out"
        )
    return renamed


def _summary(provider: StripedHyenaProvider, rows: int) -> dict[str, Any]:
    fields = (
        "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length",
        "hybrid_override_pattern", "num_groups_hyena",
    )  # fmt: skip
    return {name: getattr(provider, name) for name in fields} | {"vocab_size": rows}


@disk_errors()
def remove_optimizer(source: Path, target: Path, *, verify: bool = False) -> Path:
    """Copy the newest checkpoint of a folder without optimizer, scheduler and random state.

    Args:
        source: A checkpoint, or the folder of a run's checkpoints (the newest is taken).
        target: Folder to make; the checkpoint keeps its name in it.
        verify: Compare every weight, bit by bit, before the result gets its name.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: No such checkpoint, or the target exists.
    """
    remove_abandoned(target)
    if target.exists():
        raise UserError(f"--dst-ckpt-dir {target} exists already; choose another or remove it")
    checkpoint = layout.resolve_checkpoint_path(source, flag="--src-ckpt-dir")
    iteration = layout.iteration_of(checkpoint)
    megatron.enter()
    read_run_config(checkpoint)  # a copy of one that cannot be read is of no use
    kept = kept_tensors(checkpoint)
    with new_checkpoint(target, iteration) as partial:
        sizes = copy_weights(checkpoint, partial)
        if verify:
            _check_equal(checkpoint, partial)
            logger.info("verified: all %d tensors are equal", len(kept))
    logger.info("%s: %.3f GB before, %.3f GB after", checkpoint, sizes.before / 1e9, sizes.after / 1e9)
    return target / layout.iteration_name(iteration)


def copy_weights(checkpoint: Path, folder: Path) -> Stripped:
    """``strip_optimizer`` with a look at the disk's room first, and a bar."""
    kept = kept_tensors(checkpoint)
    total = sum(kept.values())
    check_space(folder.parent, total)  # the folder's own name is hidden
    with moving(len(kept), total) as on_bytes:
        return strip_optimizer(checkpoint, folder, on_bytes=on_bytes)


def _check_equal(checkpoint: Path, copy: Path) -> None:
    indices = [(folder, distcp.read_index(folder)) for folder in (checkpoint, copy)]
    kept = {name: name for name in distcp.tensor_entries(indices[1][1])}
    before, after = (distcp.stored_tensors(folder, index, kept) for folder, index in indices)
    for name, tensor in before.items():
        for start, stop in tensor.pieces():
            rows = [t.read_rows(start, stop).view(torch.uint8) for t in (tensor, after[name])]
            if not torch.equal(*rows):
                raise UserError(f"{name} was not copied exactly; check the disk, nothing was written")
