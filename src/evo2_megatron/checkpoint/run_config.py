# SPDX-License-Identifier: Apache-2.0
"""Read ``run_config.yaml``, the configuration beside the weights, without running anything that it names.

Megatron Bridge writes every object as a mapping with the import path of its class in ``_target_``. Bridge's own reader
imports and calls whatever that path names. This one reads values only: a class name is looked up in a short list, and
one that is not on it is an error.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from evo2_megatron.checkpoint.layout import RUN_CONFIG
from evo2_megatron.config import PRECISION_RECIPES, UserError

if TYPE_CHECKING:
    from megatron.bridge.training.mixed_precision import MixedPrecisionConfig

    from evo2_megatron.model.provider import StripedHyenaProvider

logger = logging.getLogger(__name__)

OWN_PROVIDER = "evo2_megatron.model.provider.StripedHyenaProvider"
HEAD_PROVIDER = "evo2_megatron.model.head.HeadProvider"

NOT_SAID = "not said"
"""Of ``converted_from.vortex_style_fp8``: whether the weights need 8-bit input projections is not known."""

BIONEMO_PROVIDERS = {
    f"bionemo.evo2.models.evo2_provider.{name}": model_size
    for name, model_size in {
        "Hyena1bModelProvider": "evo2_1b_base",
        "Hyena7bModelProvider": "evo2_7b_base",
        "Hyena7bARCLongContextModelProvider": "evo2_7b",
        "Hyena20bARCModelProvider": "evo2_20b",
        "Hyena40bModelProvider": "evo2_40b_base",
        "Hyena40bARCLongContextModelProvider": "evo2_40b",
        "HyenaNV1bModelProvider": "striped_hyena_1b_nv",
        "HyenaNV7bModelProvider": "striped_hyena_7b_nv",
        "HyenaNV40bModelProvider": "striped_hyena_40b_nv",
        "HyenaTestModelProvider": "striped_hyena_test",
        "HyenaNVTestModelProvider": "striped_hyena_test_nv",
        "HyenaNV1b2ModelProvider": "striped_hyena_1b_nv_parallel",
    }.items()
}
"""Classes named in the checkpoints of NVIDIA's recipe, and the row of the size table each stands for."""

MEGATRON_FIELDS = frozenset(
    (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
        "softmax_scale", "softmax_type", "window_size", "window_attn_skip_freq", "attention_softmax_in_fp32",
        "apply_query_key_layer_scaling", "rotary_interleaved", "no_rope_freq", "qk_layernorm", "qk_l2_norm",
        "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "gated_linear_unit", "add_bias_linear",
        "add_qkv_bias", "glu_linear_offset", "activation_func_clamp_value", "hidden_dropout", "attention_dropout",
        "apply_residual_connection_post_layernorm", "num_moe_experts", "multi_latent_attention", "init_method_std",
        "embedding_init_method_std",
    )
)  # fmt: skip
"""Megatron's own fields that fix the weight shapes or the function computed. Its other 200 belong to the machine and
the run (parallelism, fusion, recompute, memory, hooks), so this run's defaults hold; number formats come from
``mixed_precision``."""

# the same as SafeLoader, ten times faster, where PyYAML was built with libyaml
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BRIDGE_FIELDS = {"hf_model_id", "restore_modelopt_state"}
_PRECISION_TARGET = "megatron.bridge.training.mixed_precision.MixedPrecisionConfig"
_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, slots=True)
class RunConfig:
    """The parts of a ``run_config.yaml`` that loading a model needs; plain values, nothing imported."""

    path: Path
    sections: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        """The ``model`` section: fields of the provider, and its class in ``_target_``."""
        return self.sections["model"]

    @property
    def seq_length(self) -> int:
        """Longest sequence, in tokens, that the model was built for."""
        return self._count("seq_length")

    @property
    def num_layers(self) -> int:
        return self._count("num_layers")

    @property
    def pattern(self) -> str:
        """One symbol per layer."""
        value = self.model.get("hybrid_override_pattern")
        if not isinstance(value, str) or len(value) != self.num_layers:
            raise UserError(f"{self.path}: model.hybrid_override_pattern is {value!r}; the file is damaged")
        return value

    @property
    def seed(self) -> int:
        """Seed of the run; 1234, Bridge's default, where it was not written."""
        return (self.sections.get("rng") or {}).get("seed", 1234)

    @property
    def is_lora(self) -> bool:
        """Whether the checkpoint holds adapters only, on top of ``pretrained_checkpoint``."""
        return self.sections.get("peft") is not None

    @property
    def has_head(self) -> bool:
        """Whether it is a prediction head, with or without adapters, on top of ``pretrained_checkpoint``."""
        return self.model.get("_target_") == HEAD_PROVIDER

    @property
    def pretrained_checkpoint(self) -> Path | None:
        """The checkpoint that a fine-tuning run started from."""
        path = (self.sections.get("checkpoint") or {}).get("pretrained_checkpoint")
        return None if path is None else Path(path)

    @property
    def fp8_was_not_said(self) -> bool:
        """Whether weights of a size that may need 8-bit input projections were converted without saying if they do."""
        return (self.sections.get("converted_from") or {}).get("vortex_style_fp8") == NOT_SAID

    @property
    def fp8_scales(self) -> dict[int, tuple[float, float]]:
        """Scales of input and weight of 8-bit input projections, by number of the layer from 0; empty if not known."""
        section = self.sections.get("fp8_scales") or {}
        try:
            scales = {int(layer): (float(pair[0]), float(pair[1])) for layer, pair in section.items()}
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            scales = {-1: (0.0, 0.0)}
        if not all(0 < scale < math.inf for pair in scales.values() for scale in pair):
            raise UserError(
                f"{self.path}: section 'fp8_scales' is not a table of two numbers above 0 each; the file is damaged"
            )
        return scales

    def _count(self, name: str) -> int:
        value = self.model.get(name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{self.path}: model.{name} is {value!r} instead of a number; the file is damaged")
        return value

    def recipe(self) -> str | None:
        """Name of the precision recipe, with underscores, if the file gives a name and not its values."""
        section = self.sections.get("mixed_precision")
        if not isinstance(section, str):
            return None
        if section not in PRECISION_RECIPES:
            raise UserError(
                f"{self.path}: unknown mixed_precision {section!r}; choose one with --mixed-precision-recipe"
            )
        return section.replace("-", "_")

    def precision_values(self) -> MixedPrecisionConfig | None:
        """The precision settings, if the file gives their values and not a recipe's name."""
        section = self.sections.get("mixed_precision")
        if section is None or isinstance(section, str):
            return None
        from megatron.bridge.training.mixed_precision import MixedPrecisionConfig

        target = section.get("_target_")
        if target != _PRECISION_TARGET:
            raise self._unknown_class("mixed_precision", target)
        known = {field.name for field in dataclasses.fields(MixedPrecisionConfig) if field.init}
        return MixedPrecisionConfig(**self._values("mixed_precision", section, known))

    def provider(self, **overrides: Any) -> StripedHyenaProvider:
        """Build our model provider from the ``model`` section.

        Args:
            overrides: Fields that replace what the file says.

        Raises:
            UserError: The section names a class that is not on the list, or a value that is not plain.
        """
        from evo2_megatron.model.head import HeadProvider
        from evo2_megatron.model.provider import StripedHyenaProvider, provider_for

        target = self.model.get("_target_")
        own = {OWN_PROVIDER: StripedHyenaProvider, HEAD_PROVIDER: HeadProvider}.get(target)
        values = self._values("model", self.model, _readable_fields(own or StripedHyenaProvider)) | overrides
        if own is not None:
            return own(**values)
        if target in BIONEMO_PROVIDERS:
            return provider_for(BIONEMO_PROVIDERS[target], **values)
        raise self._unknown_class("model", target)

    def _values(self, section: str, mapping: Mapping[str, Any], known: set[str] | frozenset[str]) -> dict[str, Any]:
        for name in sorted(mapping.keys() - known - {"_target_"}):
            logger.debug("%s: %s.%s is not read", self.path, section, name)
        return {name: self._value(f"{section}.{name}", mapping[name]) for name in mapping if name in known}

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return self._dtype(name, value.get("_target_"))
        if isinstance(value, list):
            return [self._value(name, item) for item in value]
        if isinstance(value, str) and value.startswith("torch."):
            return self._dtype(name, value)
        return value

    def _dtype(self, name: str, target: Any) -> Any:
        import torch

        if target not in [f"torch.{dtype}" for dtype in _DTYPES]:
            raise self._unknown_class(name, target)
        return getattr(torch, target.removeprefix("torch."))

    def _unknown_class(self, name: str, target: Any) -> UserError:
        return UserError(
            f"{self.path}: {name} names {target!r}, which is not one of the classes that an Evo 2 checkpoint may "
            "name; nothing was loaded"
        )


def read_run_config(checkpoint: Path) -> RunConfig:
    """Read the configuration of one checkpoint.

    Args:
        checkpoint: Folder that holds ``run_config.yaml`` (see ``layout.resolve_checkpoint_path``).

    Raises:
        UserError: The file is not there, not plain YAML, or has no ``model`` section.
    """
    path = Path(checkpoint) / RUN_CONFIG
    try:
        sections = yaml.load(path.read_text(), Loader=_YAML_LOADER)
    except FileNotFoundError:
        raise UserError(f"{path} is gone; is another run still writing and clearing that folder?") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(sections, Mapping) or not isinstance(sections.get("model"), Mapping):
        raise UserError(f"{path} has no section 'model'; it does not describe a trained model")
    for name in ("rng", "checkpoint"):
        if not isinstance(sections.get(name), (Mapping, type(None))):
            raise UserError(f"{path}: section {name!r} is not a mapping; the file is damaged")
    model = dict(sections["model"])
    if model.pop("int8_weights", False):  # what it was called before there were 4 bits
        model["quantize_weights"] = "int8"
    return RunConfig(path, {**sections, "model": model})


def check_kind(run_config: RunConfig, *, head: bool) -> None:
    """Raise UserError for a checkpoint of a prediction head where none is wanted, and the other way round."""
    if run_config.has_head and not head:
        raise UserError(
            f"{run_config.path.parent} holds a prediction head, which is no language model; use evo2_predict_head"
        )
    if head and not run_config.has_head:
        raise UserError(f"{run_config.path.parent} has no prediction head; train one with evo2_train_head")


def _readable_fields(provider: type) -> set[str]:
    """Fields of our provider that a file may set: ours, and those of Megatron's that change the model."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    inherited = {field.name for field in dataclasses.fields(TransformerConfig)}
    own = {field.name for field in dataclasses.fields(provider) if not field.name.startswith("_")} - inherited
    return own - _BRIDGE_FIELDS | MEGATRON_FIELDS
