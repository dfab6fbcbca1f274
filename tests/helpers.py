# SPDX-License-Identifier: Apache-2.0
"""What several tests build."""

from __future__ import annotations

import contextlib
import csv
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STUDIES = Path(__file__).parents[1] / "examples" / "studies"

# published figures, embedding of 512 rows, decay buffers not counted
PARAMETERS = {
    "evo2_tiny": 884_192,
    "evo2_mini": 14_434_080,
    "striped_hyena_tiny_nv": 884_096,
    "evo2_1b_base": 1_108_204_800,
    "evo2_7b_base": 6_481_649_408,
    "evo2_7b": 6_582_312_704,
    "evo2_20b": 19_739_697_664,
    "evo2_40b_base": 40_332_977_152,
    "evo2_40b": 41_119_409_152,
    "striped_hyena_1b_nv": 1_108_198_016,
    "striped_hyena_7b_nv": 6_582_294_528,
    "striped_hyena_40b_nv": 41_119_350_784,
    "striped_hyena_1b_nv_parallel": 1_209_332_736,
    "striped_hyena_test": 812_001_024,
    "striped_hyena_test_nv": 811_997_184,
}


@contextlib.contextmanager
def no_file_larger_than(num_bytes: int) -> Iterator[None]:
    """The operating system refuses to write more, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Lines of a table with a heading, by column."""
    with path.open() as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def tiny_model(model_size: str = "evo2_tiny", **overrides: Any):
    """A float32 model with random weights in eval mode; needs the fixture ``one_process``."""
    import torch

    from evo2_megatron.model.provider import provider_for

    settings = {"vocab_size": 512, "params_dtype": torch.float32, "bf16": False} | overrides
    provider = provider_for(model_size, **settings)
    provider.finalize()
    return provider.provide().eval()


TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""A cache that forgets anything moves logits of ``sensitive_model`` by 5e-4 or more; rounding moves them by 4e-7."""


def sensitive_model(model_size: str):
    """As ``tiny_model``, but what the medium filter remembers matters: it starts so small that it would not show."""
    import torch

    torch.manual_seed(0)
    model = tiny_model(model_size)
    with torch.no_grad():
        model.decoder.layers[1].mixer.mixer.filter.h *= 1000
    return model


def random_tokens(length: int, seed: int = 0) -> list[int]:
    """Letters."""
    import torch

    return torch.randint(65, 91, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Hostile:
    """Pickles to instructions that, followed without care, make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))
