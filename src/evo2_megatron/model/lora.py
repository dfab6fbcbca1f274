# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters on chosen linear layers of a frozen model, and modules that stay trainable beside them.

The adapters are Megatron Bridge's: ``y = W x + alpha / dim * B A dropout(x)`` with A [dim, in] and B [out, dim], where
x is what the matrix meets: after the norm, if one is fused. Here is what Bridge's LoRA does not know: which layers of
an Evo 2 model can have one, tied embeddings, modules kept trainable, and layer numbers under pipeline parallelism.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.bridge.peft.lora import LoRA
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from torch import nn

from evo2_megatron.config import UserError
from evo2_megatron.model.striped_hyena import StripedHyenaModel
from evo2_megatron.model.torch_modules import RMSNormColumnLinear

EMBEDDING, OUTPUT = "embedding.word_embeddings", "output_layer"
LINEAR = ("dense_projection", "dense", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", OUTPUT)
"""Names of the modules that can have an adapter."""


class Choice(NamedTuple):
    """What becomes of a model's modules; all others are frozen. Paths count layers from 0 in the whole model."""

    adapted: frozenset[str]
    """Linear layers that get an adapter."""

    kept: frozenset[str]
    """Modules whose own parameters, not those of modules inside them, stay trainable."""

    unmatched: tuple[str, ...]
    """Patterns that match no module with parameters."""


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern means a module: its own name, its whole path, or a path in which ``*`` is any text."""
    if pattern == path.rpartition(".")[2]:
        return True
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), path) is not None


def choose(
    paths: Collection[str], *, targets: Sequence[str], skip_freeze: Sequence[str], tied_embeddings: bool
) -> Choice:
    """Apply the two lists of patterns to the modules of a model.

    Args:
        paths: All modules of the whole model that have parameters of their own, and ``output_layer``.
        targets: Patterns of the modules to adapt.
        skip_freeze: Patterns of the modules to keep trainable.
        tied_embeddings: Whether the output layer uses the embedding's table.

    Raises:
        UserError: A module that cannot have an adapter, one in both lists, or one of two that share a weight.
    """
    adapted, kept = ({path for path in paths if _any(patterns, path)} for patterns in (targets, skip_freeze))
    if EMBEDDING in adapted:
        raise UserError(
            "target_modules includes word_embeddings, and VocabParallelEmbedding does not support LoRA adapters; take "
            "it out of --lora-target-modules, or train it whole with --lora-skip-freeze-modules"
        )
    if tied_embeddings and OUTPUT in adapted:
        raise UserError(
            "target_modules includes output_layer, which has no weight of its own in a model with "
            "share_embeddings_and_output_weights=True; take it out of --lora-target-modules"
        )
    if tied_embeddings and len(kept & {EMBEDDING, OUTPUT}) == 1:
        raise UserError(
            "skip_freeze_modules includes only one of word_embeddings and output_layer, which are one weight in a "
            "model with share_embeddings_and_output_weights=True; list both in --lora-skip-freeze-modules, or neither"
        )
    if adapted & kept:
        raise UserError(
            f"skip_freeze_modules and target_modules must not overlap: both match {min(adapted & kept)}; take it out "
            "of --lora-target-modules or of --lora-skip-freeze-modules"
        )
    for path in sorted(adapted):
        if path.rpartition(".")[2] not in LINEAR:
            raise UserError(
                f"target_modules includes {path}, which is not a linear layer; choose among {', '.join(LINEAR)} with "
                "--lora-target-modules, or train it whole with --lora-skip-freeze-modules"
            )
    unmatched = tuple(p for p in (*targets, *skip_freeze) if not any(matches(p, path) for path in paths))
    return Choice(frozenset(adapted), frozenset(kept), unmatched)


def _any(patterns: Sequence[str], path: str) -> bool:
    return any(matches(pattern, path) for pattern in patterns)


@dataclass
class Evo2LoRA(LoRA):
    """Megatron Bridge's LoRA for StripedHyena 2; its fields are the section ``peft`` of run_config.yaml.

    ``target_modules`` and ``skip_freeze_modules`` are lists of patterns, see ``matches``.
    """

    skip_freeze_modules: list[str] = field(default_factory=list)
    """Modules that stay trainable, without an adapter."""

    def __call__(self, model: Any, training: bool = True) -> Any:
        """Freeze a model, give it adapters and unfreeze what stays trainable; once, on every process of its pipeline.

        Args:
            model: One pipeline stage, or a list of one as Bridge passes it; changed in place and returned.
            training: The mode that it is left in.

        Raises:
            UserError: See ``choose``.
        """
        (stage,) = model if isinstance(model, list) else [model]
        inner = unwrap_model(stage)
        owners = list(_owners(inner))
        choice = choose(
            _of_all_stages(inner, [path for path, _ in owners]),
            targets=self.target_modules,
            skip_freeze=self.skip_freeze_modules,
            tied_embeddings=inner.share_embeddings_and_output_weights,
        )
        for parameter in inner.parameters():
            parameter.requires_grad_(False)
        kept: set[str] = set()
        for path, name in owners:
            module = inner.get_submodule(name)
            if path in choice.adapted:
                parent, _, own = name.rpartition(".")
                setattr(inner.get_submodule(parent), own, self.transform(module, own, path.rpartition(".")[0]))
            elif path in choice.kept:
                for own, parameter in module.named_parameters(recurse=False):
                    kept.add(f"{name}.{own}")
                    # weights in 8 bits have been trained, and cannot be
                    parameter.requires_grad_(parameter.is_floating_point())
        self.set_params_to_save(inner)
        self.params_to_save |= kept
        stage.train(training)
        return model

    def match(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> tuple[str, str] | None:
        """The first target pattern that means a module, and the module's path; None if there is none."""
        path = f"{prefix}.{name}" if prefix else str(name)
        return next(((pattern, path) for pattern in self.target_modules if matches(pattern, path)), None)

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """A linear layer behind Bridge's wrapper with an adapter."""
        if isinstance(module, RMSNormColumnLinear):
            # what Bridge asks of Transformer Engine's layer: the adapter takes what the matrix does
            module.return_layernorm_output = True
        wrapped = super().transform(module, name, prefix)
        if not wrapped.adapter.config.use_cpu_initialization:
            # each process drew its own part of A, with the spread that fits a matrix of the part's size
            part = wrapped.adapter.linear_in
            part.weight.data *= math.sqrt(sum(part.weight.shape) / (part.input_size + part.output_size))
        return wrapped


def _owners(model: StripedHyenaModel) -> Iterator[tuple[str, str]]:
    """Path in the whole model, and name in this stage, of the modules that ``choose`` wants to know."""
    numbers = {f"decoder.layers.{i}": layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    for name, module in model.named_modules():
        if name != OUTPUT and next(module.parameters(recurse=False), None) is None:
            continue
        layer = ".".join(name.split(".")[:3])
        path = name if layer not in numbers else f"decoder.layers.{numbers[layer]}{name.removeprefix(layer)}"
        yield path, name


def _of_all_stages(model: MegatronModule, paths: list[str]) -> set[str]:
    group = model.pg_collection.pp
    of_each: list[list[str]] = [[]] * group.size()
    torch.distributed.all_gather_object(of_each, paths, group=group)
    return {path for of_one in of_each for path in of_one}
