# SPDX-License-Identifier: Apache-2.0
"""The one Megatron Bridge provider: a model's configuration, and the means to build it."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from megatron.bridge.models.model_provider import ModelProviderMixin
from megatron.bridge.models.transformer_config import TransformerConfig
from megatron.bridge.utils.fusions import can_enable_gradient_accumulation_fusion
from megatron.bridge.utils.vocab_utils import calculate_padded_vocab_size
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend

from evo2_megatron import layouts
from evo2_megatron.architectures import LAYER_SYMBOLS, Architecture, architecture
from evo2_megatron.config import UserError, WeightFormat
from evo2_megatron.model.flops import training_flops
from evo2_megatron.model.layer_specs import uses_transformer_engine
from evo2_megatron.model.loss import LOWERCASE_WEIGHT, Normalization
from evo2_megatron.model.striped_hyena import StripedHyenaModel
from evo2_megatron.ops.backends import can_run_compiled
from evo2_megatron.ops.int4 import group_size
from evo2_megatron.runtime.megatron import on_cuda

logger = logging.getLogger(__name__)


@dataclass
class StripedHyenaProvider(TransformerConfig, ModelProviderMixin[StripedHyenaModel]):
    """Megatron's transformer configuration and what StripedHyena 2 adds to it.

    Field names are those of the ``model`` section of existing checkpoints' run_config.yaml. Build one with
    ``provider_for``; call ``finalize`` after changing fields and before ``provide``.
    """

    hybrid_override_pattern: str = ""
    """One symbol per layer: S, D, H, or * (see ``architectures.LAYER_SYMBOLS``)."""

    seq_length: int = 8192
    """Tokens per training sequence."""

    vocab_size: int | None = None
    """Tokens in the vocabulary; None: taken from the tokenizer when training starts."""

    should_pad_vocab: bool = False
    """Round the embedding's rows up to a multiple of ``make_vocab_size_divisible_by`` x tensor parallelism."""

    make_vocab_size_divisible_by: int = 8
    num_groups_hyena: int | None = None
    """Long filters; always one per channel."""

    num_groups_hyena_medium: int | None = None
    num_groups_hyena_short: int | None = None
    remove_activation_post_first_layer: bool = True
    """The gate's GELU is in the first layer only (Arc's models)."""

    add_attn_proj_bias: bool = True
    use_short_conv_bias: bool = False
    share_embeddings_and_output_weights: bool = True
    add_bias_output: bool = False
    """Give the output projection a bias."""

    rotary_base: int = 10_000
    rotary_percent: float = 1.0
    seq_len_interpolation_factor: float | None = None
    """Divides positions before the rotary embedding."""

    to_upper: str = "normalized_weighted"
    """How lower-case labels count: ``normalized_weighted`` or ``weighted`` (see ``model.loss``)."""

    lowercase_loss_weight: float = LOWERCASE_WEIGHT
    """Weight of a lower-case label, whichever of the two."""

    loss_normalization: Normalization = "sequence"
    """Over what ``normalized_weighted`` normalizes: ``sequence`` or ``micro_batch`` (see ``model.loss``)."""

    parallel_output: bool = True
    fp16_lm_cross_entropy: bool = False
    use_subquadratic_ops: bool = False
    vortex_style_fp8: bool = False
    """The model was trained with 8-bit input projections in its Hyena layers and asks to be run so; see
    ``checkpoint.precision_contract``."""

    fp8_emulation: bool = False
    """Round what goes into these projections to 8 bits, with ordinary matrix products (see ``model.fp8_linear``)."""

    fp8_projections: bool = False
    """Multiply 8 bits in these projections, for scoring and generation (see ``model.fp8_linear``)."""

    quantize_weights: WeightFormat = "none"
    """Keep the weights of linear layers, then not trained, in 8 or 4 bits (see ``model.quantized_linear``)."""

    restore_modelopt_state: bool = False
    hf_model_id: str | None = None

    # Megatron's own fields whose default differs for this model
    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-6
    gated_linear_unit: bool = True
    add_bias_linear: bool = False
    bias_activation_fusion: bool = False
    bias_dropout_fusion: bool = True
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    params_dtype: torch.dtype = torch.bfloat16
    bf16: bool = True
    deallocate_pipeline_outputs: bool = True
    _pg_collection: ProcessGroupCollection | None = None

    def process_groups(self) -> ProcessGroupCollection:
        """Megatron's process groups, as Bridge handed them over or as they stand now."""
        return self._pg_collection or ProcessGroupCollection.use_mpu_process_groups()

    def finalize(self) -> None:
        """Check the configuration, fit it to this machine, and let Megatron derive the rest.

        Raises:
            UserError: The pattern or the parallel layout does not fit the model.
        """
        self._check_pattern()
        self._check_layout()
        self._fit_to_machine()
        super().finalize()
        # "small init" and "wang init" of GPT-NeoX-20B (arXiv 2204.06745); partials, because run_config.yaml names them
        normal = functools.partial(functools.partial, torch.nn.init.normal_, mean=0.0)
        self.init_method = normal(std=math.sqrt(2 / (5 * self.hidden_size)))
        self.output_layer_init_method = normal(std=2 / (self.num_layers * math.sqrt(self.hidden_size)))
        self.embedding_init_method = normal(std=self.embedding_init_method_std)

    def _check_pattern(self) -> None:
        pattern = self.hybrid_override_pattern
        if set(pattern) - LAYER_SYMBOLS.keys():
            raise UserError(f"layer pattern {pattern!r} may contain only {' '.join(LAYER_SYMBOLS)}")
        if len(pattern) != self.num_layers:
            raise UserError(
                f"layer pattern {pattern!r} has {len(pattern)} symbols for {self.num_layers} layers; give "
                "--num-layers and --hybrid-override-pattern that agree"
            )
        if self.to_upper not in ("normalized_weighted", "weighted"):
            raise UserError(f"to_upper is {self.to_upper!r}; choose normalized_weighted or weighted")
        if not 0 <= self.lowercase_loss_weight < math.inf:
            raise UserError(f"--lowercase-loss-weight is {self.lowercase_loss_weight}; give a number from 0 on")
        if self.loss_normalization not in get_args(Normalization):
            raise UserError(f"loss_normalization is {self.loss_normalization!r}; choose sequence or micro_batch")

    def _check_layout(self) -> None:
        divided = {
            "hidden size": self.hidden_size,
            "FFN width": self.ffn_hidden_size,
            "attention heads": self.num_attention_heads,
            "medium filter groups": self.num_groups_hyena_medium,
            "short filter groups": self.num_groups_hyena_short,
        }
        layouts.check_tensor_parallel(divided, self.tensor_model_parallel_size)
        self._check_groups()
        layouts.check_pipeline_parallel(self.num_layers, self.pipeline_model_parallel_size)
        if self.virtual_pipeline_model_parallel_size is not None:
            raise UserError("virtual pipeline stages are not supported; leave the setting out")

    def _check_groups(self) -> None:
        """Weights in 4 bits share scales in groups, which processes must not divide."""
        if self.quantize_weights not in get_args(WeightFormat):
            raise UserError(f"quantize_weights is {self.quantize_weights!r}; choose one of none, int8 and int4")
        for name, size in (("hidden size", self.hidden_size), ("FFN width", self.ffn_hidden_size)):
            group = group_size(size)
            if self.quantize_weights == "int4" and (group is None or size // self.tensor_model_parallel_size % group):
                raise UserError(
                    f"--quantize-weights int4 takes 64 or 32 channels together, and the {name} {size} in "
                    f"{self.tensor_model_parallel_size} parts is no multiple of it; choose int8, or another "
                    "--tensor-parallel-size"
                )

    def _fit_to_machine(self) -> None:
        """The only place where the configuration depends on the machine."""
        with_te = uses_transformer_engine(self)
        self.transformer_impl = "transformer_engine" if with_te else "local"
        # read by Transformer Engine alone, once for all models of a process. Flash would mean the package flash-attn
        # and nothing else; from Hopper on Transformer Engine takes cuDNN's kernel even where that is, too
        self.attention_backend = AttnBackend.auto
        self.apply_rope_fusion = with_te
        self.persist_layer_norm = with_te
        self.masked_softmax_fusion = with_te
        self.gradient_accumulation_fusion = with_te and can_enable_gradient_accumulation_fusion()
        self.use_cpu_initialization = not on_cuda()
        if self.use_subquadratic_ops and not can_run_compiled():
            raise UserError("use_subquadratic_ops needs a CUDA GPU; switch it off, the results are the same")
        if self.vortex_style_fp8:
            raise UserError(
                "vortex_style_fp8 is what a checkpoint asks for; load it with checkpoint.load.load_model, which picks "
                "between fp8_projections, fp8_emulation and neither"
            )

    def _get_num_floating_point_operations(self, batch_size: int) -> float:
        """Megatron Bridge's hook: operations of one optimizer step, for the TFLOP/s that it logs."""
        return training_flops(
            self.hybrid_override_pattern,
            batch_size=batch_size,
            seq_length=self.seq_length,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            vocab_size=self.vocab_size,
        )

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> StripedHyenaModel:
        """Build this process's stage of the model, with random weights."""
        assert vp_stage is None and self.vocab_size is not None
        pipeline = self.process_groups().pp
        rows = self.vocab_size
        if self.should_pad_vocab:
            rows = calculate_padded_vocab_size(
                rows, self.make_vocab_size_divisible_by, self.tensor_model_parallel_size, logging_enabled=False
            )
        return StripedHyenaModel(
            self,
            rows,
            pre_process=pipeline.rank() == 0 if pre_process is None else pre_process,
            post_process=pipeline.rank() == pipeline.size() - 1 if post_process is None else post_process,
        )


def provider_for(model_size: str, **overrides: Any) -> StripedHyenaProvider:
    """The provider of a ``--model-size`` key.

    Args:
        model_size: A key of ``architectures.ARCHITECTURES``; UserError otherwise.
        overrides: Fields of StripedHyenaProvider.
    """
    arch = architecture(model_size)
    unknown = overrides.keys() - {f.name for f in fields(StripedHyenaProvider)}
    if unknown:
        raise AttributeError(f"StripedHyenaProvider has no field {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {
        "hybrid_override_pattern": arch.pattern,
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_heads,
        "num_groups_hyena": arch.hidden_size,
        "num_groups_hyena_medium": arch.num_groups,
        "num_groups_hyena_short": arch.num_groups,
        "seq_length": arch.max_tokens,
        "rotary_base": arch.rotary_base,
        "seq_len_interpolation_factor": arch.position_scale,
        "remove_activation_post_first_layer": not arch.gelu_in_every_layer,
        "add_attn_proj_bias": arch.attention_output_bias,
        "use_short_conv_bias": arch.short_conv_bias,
        "share_embeddings_and_output_weights": arch.tied_embeddings,
        "add_bias_output": arch.output_bias,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": arch.recompute_num_layers,
    }
    if arch.embedding_init_std is not None:
        values["embedding_init_method_std"] = arch.embedding_init_std
    return StripedHyenaProvider(**(values | overrides))


def architecture_of(provider: StripedHyenaProvider) -> Architecture:
    """The sizes and variants of the model that a provider describes; the inverse of ``provider_for``."""
    if provider.num_groups_hyena != provider.hidden_size:
        raise UserError(f"{provider.num_groups_hyena} long filters for {provider.hidden_size} channels; need one each")
    if provider.num_groups_hyena_medium != provider.num_groups_hyena_short:
        raise UserError("different numbers of groups for short and medium filters are not supported")
    return Architecture(
        pattern=provider.hybrid_override_pattern,
        hidden_size=provider.hidden_size,
        ffn_hidden_size=provider.ffn_hidden_size,
        num_heads=provider.num_attention_heads,
        num_groups=provider.num_groups_hyena_medium,
        max_tokens=provider.seq_length,
        rotary_base=provider.rotary_base,
        position_scale=provider.seq_len_interpolation_factor,
        recompute_num_layers=provider.recompute_num_layers or 1,
        gelu_in_every_layer=not provider.remove_activation_post_first_layer,
        attention_output_bias=provider.add_attn_proj_bias,
        short_conv_bias=provider.use_short_conv_bias,
        tied_embeddings=provider.share_embeddings_and_output_weights,
        output_bias=provider.add_bias_output,
    )
