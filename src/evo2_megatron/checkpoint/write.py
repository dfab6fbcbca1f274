# SPDX-License-Identifier: Apache-2.0
"""Write weights as a Megatron Bridge checkpoint: no optimizer, no random state. For converters and tests.

Training saves through Megatron Bridge itself; this is for one process that holds all tensors.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo2_megatron.checkpoint import layout
from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import read_vocab_size
from evo2_megatron.runtime import megatron

if TYPE_CHECKING:
    from evo2_megatron.model.provider import StripedHyenaProvider

# how the keys of the weights are laid out, for the reader (see Megatron Bridge, _build_sharded_state_dict_metadata)
_CONTENT = {
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "dp_reshardable",
    "chained_optim_avoid_prefix": True,
}


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
    """Write ``directory/iter_<iteration>`` and make it the newest of the folder; all of it or nothing.

    Args:
        weights: Whole tensors under the names of checkpoints, in any dtype and on any device.
        provider: Describes the model; its ``vocab_size`` must be the number of embedding rows.
        directory: Folder of checkpoints; made if need be.
        tokenizer: Folder of the Hugging Face tokenizer; copied into the checkpoint.
        recipe: Precision that the model is meant to run in (``config.PRECISION_RECIPES``).
        iteration: Number of training steps behind the weights.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: The checkpoint exists already.
    """
    megatron.enter()
    directory = Path(directory)
    target = directory / layout.iteration_name(iteration)
    if target.exists():
        raise UserError(f"{target} exists already; choose another folder or remove it")
    read_vocab_size(tokenizer)
    partial = directory / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir(parents=True)
    try:
        _write_weights(weights, partial)
        _write_common(partial, iteration)
        shutil.copytree(tokenizer, partial / layout.TOKENIZER)
        _write_run_config(provider, recipe, directory, partial)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _make_newest(directory, target, iteration)
    return target


def _write_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from torch.distributed import checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        dcp.save(dict(weights), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def _write_common(folder: Path, iteration: int) -> None:
    from megatron.bridge.training.state import TrainState

    common = {
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "optimizer": {"param_state_sharding_type": "dp_reshardable"},
        "opt_param_scheduler": {},
        "content_metadata": _CONTENT,
    }
    torch.save(common, folder / "common.pt")
    state = TrainState(step=iteration, do_train=True, do_valid=True, do_test=True)
    torch.save(state.state_dict(), folder / layout.TRAIN_STATE)


def _write_run_config(provider: StripedHyenaProvider, recipe: str, directory: Path, folder: Path) -> None:
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
        checkpoint=CheckpointConfig(save=str(directory), save_optim=False, save_rng=False),
        dist=None,
        mixed_precision=recipe,
    )
    config.to_yaml(str(folder / layout.RUN_CONFIG))


def _make_newest(directory: Path, target: Path, iteration: int) -> None:
    partial = directory / f".tracker.{os.getpid()}.partial"
    shutil.copyfile(target / layout.TRAIN_STATE, partial)
    os.replace(partial, directory / layout.LATEST_TRAIN_STATE)
    partial.write_text(f"{iteration}\n")
    os.replace(partial, directory / layout.TRACKER)
