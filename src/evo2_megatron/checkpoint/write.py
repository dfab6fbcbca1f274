# SPDX-License-Identifier: Apache-2.0
"""Write weights as a Megatron Bridge checkpoint: no optimizer, no random state. For converters and tests.

Training saves through Megatron Bridge itself; this is for one process that has, or reads, all tensors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from evo2_megatron.checkpoint import checksums, layout
from evo2_megatron.checkpoint.distcp import write_tensors
from evo2_megatron.checkpoint.tensors import in_memory
from evo2_megatron.checkpoint.torch_file import save_tensors
from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import read_vocab_size
from evo2_megatron.runtime import megatron
from evo2_megatron.runtime.file_lock import is_abandoned, lock_alone
from evo2_megatron.runtime.writable import check_may_write

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider

logger = logging.getLogger(__name__)

# how the keys of the weights are laid out, for the reader (see Megatron Bridge, _build_sharded_state_dict_metadata)
_CONTENT = {
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "dp_reshardable",
    "chained_optim_avoid_prefix": True,
}

_NEWEST = (layout.LATEST_TRAIN_STATE, layout.TRACKER)
"""Files beside checkpoints that say which is the newest."""


def whole_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights of a model that no other process shares, by the names of checkpoints."""
    from megatron.core.utils import unwrap_model

    assert torch.distributed.get_world_size() == 1
    state = unwrap_model(model).state_dict()
    return {name: tensor.detach() for name, tensor in state.items() if "_extra_state" not in name}


def write_checkpoint(
    weights: Mapping[str, Tensor],
    provider: StripedHyenaProvider,
    directory: Path,
    *,
    tokenizer: Path,
    recipe: str,
    iteration: int = 1,
) -> Path:
    """Write weights that are in memory; see ``new_checkpoint``."""
    tensors = {name: in_memory(tensor.detach().cpu()) for name, tensor in weights.items()}
    with new_checkpoint(directory, iteration) as folder:
        write_tensors(tensors, folder)
        describe(folder, provider, tokenizer=tokenizer, recipe=recipe, iteration=iteration)
    return Path(directory) / layout.iteration_name(iteration)


@contextlib.contextmanager
def new_checkpoint(directory: Path, iteration: int = 1) -> Iterator[Path]:
    """An empty folder that becomes ``directory/iter_<iteration>``, the newest, when the block ends without error.

    Until then it has a hidden name beside it; on an error or an interruption it is removed, and what a run left that
    was killed, by the next.

    Raises:
        UserError: The checkpoint exists already.
    """
    directory = Path(directory)
    target = directory / layout.iteration_name(iteration)
    check_new(directory, iteration)
    remove_abandoned(directory)
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    partial = directory / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    claim = os.open(partial, os.O_RDONLY)
    try:
        lock_alone(claim, partial, choose="folder")
        yield partial
        checksums.write(partial)
        # in the folder as long as it is hidden: a disk that is full by now leaves no checkpoint, and no part of one
        _write_newest(partial, iteration)
        os.replace(partial, target)
        _name_newest(target)
    finally:
        _name_newest(target)  # where it was interrupted
        os.close(claim)
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty: the checkpoint, or somebody else's file, is in it
            for folder in made:
                folder.rmdir()


def remove_abandoned(directory: Path) -> None:
    """Remove what was being written here by processes that were killed, and the folder if there is nothing else."""
    for partial in sorted(Path(directory).glob(".iter_*.partial")):
        if is_abandoned(partial):
            logger.warning("Removing %s, which a run that was killed has left", partial)
            shutil.rmtree(partial)
            with contextlib.suppress(OSError):  # not empty
                partial.parent.rmdir()


def check_new(directory: Path, iteration: int = 1) -> None:
    """Raise UserError if the checkpoint to be written exists already, or something else is in its way."""
    target = Path(directory) / layout.iteration_name(iteration)
    if target.exists():
        if not (target.parent / layout.TRACKER).exists():  # who wrote it was killed at the very end
            _name_newest(target)
        raise UserError(f"{target} exists already; choose another folder or remove it")
    if Path(directory).exists() and not Path(directory).is_dir():
        raise UserError(f"{directory} is a file; give a folder for the checkpoint")
    check_may_write(target, advice="; choose another")


def describe(
    folder: Path,
    provider: StripedHyenaProvider,
    *,
    tokenizer: Path,
    recipe: str,
    iteration: int = 1,
    converted_from: Mapping[str, Any] | None = None,
    fp8_scales: Mapping[int, tuple[float, float]] | None = None,
) -> None:
    """Write what belongs to a checkpoint beside its weights.

    Args:
        folder: Of one iteration.
        provider: Describes the model; its ``vocab_size`` must be the number of embedding rows.
        tokenizer: Folder of the Hugging Face tokenizer; copied into the checkpoint.
        recipe: Precision that the model is meant to run in (``config.PRECISION_RECIPES``).
        iteration: Number of training steps behind the weights.
        converted_from: Plain values for ``run_config.yaml`` that say where the weights are from.
        fp8_scales: See ``RunConfig.fp8_scales``; None or empty: not known.
    """
    megatron.enter()
    read_vocab_size(tokenizer)
    _write_common(folder, iteration)
    layout.copy_tokenizer(tokenizer, folder)
    more = {} if converted_from is None else {"converted_from": dict(converted_from)}
    if fp8_scales:
        more["fp8_scales"] = {layer: list(pair) for layer, pair in fp8_scales.items()}
    _write_run_config(provider, recipe, folder, more)


def describe_as(folder: Path, sections: Mapping[str, Any], *, tokenizer: Path, iteration: int) -> None:
    """Like ``describe``, for weights that were trained.

    Args:
        folder: Of one iteration.
        sections: Contents of ``run_config.yaml``; plain values.
        tokenizer: As for ``describe``, like ``iteration``.
    """
    megatron.enter()
    _write_common(folder, iteration)
    layout.copy_tokenizer(tokenizer, folder)
    (folder / layout.RUN_CONFIG).write_text(yaml.safe_dump(dict(sections), sort_keys=False))


def _write_common(folder: Path, iteration: int) -> None:
    from megatron.bridge.training.state import TrainState

    common = {
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "optimizer": {"param_state_sharding_type": "dp_reshardable"},
        "opt_param_scheduler": {},
        "content_metadata": _CONTENT,
    }
    state = TrainState(step=iteration, do_train=True, do_valid=True, do_test=True)
    for name, values in ((layout.COMMON, common), (layout.TRAIN_STATE, state.state_dict())):
        with open(folder / name, "wb") as file:
            save_tensors(values, file)


def _write_run_config(
    provider: StripedHyenaProvider, recipe: str, folder: Path, more_sections: Mapping[str, Any]
) -> None:
    from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.core.optimizer import OptimizerConfig

    config = ConfigContainer(
        model=provider,
        train=None,
        optimizer=OptimizerConfig(),
        ddp=None,
        scheduler=None,
        dataset=None,
        logger=LoggerConfig(),
        tokenizer=TokenizerConfig(
            tokenizer_type="HuggingFaceTokenizer",
            # beside the weights, wherever they are moved
            tokenizer_model=None,
        ),
        checkpoint=CheckpointConfig(save=None, save_optim=False, save_rng=False),
        dist=None,
        mixed_precision=recipe,
    )
    path = folder / layout.RUN_CONFIG
    config.to_yaml(str(path))
    if more_sections:
        with open(path, "a") as file:
            yaml.safe_dump(dict(more_sections), file, sort_keys=False)


def _write_newest(folder: Path, iteration: int) -> None:
    """Write what will say that this is the newest, under hidden names in its own folder."""
    (folder / f".{layout.TRACKER}").write_text(f"{iteration}\n")
    if (folder / layout.TRAIN_STATE).is_file():  # old checkpoints may lack it
        shutil.copyfile(folder / layout.TRAIN_STATE, folder / f".{layout.LATEST_TRAIN_STATE}")


def _name_newest(target: Path) -> None:
    """Give what ``_write_newest`` wrote its names, unless it has them already."""
    for name in _NEWEST:
        with contextlib.suppress(FileNotFoundError):
            os.replace(target / f".{name}", target.parent / name)
