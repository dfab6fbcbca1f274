# SPDX-License-Identifier: Apache-2.0
"""Read a checkpoint's weights into a model, whatever the parallel layouts of the two."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evo2_megatron.checkpoint import layout
from evo2_megatron.checkpoint.names import check_tensors, is_weight, unfused
from evo2_megatron.config import UserError

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

    from evo2_megatron.model.striped_hyena import StripedHyenaModel


def load_weights(
    wrapped: MegatronModule,
    checkpoint: Path,
    stored: Mapping[str, tuple[int, ...]],
    *,
    dropped_layers: Iterable[int],
    only: Callable[[str], bool] = lambda name: True,
) -> None:
    """Fill a model with a checkpoint's weights, on all processes together.

    Args:
        wrapped: The model, or its wrapper for 16 bits.
        checkpoint: Folder of the iteration.
        stored: What ``tensor_shapes`` gives for it.
        dropped_layers: Layers that the checkpoint has and the model, by intention, has not; counted from 0.
        only: Which of the model's tensors, by their names in this stage, the checkpoint is to have; the others stay.

    Raises:
        UserError: Tensors that are missing, not understood, or of another shape.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
    from megatron.core.utils import unwrap_model

    model = unwrap_model(wrapped)
    layout.check_common(checkpoint)
    with _in_one_line(checkpoint):
        content = dist_checkpointing.load_content_metadata(str(checkpoint)) or {"singleton_local_shards": False}
    entries = partial(_entries, model, ensure_metadata_has_dp_cp_group(content), stored, only)
    wanted = _of_all_processes(_global_shapes(entries()))
    dropped = tuple(f"decoder.layers.{i}." for i in dropped_layers)
    check_tensors(
        {name: shape for name, shape in stored.items() if is_weight(name) and not name.startswith(dropped or "\0")},
        wanted,
        source=f"the weights in {checkpoint} are not those of the model that its run_config.yaml describes",
        remedy="check that the two files belong together",
    )
    missing = {name for name in model.state_dict() if "_extra_state" not in name and only(name)}
    for names in _parts(model, missing):
        missing -= _load_part(model, checkpoint, entries, names)
    assert not missing, str(sorted(missing))


def _load_part(
    model: StripedHyenaModel, checkpoint: Path, entries: Callable[[], dict[str, Any]], names: Collection[str]
) -> set[str]:
    """Fill in some tensors; returns the names of those that were."""
    from megatron.core import dist_checkpointing

    from evo2_megatron.model.quantized_linear import in_full_width

    with in_full_width(model, names), _in_one_line(checkpoint):
        part = {name: entry for name, entry in entries().items() if name in names}
        # a pipeline stage without adapters asks for nothing
        loaded = dist_checkpointing.load({"model": part}, str(checkpoint)).get("model", {})
        result = model.load_state_dict(loaded, strict=False)
        assert not result.unexpected_keys, str(result.unexpected_keys)
        return set(loaded)


def _global_shapes(sharded: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

    tensors = [entry for entry in nested_values(load_preprocess(sharded)[0]) if isinstance(entry, ShardedTensor)]
    return {tensor.key: tuple(tensor.global_shape) for tensor in tensors}


def _entries(
    model: StripedHyenaModel, metadata: dict[str, Any], stored: Mapping[str, tuple[int, ...]], only: Callable
) -> dict[str, Any]:
    """Of each of the model's tensors where it is, what part of it is here, and its name in the checkpoint."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    whole = model.sharded_state_dict(metadata=metadata)
    # FP8 scaling history: not part of the weights, and the only entries that would be unpickled
    sharded = {name: entry for name, entry in whole.items() if "_extra_state" not in name and only(name)}
    for entry in sharded.values():
        # written without Transformer Engine's fused layers
        if isinstance(entry, ShardedTensor) and entry.key not in stored and unfused(entry.key) in stored:
            entry.key = unfused(entry.key)
    return sharded


def _parts(model: StripedHyenaModel, names: Iterable[str]) -> list[set[str]]:
    """What is read at a time: all, or for a quantized model one layer, as many parts on every process."""
    if model.config.quantize_weights == "none":
        return [set(names)]
    # of a stage; some have a layer less
    num_layers = -(-model.config.num_layers // model.config.pipeline_model_parallel_size)
    parts: list[set[str]] = [set() for _ in range(num_layers + 1)]
    for name in names:
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        parts[int(layer[1]) if layer else num_layers].add(name)
    return parts


@contextlib.contextmanager
def _in_one_line(checkpoint: Path) -> Iterator[None]:
    """Show torch's refusal of a file that holds more than tensors, and its failure to read one, as a UserError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
        return
    except CheckpointException as error:
        cause: BaseException = next(iter(error.failures.values()))[0]
    except (pickle.UnpicklingError, EOFError) as error:
        cause = error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):  # of a file, and not, say, of a GPU's memory
            raise
        cause = error
    if isinstance(cause, KeyboardInterrupt):  # torch reports Ctrl-C as it does a file that cannot be read
        raise cause
    if isinstance(cause, pickle.UnpicklingError):
        raise UserError(
            f"a file of {checkpoint} holds more than tensors and plain values; it was not run and nothing was loaded"
        ) from cause
    reason = str(cause).partition("\n")[0] or "a file ends too early"
    raise UserError(f"{checkpoint} cannot be read ({reason}); copy it again") from cause


def _of_all_processes(mine: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Each pipeline stage knows its own tensors only."""
    of_each: list[dict[str, tuple[int, ...]]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_each, mine)
    return {name: shape for of_one in of_each for name, shape in of_one.items()}
