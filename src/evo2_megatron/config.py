# SPDX-License-Identifier: Apache-2.0
"""Settings that several commands share. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class UserError(ValueError):
    """Input that the user can mend. The message is one line: what is wrong, and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How many processes share one copy of the model; what is left of the world size is data parallel."""

    tensor: int = 1
    """Processes that split each weight matrix."""

    pipeline: int = 1
    """Processes that split the stack of layers."""

    context: int = 1
    """Processes that split each sequence."""

    sequence_parallel: bool | None = None
    """Split activations between tensor-parallel regions along the sequence; None: whenever tensor > 1."""

    @property
    def splits_activations(self) -> bool:
        """Whether sequence parallelism is on."""
        return self.tensor > 1 and self.sequence_parallel is not False

    @property
    def model_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    def check_world_size(self, world_size: int) -> None:
        """Raise UserError unless ``world_size`` processes can be divided into copies of the model."""
        for name in ("tensor", "pipeline", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} parallel size is {getattr(self, name)}; it must be 1 or more")
        if world_size % self.model_size:
            raise UserError(
                f"{world_size} processes do not fit tensor {self.tensor} x pipeline {self.pipeline} x context "
                f"{self.context} = {self.model_size}; start a multiple of {self.model_size}, with --devices or "
                "torchrun"
            )


_REDUCED_PRECISION = (
    "bf16_mixed",
    "fp16_mixed",
    "bf16_with_fp8_delayed_scaling_mixed",
    "fp16_with_fp8_delayed_scaling_mixed",
    "bf16_with_fp8_current_scaling_mixed",
    "fp16_with_fp8_current_scaling_mixed",
    "nemotron_h_bf16_with_fp8_current_scaling_mixed",
    "nanov2_bf16_with_fp8_current_scaling_mixed",
    "bf16_with_fp8_subchannel_scaling_mixed",
    "fp16_with_fp8_subchannel_scaling_mixed",
    "bf16_with_mxfp8_mixed",
    "fp16_with_mxfp8_mixed",
    "bf16_with_nvfp4_mixed",
)

PRECISION_RECIPES = ("fp32", *_REDUCED_PRECISION, *(name.replace("_", "-") for name in _REDUCED_PRECISION))
"""Names that every ``--mixed-precision-recipe`` accepts; with hyphens or underscores, as Megatron Bridge does."""


WeightFormat = Literal["none", "int8", "int4"]
"""How the frozen weights of linear layers are kept: as the precision has them, or in 8 or 4 bits."""

Fp8Choice = Literal["as_asked", "emulate", "allow_mismatch"]
"""What to do about 8-bit input projections: what the checkpoint asks for, or an error where this machine cannot; round
to 8 bits on any device; or, where they are asked for, do without."""


def uses_fp8(recipe: str) -> bool:
    """Whether a precision recipe needs hardware with 8-bit (or 4-bit) floating-point matrix products."""
    return "fp8" in recipe or "fp4" in recipe
