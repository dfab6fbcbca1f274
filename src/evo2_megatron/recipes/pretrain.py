# SPDX-License-Identifier: Apache-2.0
"""From a user's options to Megatron Bridge's configuration of a training run.

Megatron Bridge can be imported only after ``runtime.megatron.enter_training``: do that before importing this module.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training import comm_overlap
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DatasetProvider,
    DistributedDataParallelConfig,
    DistributedInitConfig,
    FaultToleranceConfig,
    LoggerConfig,
    OptimizerConfig,
    ProfilingConfig,
    RerunStateMachineConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
)
from megatron.bridge.training.mixed_precision import MixedPrecisionConfig

from evo2_megatron.config import uses_fp8
from evo2_megatron.data.providers import Evo2DatasetProvider, MockEvo2DatasetProvider, ShardedWindowsProvider
from evo2_megatron.model.lora import Evo2LoRA
from evo2_megatron.model.param_groups import HyenaWeightDecay
from evo2_megatron.model.provider import StripedHyenaProvider, provider_for
from evo2_megatron.recipes.options import TrainingOptions, precision_recipe, schedule
from evo2_megatron.runtime import megatron
from evo2_megatron.runtime.precision import precision_settings


def pretrain_config(options: TrainingOptions) -> ConfigContainer:
    """The configuration of a training run for Megatron Bridge's ``pretrain``; enter training first.

    Raises:
        UserError: Options that contradict each other.
    """
    ddp = _ddp(options)
    return ConfigContainer(
        rng=RNGConfig(seed=options.seed),
        rerun_state_machine=RerunStateMachineConfig(check_for_nan_in_loss=not _may_overflow(options)),
        train=_train(options),
        model=_model(options),
        optimizer=_optimizer(options),
        optimizer_config_override_provider=HyenaWeightDecay(embeddings=options.weight_decay_embeddings),
        ddp=ddp,
        scheduler=_scheduler(options),
        dataset=_dataset(options),
        logger=_logger(options),
        tokenizer=TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=_absolute(options.tokenizer)),
        checkpoint=_checkpoint(options),
        dist=DistributedInitConfig(distributed_backend="nccl" if megatron.on_cuda() else "gloo"),
        ft=FaultToleranceConfig(enable_ft_package=True, calc_ft_timeouts=True)
        if options.nvidia_fault_tolerance
        else None,
        profiling=_profiling(options),
        comm_overlap=_comm_overlap(options, ddp),
        mixed_precision=_mixed_precision(options),
        peft=_lora(options),
    )


def override(config: Any, **values: Any) -> None:
    """Set fields that exist; a name Megatron does not know is a typo, not a new setting."""
    unknown = values.keys() - {f.name for f in fields(config)}
    if unknown:
        raise AttributeError(f"{type(config).__name__} has no field {', '.join(sorted(unknown))}")
    for name, value in values.items():
        setattr(config, name, value)


def _absolute(path: Path | str | None) -> str | None:
    """A path that stays right wherever run_config.yaml is read; names on the hub, which are no paths, as they are."""
    return str(path.absolute()) if isinstance(path, Path) else path


def _model(options: TrainingOptions) -> StripedHyenaProvider:
    layout = options.parallel
    values: dict[str, Any] = {
        "num_layers": options.num_layers,
        "hybrid_override_pattern": options.hybrid_override_pattern,
        "ffn_hidden_size": options.ffn_hidden_size,
        "rotary_base": options.rotary_base,
        "seq_len_interpolation_factor": options.seq_len_interpolation_factor,
        "recompute_num_layers": options.recompute_num_layers,
    }
    if options.hybrid_override_pattern and options.num_layers is None:
        values["num_layers"] = len(options.hybrid_override_pattern)
    values = {name: value for name, value in values.items() if value is not None}
    if options.recompute != "full":
        granularity = "selective" if options.recompute == "selective" else None
        values |= {"recompute_granularity": granularity, "recompute_method": None, "recompute_num_layers": None}
    if options.spike_no_more_embedding_init:
        # Takase et al., "Spike No More" (arXiv 2312.16903)
        values |= {"share_embeddings_and_output_weights": False, "embedding_init_method_std": 1.0}
    return provider_for(
        options.model_size,
        seq_length=options.seq_length,
        hidden_dropout=options.hidden_dropout,
        attention_dropout=options.attention_dropout,
        add_bias_output=options.add_bias_output,
        fp32_residual_connection=options.fp32_residual_connection,
        use_subquadratic_ops=options.use_subquadratic_ops,
        quantize_weights=options.quantize_weights,
        cross_entropy_loss_fusion=options.cross_entropy_loss_fusion,
        to_upper="normalized_weighted" if options.renormalize_loss else "weighted",
        lowercase_loss_weight=options.lowercase_loss_weight,
        loss_normalization=options.loss_normalization,
        calculate_per_token_loss=options.calculate_per_token_loss,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.splits_activations,
        **values,
    )


def _train(options: TrainingOptions) -> TrainingConfig:
    return TrainingConfig(
        micro_batch_size=options.micro_batch_size,
        global_batch_size=options.global_batch_size,
        train_iters=options.max_steps,
        # ends the process at multiples of this, of which a run that has not yet come so far meets the first
        exit_interval=options.early_stop_on_step,
        eval_interval=options.eval_interval,
        eval_iters=options.eval_iters,
        exit_signal_handler=options.enable_preemption,
        manual_gc=options.gc_interval > 0 or options.garbage_collect_at_inference,
        manual_gc_interval=options.gc_interval,
        manual_gc_eval=options.garbage_collect_at_inference,
        check_weight_hash_across_dp_replicas_interval=options.debug_ddp_parity_freq or None,
    )


def _optimizer(options: TrainingOptions) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.wd,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        use_distributed_optimizer=True,
        use_precision_aware_optimizer=options.use_precision_aware_optimizer,
        main_grads_dtype=torch.bfloat16 if options.bf16_main_grads else torch.float32,
        log_num_zeros_in_grad=options.log_num_zeros_in_grad,
    )


def _ddp(options: TrainingOptions) -> DistributedDataParallelConfig:
    # 4- and 8-bit block formats keep gathered weights and gradients in one buffer, which needs both overlaps
    overlap = any(name in precision_recipe(options) for name in ("mxfp8", "nvfp4"))
    return DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=options.check_for_nan_in_grad and not _may_overflow(options),
        average_in_collective=options.average_in_collective,
        overlap_param_gather=options.overlap_param_gather or overlap,
        overlap_grad_reduce=options.overlap_grad_reduce or overlap,
        align_param_gather=options.align_param_gather,
    )


def _may_overflow(options: TrainingOptions) -> bool:
    """How the loss scaler of 16-bit floats learns its scale is by overflows."""
    return precision_recipe(options).startswith("fp16")


def _scheduler(options: TrainingOptions) -> SchedulerConfig:
    steps = schedule(options)
    return SchedulerConfig(
        lr_decay_style="cosine",
        lr_warmup_iters=steps.warmup_end,
        lr_decay_iters=steps.decay_end,
        start_weight_decay=options.wd,
        end_weight_decay=options.wd,
        weight_decay_incr_style="constant",
        # a resumed run follows the flags it is given, not those it was started with
        override_opt_param_scheduler=True,
    )


def _dataset(options: TrainingOptions) -> DatasetProvider:
    common = {
        "seq_length": options.seq_length,
        "random_seed": options.seed if options.dataset_seed is None else options.dataset_seed,
        "num_workers": options.workers,
        "pin_memory": megatron.on_cuda(),
    }
    if options.mock_data:
        return MockEvo2DatasetProvider(**common)
    if options.sharded_windows:
        return ShardedWindowsProvider(
            sequence_db_dir=_absolute(options.sequence_db_dir),
            train_window_db=_absolute(options.train_window_db),
            valid_window_db=_absolute(options.valid_window_db),
            test_window_db=_absolute(options.test_window_db),
            stride=options.stride,
            min_length=options.window_min_length,
            reverse_complement=options.reverse_complement,
            former_layout=options.former_windows,
            **common,
        )
    return Evo2DatasetProvider(
        dataset_config_path=_absolute(options.dataset_config),
        dataset_dir=_absolute(options.dataset_dir),
        eod_mask_loss=options.eod_pad_in_loss_mask,
        # not beside the data, which may be read-only
        index_cache_dir=str(options.run_dir / "data_index"),
        **common,
    )


def _logger(options: TrainingOptions) -> LoggerConfig:
    return LoggerConfig(
        log_interval=options.log_interval,
        logging_level=logging.DEBUG if options.debug else logging.WARNING,
        filter_warnings=False,
        tensorboard_dir=str(options.run_dir / "tb_logs") if options.tensorboard else None,
        wandb_project=options.wandb_project,
        wandb_entity=options.wandb_entity,
        wandb_exp_name=options.wandb_run_name or _wandb_name(options),
        wandb_save_dir=str(options.run_dir),  # wandb makes its folder in it
        # everything that was decided, before the first checkpoint has it; not named like a checkpoint's own
        save_config_filepath=str(options.run_dir / "config.yaml"),
        log_params_norm=options.quantize_weights == "none",  # Megatron takes no norm of integers
        log_throughput=True,
        log_throughput_to_tensorboard=True,
        log_progress=True,
        log_timers_to_tensorboard=True,
        log_validation_ppl_to_tensorboard=True,
        log_memory_to_tensorboard=True,
        # the gradient's norm per parameter would wait for the GPU once per parameter and step
        log_l2_norm_grad_to_tensorboard=False,
        log_runtime_to_tensorboard=True,
        log_world_size_to_tensorboard=True,
    )


def _wandb_name(options: TrainingOptions) -> str:
    """A name that tells runs apart by their settings; its keys are those of the former recipe, but for an idle TVL."""
    o, steps, layout = options, schedule(options), options.parallel
    constant = o.max_steps - steps.decay_end
    return (
        f"evo2-size-{o.model_size}-TP{layout.tensor}-PP{layout.pipeline}-CP{layout.context}"
        f"-GBS{o.global_batch_size}-MBS{o.micro_batch_size}-SkipLossRenorm{not o.renormalize_loss}"
        f"-NOAC{o.recompute == 'none'}-SELAC{o.recompute == 'selective'}-ACRNL{o.recompute_num_layers}"
        f"-PAT{o.hybrid_override_pattern}-F32R{o.fp32_residual_connection}-FCE{o.cross_entropy_loss_fusion}"
        f"-AIC{o.average_in_collective}-PTL{o.calculate_per_token_loss}-PEOD{o.eod_pad_in_loss_mask}"
        f"-BO{o.add_bias_output}-GCLP{o.clip_grad}-HDO{o.hidden_dropout}-ADO{o.attention_dropout}"
        f"-LR{o.lr}-MINLR{o.min_lr}-WUSTEPS{steps.warmup_end}-CONSTSTEPS{constant}-WD{o.wd}"
        f"-GRFP32{o.grad_reduce_in_fp32}-B1{o.adam_beta1}-B2{o.adam_beta2}-EPS{o.adam_eps}"
        f"-PAO{o.use_precision_aware_optimizer}-B16MG{o.bf16_main_grads}-EWD{o.weight_decay_embeddings}"
        f"-SNI{o.spike_no_more_embedding_init}-OGR{o.overlap_grad_reduce}-OPG{o.overlap_param_gather}"
        f"-MPR{precision_recipe(o)}"
    )


def _checkpoint(options: TrainingOptions) -> CheckpointConfig:
    return CheckpointConfig(
        save=str(options.checkpoint_dir),
        load=str(options.checkpoint_dir),
        save_interval=options.eval_interval,
        most_recent_k=options.most_recent_k,
        async_save=options.ckpt_async_save,
        ckpt_format=options.ckpt_format,
        fully_parallel_save=True,
        fully_parallel_load=True,
        # a name missing from the checkpoint is logged, as Transformer Engine's states are where that was not there;
        # tasks.training.same_run has compared the weights by then
        dist_ckpt_strictness="log_unexpected",
        dist_ckpt_optim_fully_reshardable=options.optim_full_reshardable,
    )


def _profiling(options: TrainingOptions) -> ProfilingConfig:
    """Nsight Systems alone: see ``tasks.training.torch_profile`` about PyTorch's profiler."""
    start, end = options.profiled_steps
    return ProfilingConfig(
        use_nsys_profiler=options.nsys_profiling,
        profile_step_start=start,
        profile_step_end=end,
        profile_ranks=options.nsys_ranks,
        record_shapes=options.nsys_profiling,
        nvtx_ranges=options.nsys_profiling,
    )


def _comm_overlap(options: TrainingOptions, ddp: DistributedDataParallelConfig) -> Any:
    if not options.tp_comm_overlap:
        return None
    fp8 = uses_fp8(precision_recipe(options))
    return comm_overlap.CommOverlapConfig(
        tp_comm_overlap=True,
        tp_comm_overlap_cfg=comm_overlap.userbuffers_fp8_h100_h8192_tp4_mbs1_seqlen8192
        if fp8
        else comm_overlap.userbuffers_bf16_h100_h8192_tp4_mbs1_seqlen8192,
        tp_comm_bootstrap_backend=options.tp_comm_overlap_backend or "nccl",
        # unless given, Bridge would turn the first two on wherever there is data parallelism
        overlap_grad_reduce=ddp.overlap_grad_reduce,
        overlap_param_gather=ddp.overlap_param_gather,
        overlap_param_gather_with_optimizer_step=False,
        align_param_gather=ddp.align_param_gather,
    )


def _lora(options: TrainingOptions) -> Evo2LoRA | None:
    if not options.lora_finetune:
        return None
    return Evo2LoRA(
        target_modules=options.lora_target_modules,
        skip_freeze_modules=options.lora_skip_freeze_modules,
        dim=options.lora_dim,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
    )


def _mixed_precision(options: TrainingOptions) -> MixedPrecisionConfig:
    precision = precision_settings(precision_recipe(options))
    override(precision, fp8_wgrad=precision.fp8_wgrad and options.fp8_wgrad)
    if options.fp8_param_gather is not None:
        override(precision, fp8_param_gather=options.fp8_param_gather)
    if not precision.fp8_param_gather:  # there is nothing then to share the gradients' memory
        override(precision, reuse_grad_buf_for_mxfp8_param_ag=False)
    if options.grad_reduce_in_fp32:
        override(precision, grad_reduce_in_fp32=True)
    return precision
