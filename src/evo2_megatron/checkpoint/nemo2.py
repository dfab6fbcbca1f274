# SPDX-License-Identifier: Apache-2.0
"""Find the weights in a checkpoint of NeMo 2.

::

    <checkpoint>/
      context/   serialised configuration objects; not read, --model-size says what the model is
      weights/   a torch_dist folder whose tensors have our names after "module."
"""

from __future__ import annotations

from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from evo2_megatron.checkpoint.distcp import read_index, tensor_entries
from evo2_megatron.checkpoint.names import is_weight
from evo2_megatron.config import UserError

_PREFIX = "module."


def find_weights(checkpoint: Path) -> tuple[Path, Metadata, dict[str, str]]:
    """Folder of the weights, its index, and for each weight its name there: our name.

    Optimizer, random and FP8 state is left out.

    Raises:
        UserError: No such folder, or none in this format.
    """
    folder = Path(checkpoint) / "weights"
    if not folder.is_dir():
        raise UserError(f"{checkpoint} has no folder 'weights'; give the folder of a NeMo 2 checkpoint")
    index = read_index(folder)
    names = [name for name in tensor_entries(index) if is_weight(name.removeprefix(_PREFIX))]
    return folder, index, {name: name.removeprefix(_PREFIX) for name in names}
