# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from evo2_megatron.cli import train
from evo2_megatron.recipes.options import LORA_TARGETS
from evo2_megatron.recipes.published import training_options


@pytest.fixture
def config_of(megatron):
    """From a command line to the configuration, as the command makes it on a machine that can do everything."""

    def build(*argv: str) -> Any:
        from evo2_megatron.recipes.pretrain import pretrain_config

        source = [] if {"--dataset-config", "--sharded-eden-data"} & {*argv} else ["--mock-data"]
        args = train.build_parser().parse_args([*source, "--model-size", "evo2_tiny", *argv])
        given = {name: value for name, value in train._options(args).items() if value is not None}
        return pretrain_config(training_options(args.recipe, given))

    return build


def get(config: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), config)


WINDOWS = "--sharded-eden-data --sequence-db-dir /d --train-window-db /t.db --val-window-db /v.db"
LANDS = [
    ("--dataset-config blend.yaml", "dataset.dataset_config_path", str(Path("blend.yaml").absolute())),
    ("--dataset-config blend.yaml --dataset-dir data", "dataset.dataset_dir", str(Path("data").absolute())),
    ("--dataset-config blend.yaml --eod-pad-in-loss-mask", "dataset.eod_mask_loss", True),
    (WINDOWS, "dataset.sequence_db_dir", "/d"),
    (WINDOWS, "dataset.train_window_db", "/t.db"),
    (WINDOWS, "dataset.valid_window_db", "/v.db"),
    (f"{WINDOWS} --test-window-db /e.db", "dataset.test_window_db", "/e.db"),
    (f"{WINDOWS} --stride 7992", "dataset.stride", 7992),
    (f"{WINDOWS} --window-min-length-threshold 9", "dataset.min_length", 9),
    (f"{WINDOWS} --rc-aug", "dataset.reverse_complement", True),
    (f"{WINDOWS} --former-window-layout", "dataset.former_layout", True),
    ("--seq-length 64", "dataset.seq_length", 64),
    ("--seq-length 64", "model.seq_length", 64),
    ("--seed 7", "rng.seed", 7),
    ("--seed 7", "dataset.random_seed", 7),
    ("--seed 7 --dataset-seed 0", "dataset.random_seed", 0),
    ("--workers 3", "dataset.num_workers", 3),
    ("--hf-tokenizer-model-path some/folder", "tokenizer.tokenizer_model", str(Path("some/folder").absolute())),
    ("--hf-tokenizer-model-name owner/name", "tokenizer.tokenizer_model", "owner/name"),
    ("--model-size striped_hyena_tiny_nv", "model.use_short_conv_bias", True),
    ("--hybrid-override-pattern SDH*SD", "model.num_layers", 6),
    ("--num-layers 6 --hybrid-override-pattern SDH*SD", "model.hybrid_override_pattern", "SDH*SD"),
    ("--ffn-hidden-size 96", "model.ffn_hidden_size", 96),
    ("--hidden-dropout 0.1", "model.hidden_dropout", 0.1),
    ("--attention-dropout 0.2", "model.attention_dropout", 0.2),
    ("--add-bias-output", "model.add_bias_output", True),
    ("--rotary-base 777", "model.rotary_base", 777),
    ("--recipe evo2_7b_32k", "model.rotary_base", 1_000_000),
    ("--recipe evo2_7b_32k", "model.seq_len_interpolation_factor", 4.0),
    ("--recipe evo2_7b_32k --rotary-base 10000", "model.rotary_base", 10_000),
    ("--recipe evo2_40b_base", "optimizer.weight_decay", 0.1),
    ("--seq-len-interpolation-factor 2.5", "model.seq_len_interpolation_factor", 2.5),
    ("--no-fp32-residual-connection", "model.fp32_residual_connection", False),
    ("--spike-no-more-embedding-init", "model.share_embeddings_and_output_weights", False),
    ("--spike-no-more-embedding-init", "model.embedding_init_method_std", 1.0),
    ("--use-subquadratic-ops", "model.use_subquadratic_ops", True),
    ("--cross-entropy-loss-fusion", "model.cross_entropy_loss_fusion", True),
    ("--lowercase-loss-weight 0.5", "model.lowercase_loss_weight", 0.5),
    ("--no-renormalize-loss", "model.to_upper", "weighted"),
    ("--renormalize-loss-over micro-batch", "model.loss_normalization", "micro_batch"),
    ("--no-calculate-per-token-loss", "model.calculate_per_token_loss", False),
    ("--tensor-model-parallel-size 2", "model.tensor_model_parallel_size", 2),
    ("--tensor-model-parallel-size 2", "model.sequence_parallel", True),
    ("--tensor-model-parallel-size 2 --no-sequence-parallel", "model.sequence_parallel", False),
    ("--pipeline-model-parallel-size 2", "model.pipeline_model_parallel_size", 2),
    ("--context-parallel-size 2", "model.context_parallel_size", 2),
    ("--micro-batch-size 3", "train.micro_batch_size", 3),
    ("--global-batch-size 6", "train.global_batch_size", 6),
    ("--max-steps 9", "train.train_iters", 9),
    ("--early-stop-on-step 5", "train.exit_interval", 5),
    ("--early-stop-on-step 5", "train.train_iters", 100_000),
    ("--eval-interval 4", "train.eval_interval", 4),
    ("--eval-interval 4", "checkpoint.save_interval", 4),
    ("--eval-iters 2", "train.eval_iters", 2),
    ("--gc-interval 5", "train.manual_gc_interval", 5),
    ("--gc-interval 5", "train.manual_gc", True),
    ("--garbage-collect-at-inference", "train.manual_gc_eval", True),
    ("--enable-preemption", "train.exit_signal_handler", True),
    ("--debug-ddp-parity-freq 10", "train.check_weight_hash_across_dp_replicas_interval", 10),
    ("--no-check-for-nan-in-grad", "ddp.check_for_nan_in_grad", False),
    ("--mixed-precision-recipe fp16_mixed", "ddp.check_for_nan_in_grad", False),
    ("--mixed-precision-recipe fp16_mixed", "rerun_state_machine.check_for_nan_in_loss", False),
    ("--nvidia-fault-tolerance", "ft.enable_ft_package", True),
    ("--lr 0.5", "optimizer.lr", 0.5),
    ("--min-lr 0.25", "optimizer.min_lr", 0.25),
    ("--wd 0.125", "optimizer.weight_decay", 0.125),
    ("--wd 0.125", "scheduler.end_weight_decay", 0.125),
    ("--adam-beta1 0.5", "optimizer.adam_beta1", 0.5),
    ("--adam-beta2 0.75", "optimizer.adam_beta2", 0.75),
    ("--adam-eps 0.5", "optimizer.adam_eps", 0.5),
    ("--clip-grad 2.0", "optimizer.clip_grad", 2.0),
    ("--warmup-steps 6", "scheduler.lr_warmup_iters", 6),
    ("--max-steps 100 --constant-steps 7", "scheduler.lr_decay_iters", 93),
    ("--decay-steps 90", "scheduler.lr_decay_iters", 90),
    ("--use-precision-aware-optimizer", "optimizer.use_precision_aware_optimizer", True),
    ("--log-num-zeros-in-grad", "optimizer.log_num_zeros_in_grad", True),
    ("--no-weight-decay-embeddings", "optimizer_config_override_provider.embeddings", False),
    ("--mixed-precision-recipe fp32", "mixed_precision.fp32", True),
    ("--mixed-precision-recipe bf16-mixed", "mixed_precision.bf16", True),
    ("--mixed-precision-recipe bf16_with_fp8_current_scaling_mixed", "mixed_precision.fp8", "hybrid"),
    ("--mixed-precision-recipe bf16_with_mxfp8_mixed", "ddp.overlap_param_gather", True),
    ("--mixed-precision-recipe bf16_with_nvfp4_mixed", "ddp.overlap_grad_reduce", True),
    (
        "--mixed-precision-recipe bf16_with_fp8_current_scaling_mixed --no-fp8-wgrad",
        "mixed_precision.fp8_wgrad",
        False,
    ),
    (
        "--mixed-precision-recipe bf16_with_fp8_current_scaling_mixed --no-fp8-param-gather",
        "mixed_precision.fp8_param_gather",
        False,
    ),
    ("--mixed-precision-recipe fp16_mixed --grad-reduce-in-fp32", "mixed_precision.grad_reduce_in_fp32", True),
    ("--overlap-param-gather", "ddp.overlap_param_gather", True),
    ("--overlap-grad-reduce", "ddp.overlap_grad_reduce", True),
    ("--align-param-gather", "ddp.align_param_gather", True),
    ("--average-in-collective", "ddp.average_in_collective", True),
    ("--use-megatron-comm-overlap-llama3-8k", "comm_overlap.tp_comm_overlap", True),
    (
        "--use-megatron-comm-overlap-llama3-8k --tp-comm-overlap-backend gloo",
        "comm_overlap.tp_comm_bootstrap_backend",
        "gloo",
    ),
    ("--no-activation-checkpointing", "model.recompute_granularity", None),
    ("--selective-activation-checkpointing", "model.recompute_granularity", "selective"),
    ("--activation-checkpoint-recompute-num-layers 3", "model.recompute_num_layers", 3),
    (
        "--no-activation-checkpointing --activation-checkpoint-recompute-num-layers 3",
        "model.recompute_num_layers",
        None,
    ),
    ("--result-dir /r --experiment-name e", "checkpoint.save", "/r/e/checkpoints"),
    ("--result-dir /r --experiment-name e", "checkpoint.load", "/r/e/checkpoints"),
    ("--result-dir /r --experiment-name e", "logger.tensorboard_dir", "/r/e/tb_logs"),
    ("--ckpt-async-save", "checkpoint.async_save", True),
    ("--ckpt-format torch_dist", "checkpoint.ckpt_format", "torch_dist"),
    ("--most-recent-k 2", "checkpoint.most_recent_k", 2),
    ("--optim-full-reshardable", "checkpoint.dist_ckpt_optim_fully_reshardable", True),
    ("", "peft", None),
    ("--lora-finetune", "peft.dim", 16),
    ("--lora-finetune", "peft.target_modules", LORA_TARGETS),
    ("--lora-finetune --lora-dim 4", "peft.dim", 4),
    ("--lora-finetune --lora-alpha 8", "peft.alpha", 8),
    ("--lora-finetune --lora-dropout 0.25", "peft.dropout", 0.25),
    ("--lora-finetune --lora-target-modules dense,*.linear_fc1", "peft.target_modules", ["dense", "*.linear_fc1"]),
    ("--lora-finetune --lora-skip-freeze-modules final_norm", "peft.skip_freeze_modules", ["final_norm"]),
    ("--lora-finetune --quantize-weights int4", "model.quantize_weights", "int4"),
    ("--lora-finetune --quantize-weights int8", "logger.log_params_norm", False),
    ("--log-interval 3", "logger.log_interval", 3),
    ("--log-interval 0", "logger.log_interval", 10),
    ("--disable-tensorboard-logger", "logger.tensorboard_dir", None),
    ("--wandb-project p", "logger.wandb_project", "p"),
    ("--wandb-project p --wandb-entity e", "logger.wandb_entity", "e"),
    ("--wandb-project p --wandb-run-name n", "logger.wandb_exp_name", "n"),
    ("--wandb-project p --result-dir /r --experiment-name e", "logger.wandb_save_dir", "/r/e"),
    ("--torch-profiling", "profiling.use_nsys_profiler", False),
    ("--nsys-profiling", "profiling.nvtx_ranges", True),
    ("--debug", "logger.logging_level", 10),
    ("--nsys-profiling", "profiling.use_nsys_profiler", True),
    ("--nsys-profiling --nsys-start-step 3", "profiling.profile_step_start", 3),
    ("--nsys-profiling --nsys-start-step 3", "profiling.profile_step_end", 5),
    ("--nsys-profiling --nsys-end-step 9", "profiling.profile_step_end", 9),
    ("--nsys-profiling --nsys-ranks 0 5", "profiling.profile_ranks", [0, 5]),
]


@pytest.mark.parametrize("argv, path, expected", LANDS, ids=[f"{argv} -> {path}" for argv, path, _ in LANDS])
def test_flags_land_in_the_configuration(config_of, argv, path, expected):
    assert get(config_of(*argv.split()), path) == expected


def test_every_flag_is_in_the_table():
    # finetune-ckpt-dir acts on the weights, see test_train.py; bf16-main-grads is below; see test_train_logs.py
    # --devices: see tests/tasks/test_launch.py
    elsewhere = {"--wandb-offline", "--peak-tflops", "--log-straggler", "--devices"} | {
        "--help",
        "--mock-data",
        "--sequence-parallel",
        "--finetune-ckpt-dir",
        "--bf16-main-grads",
    }
    tested = {word for argv, _, _ in LANDS for word in argv.split() if word.startswith("--")} | elsewhere
    untested = [
        action.option_strings
        for action in train.build_parser()._actions
        if action.dest != "unavailable" and not tested & set(action.option_strings)
    ]
    assert untested == []


def test_bf16_main_grads(config_of):
    import torch

    assert config_of("--bf16-main-grads").optimizer.main_grads_dtype is torch.bfloat16


def test_defaults(config_of):
    config = config_of()
    assert config.ddp.use_distributed_optimizer and config.optimizer.use_distributed_optimizer
    assert config.model.recompute_granularity == "full" and config.model.recompute_method == "uniform"
    assert config.model.vocab_size is None  # the tokenizer's
    assert config.checkpoint.load == str(Path("results/evo2/checkpoints").absolute())
    assert Path(config.tokenizer.tokenizer_model).name == "nucleotide_fast_tokenizer_256"
    assert config.scheduler.lr_decay_style == "cosine" and config.scheduler.override_opt_param_scheduler


def test_precision_follows_the_machine(config_of, monkeypatch):
    from evo2_megatron.runtime import megatron

    monkeypatch.setattr(megatron, "on_cuda", lambda: False)
    config = config_of()
    assert config.mixed_precision.fp32 and not config.mixed_precision.bf16
    assert config.dist.distributed_backend == "gloo"
    monkeypatch.setattr(megatron, "on_cuda", lambda: True)
    config = config_of()
    assert config.mixed_precision.bf16
    assert config.dist.distributed_backend == "nccl"


@pytest.mark.parametrize("argv", ["", "--use-megatron-comm-overlap-llama3-8k", "--no-fp8-param-gather"])
def test_block_formats_overlap_communication_whatever_else_is_set(config_of, argv):
    """As Bridge sets up a configuration before it trains."""
    config = config_of("--mixed-precision-recipe", "bf16_with_mxfp8_mixed", *argv.split())
    config.mixed_precision.finalize()
    config.mixed_precision.setup(config.model, config.optimizer, config.ddp)
    if config.comm_overlap is not None:
        config.comm_overlap.data_parallel_size = 2
        config.comm_overlap.finalize()
        config.comm_overlap.setup(config.model, config.optimizer, config.ddp)
    config.ddp.finalize()
    assert config.ddp.overlap_grad_reduce and config.ddp.overlap_param_gather
    assert (
        config.ddp.fp8_param_gather
        == config.ddp.reuse_grad_buf_for_mxfp8_param_ag
        == ("--no-fp8-param-gather" not in argv)
    )


def test_unknown_field_of_megatron_is_an_error(megatron):
    from megatron.bridge.training.config import RNGConfig

    from evo2_megatron.recipes.pretrain import override

    with pytest.raises(AttributeError, match="RNGConfig has no field sead"):
        override(RNGConfig(), sead=3)


def test_wandb_run_name_tells_the_settings(config_of):
    name = config_of("--wandb-project", "p", "--max-steps", "100", "--lr", "0.5").logger.wandb_exp_name
    assert name.startswith("evo2-size-evo2_tiny-TP1-PP1-CP1-GBS8-MBS1-SkipLossRenormFalse-NOACFalse")
    assert "-LR0.5-MINLR3e-05-WUSTEPS25-CONSTSTEPS25-WD0.01-" in name


def test_configuration_survives_its_yaml_file(config_of, tmp_path):
    import yaml

    config_of("--no-weight-decay-embeddings").to_yaml(str(tmp_path / "run_config.yaml"))
    stored = yaml.safe_load((tmp_path / "run_config.yaml").read_text())
    assert stored["model"]["_target_"] == "evo2_megatron.model.provider.StripedHyenaProvider"
    assert stored["optimizer_config_override_provider"] == {
        "_target_": "evo2_megatron.model.param_groups.HyenaWeightDecay",
        "embeddings": False,
    }
    assert stored["dataset"]["_target_"] == "evo2_megatron.data.providers.MockEvo2DatasetProvider"
