# SPDX-License-Identifier: Apache-2.0
"""Train or fine-tune an Evo 2 model. Running the same command again continues where the run stopped."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evo2_megatron.cli import command, groups, launch_groups, model_groups, training_groups
from evo2_megatron.config import UserError

PROG = "train_evo2"

_FASTA = "training does not read FASTA; make .bin/.idx files with preprocess_evo2 and use --dataset-config"
_UNAVAILABLE = {
    "--fasta-data": _FASTA,
    "--fasta-file": _FASTA,
    "--use-targeted-variance-loss": "no such loss is known here, and the former recipe ignored the flag; leave it out",
    "--optim-fmt-pre-mcore-014": "Megatron Core 0.16 no longer writes that format; leave the flag out",
}
"""Flags of older versions that this one cannot honour: accepting them silently would train something else."""


def build_parser() -> argparse.ArgumentParser:
    """All flags. None stands for "not given": the defaults that the help names belong to the recipe."""
    parser = command.Parser(PROG, __doc__)
    _add_data(parser)
    training_groups.add_windows(parser)
    _add_model(parser)
    groups.add_parallel(parser)
    launch_groups.add_devices(parser)
    _add_duration(parser)
    _add_optimizer(parser)
    _add_precision(parser)
    _add_communication(parser)
    groups.add_recompute(parser)
    _add_checkpoint(parser)
    model_groups.add_quantize_weights(training_groups.add_lora(parser), default="none")
    _add_logging(parser)
    _add_unavailable(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``train_evo2``."""
    command.run(PROG, _main, argv)


def _main(argv: Sequence[str] | None) -> None:
    args = build_parser().parse_args(argv)
    command.set_up_logging(debug=bool(args.debug))
    for flag in args.unavailable or ():
        raise UserError(f"{flag}: {_UNAVAILABLE[flag]}")
    if launch_groups.on_devices(args.devices, argv, ended_by=(signal.SIGTERM,) if args.enable_preemption else ()):
        return

    from evo2_megatron.tasks.training.train import train  # torch loads here, so --help stays instant

    given = {name: value for name, value in _options(args).items() if value is not None}
    train(args.recipe, **given)


_COUNT = groups.positive_int
_METAVAR = {_COUNT: "N", int: "N", float: "X", Path: "DIR", str: "NAME"}


def _value(group: argparse._ActionsContainer, flag: str, kind: Callable[[str], Any], meaning: str) -> None:
    group.add_argument(flag, type=kind, metavar=_METAVAR[kind], help=meaning)


def _switch(group: argparse._ActionsContainer, flag: str, meaning: str) -> None:
    group.add_argument(flag, action="store_true", default=None, help=meaning)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "-d",
        "--dataset-config",
        type=Path,
        metavar="YAML",
        help="blend of .bin/.idx datasets; this or one of the next two must be given (default: none)",
    )
    _switch(source, "--mock-data", "made-up sequences, to try things out")
    _switch(source, "--sharded-eden-data", "windows of contigs in SQLite databases")
    source.add_argument("--fasta-data", **_UNAVAILABLE_ACTION)
    _value(group, "--dataset-dir", Path, "folder of the blend's relative paths (default: current)")
    _value(group, "--seq-length", _COUNT, "tokens per sample (default: 8192)")
    _value(group, "--seed", int, "of weights and dropout (default: 1234)")
    _value(group, "--dataset-seed", int, "of the sample order (default: that of --seed)")
    _value(
        group, "--workers", int, "loader processes per dataset (default: 8, at most one per CPU core; without a GPU 0)"
    )
    _switch(group, "--eod-pad-in-loss-mask", "do not score the first base after an end of document")
    tokenizer = group.add_mutually_exclusive_group()
    _value(tokenizer, "--hf-tokenizer-model-path", Path, "tokenizer (default: the checkpoint's; else 256 entries)")
    _value(tokenizer, "--hf-tokenizer-model-name", str, "tokenizer on the Hugging Face hub (default: none)")


def _data_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "dataset_config": args.dataset_config,
        "mock_data": args.mock_data,
        "dataset_dir": args.dataset_dir,
        "seq_length": args.seq_length,
        "seed": args.seed,
        "dataset_seed": args.dataset_seed,
        "workers": args.workers,
        "eod_pad_in_loss_mask": args.eod_pad_in_loss_mask,
        "tokenizer": args.hf_tokenizer_model_path or args.hf_tokenizer_model_name,
    }


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    groups.add_sizes(group)
    _value(group, "--hidden-dropout", float, "(default: 0.0)")
    _value(group, "--attention-dropout", float, "(default: 0.0)")
    _switch(group, "--add-bias-output", "a bias in the output layer, 0 at the start")
    _switch(group, "--no-fp32-residual-connection", "keep the residual stream in the precision of the weights")
    _switch(group, "--spike-no-more-embedding-init", "embeddings from N(0, 1), not shared with the output layer")
    groups.add_kernels(group)
    _switch(group, "--cross-entropy-loss-fusion", "one fused kernel for the loss")
    _value(group, "--lowercase-loss-weight", float, "of repeat-masked bases; 0: do not learn them (default: 0.1)")
    _switch(group, "--no-renormalize-loss", "do not rescale the loss to make up for down-weighted lower case")
    group.add_argument(
        "--renormalize-loss-over",
        choices=("sequence", "micro-batch"),
        help="what that rescaling balances: each sequence, whatever the parallel layout, or what one process has of a "
        "micro-batch, as the former recipe did (default: sequence)",
    )
    _switch(group, "--no-calculate-per-token-loss", "average over micro-batches instead of tokens")


def _model_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        **groups.sizes(args),
        "hidden_dropout": args.hidden_dropout,
        "attention_dropout": args.attention_dropout,
        "add_bias_output": args.add_bias_output,
        "fp32_residual_connection": _off(args.no_fp32_residual_connection),
        "spike_no_more_embedding_init": args.spike_no_more_embedding_init,
        "use_subquadratic_ops": groups.use_subquadratic_ops(args),
        "cross_entropy_loss_fusion": args.cross_entropy_loss_fusion,
        "lowercase_loss_weight": args.lowercase_loss_weight,
        "renormalize_loss": _off(args.no_renormalize_loss),
        "loss_normalization": args.renormalize_loss_over and args.renormalize_loss_over.replace("-", "_"),
        "calculate_per_token_loss": _off(args.no_calculate_per_token_loss),
    }


def _add_duration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("batch and duration")
    groups.add_batch(group)
    _value(group, "--max-steps", _COUNT, "length of the training (default: 100000)")
    _value(
        group, "--early-stop-on-step", _COUNT, "save and end here, on the schedule of --max-steps (default: do not)"
    )
    _value(group, "--eval-interval", _COUNT, "steps between evaluations and checkpoints (default: 100)")
    _value(group, "--eval-iters", int, "batches per evaluation; 0: none (default: 32)")
    _value(group, "--gc-interval", int, "collect garbage in step every N steps; 0: freely (default: 0)")
    _switch(group, "--garbage-collect-at-inference", "collect garbage in step around evaluations")
    _switch(group, "--enable-preemption", "on SIGTERM, save a checkpoint and end")
    _value(group, "--debug-ddp-parity-freq", int, "compare the replicas' weights every N steps; 0: never (default: 0)")
    _switch(group, "--no-check-for-nan-in-grad", "do not stop at a gradient that is not a number")
    _switch(group, "--nvidia-fault-tolerance", "report to NVIDIA's ft_launcher, which must have started this")


def _duration_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        **groups.batch(args),
        "max_steps": args.max_steps,
        "early_stop_on_step": args.early_stop_on_step,
        "eval_interval": args.eval_interval,
        "eval_iters": args.eval_iters,
        "gc_interval": args.gc_interval,
        "garbage_collect_at_inference": args.garbage_collect_at_inference,
        "enable_preemption": args.enable_preemption,
        "debug_ddp_parity_freq": args.debug_ddp_parity_freq,
        "check_for_nan_in_grad": _off(args.no_check_for_nan_in_grad),
        "nvidia_fault_tolerance": args.nvidia_fault_tolerance,
    }


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer and learning rate")
    _value(group, "--lr", float, "peak learning rate (default: 0.0003)")
    _value(group, "--min-lr", float, "final learning rate (default: 3e-05)")
    _value(group, "--wd", float, "weight decay (default: 0.01)")
    _value(group, "--adam-beta1", float, "(default: 0.9)")
    _value(group, "--adam-beta2", float, "(default: 0.95)")
    _value(group, "--adam-eps", float, "(default: 1e-08)")
    _value(group, "--clip-grad", float, "largest gradient norm (default: 1.0)")
    _value(group, "--warmup-steps", int, "linear rise (default: 2500, at most a third of what precedes the tail)")
    _value(group, "--constant-steps", int, "tail at --min-lr (default: 2500, at most a quarter of --max-steps)")
    _value(group, "--decay-steps", _COUNT, "end of the decay, from step 0 (default: --max-steps less the tail)")
    _switch(group, "--use-precision-aware-optimizer", "Transformer Engine's Adam, with main weights in less memory")
    _switch(group, "--bf16-main-grads", "main gradients in bfloat16; needs --use-precision-aware-optimizer")
    _switch(group, "--log-num-zeros-in-grad", "count the zeros in the gradient")
    _switch(group, "--no-weight-decay-embeddings", "no weight decay on the embeddings")


def _optimizer_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "lr": args.lr,
        "min_lr": args.min_lr,
        "wd": args.wd,
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "adam_eps": args.adam_eps,
        "clip_grad": args.clip_grad,
        "warmup_steps": args.warmup_steps,
        "constant_steps": args.constant_steps,
        "decay_steps": args.decay_steps,
        "use_precision_aware_optimizer": args.use_precision_aware_optimizer,
        "bf16_main_grads": args.bf16_main_grads,
        "log_num_zeros_in_grad": args.log_num_zeros_in_grad,
        "weight_decay_embeddings": _off(args.no_weight_decay_embeddings),
    }


def _add_precision(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("precision")
    groups.add_precision(group)
    _switch(group, "--no-fp8-wgrad", "weight gradients not in FP8")
    _switch(group, "--no-fp8-param-gather", "gather weights not in FP8")
    _switch(group, "--grad-reduce-in-fp32", "sum gradients between processes in float32, with fp16 recipes too")


def _precision_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "precision": groups.precision(args),
        "fp8_wgrad": _off(args.no_fp8_wgrad),
        "fp8_param_gather": _off(args.no_fp8_param_gather),
        "grad_reduce_in_fp32": args.grad_reduce_in_fp32,
    }


def _add_communication(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("communication")
    _switch(group, "--overlap-param-gather", "gather weights during the forward pass")
    _switch(group, "--overlap-grad-reduce", "reduce gradients during the backward pass")
    _switch(group, "--align-param-gather", "all pipeline stages gather weights at the same time")
    _switch(group, "--average-in-collective", "average gradients while reducing; needs --no-calculate-per-token-loss")
    _switch(group, "--use-megatron-comm-overlap-llama3-8k", "overlap tensor-parallel communication and computation")
    group.add_argument(
        "--tp-comm-overlap-backend",
        choices=("nccl", "mpi", "gloo"),
        help="used to set up the previous flag's overlap (default: nccl)",
    )


def _communication_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "overlap_param_gather": args.overlap_param_gather,
        "overlap_grad_reduce": args.overlap_grad_reduce,
        "align_param_gather": args.align_param_gather,
        "average_in_collective": args.average_in_collective,
        "tp_comm_overlap": args.use_megatron_comm_overlap_llama3_8k,
        "tp_comm_overlap_backend": args.tp_comm_overlap_backend,
    }


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints")
    _value(group, "--result-dir", Path, "(default: ./results)")
    _value(group, "--experiment-name", str, "subfolder of --result-dir (default: evo2)")
    _value(
        group,
        "--finetune-ckpt-dir",
        Path,
        "start from these weights: iter_* folder or its parent (default: random ones)",
    )
    _switch(group, "--ckpt-async-save", "write checkpoints in the background")
    group.add_argument("--ckpt-format", choices=("torch_dist", "zarr"), help="(default: torch_dist)")
    _value(group, "--most-recent-k", int, "checkpoints to keep; -1: all (default: 5)")
    _switch(group, "--optim-full-reshardable", "optimizer state that also loads in another parallel layout")


def _checkpoint_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "result_dir": args.result_dir,
        "experiment_name": args.experiment_name,
        "finetune_ckpt_dir": args.finetune_ckpt_dir,
        "ckpt_async_save": args.ckpt_async_save,
        "ckpt_format": args.ckpt_format,
        "most_recent_k": args.most_recent_k,
        "optim_full_reshardable": args.optim_full_reshardable,
    }


def _add_logging(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("logging and profiling")
    _value(group, "--log-interval", int, "steps between log lines (default: 10)")
    _switch(group, "--disable-tensorboard-logger", "write no TensorBoard files; Weights & Biases needs them")
    _value(group, "--wandb-project", str, "log to Weights & Biases (default: do not)")
    _value(group, "--wandb-entity", str, "owner of the project (default: you)")
    _value(group, "--wandb-run-name", str, "(default: made from the settings)")
    _switch(group, "--wandb-offline", "keep it in the run's folder, for wandb sync to send later")
    _value(group, "--peak-tflops", float, "of one device, for model FLOP utilisation (default: the GPU's data sheet)")
    _switch(group, "--debug", "show everything that Megatron prints and logs")
    _switch(group, "--log-straggler", "time each process's forward passes; the slowest go to stragglers.tsv")
    _switch(
        group, "--torch-profiling", "trace the steps to profile with PyTorch's profiler, for TensorBoard or Perfetto"
    )
    _switch(group, "--nsys-profiling", "mark the steps to profile for NVIDIA Nsight Systems")
    _value(group, "--nsys-start-step", int, "steps done before the first to profile (default: 0)")
    _value(group, "--nsys-end-step", int, "last step to profile (default: two after the start)")
    group.add_argument("--nsys-ranks", type=int, nargs="+", metavar="RANK", help="processes to profile (default: 0)")


def _logging_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "log_interval": args.log_interval or None,
        "tensorboard": _off(args.disable_tensorboard_logger),
        "wandb_project": args.wandb_project,
        "wandb_entity": args.wandb_entity,
        "wandb_run_name": args.wandb_run_name,
        "wandb_offline": args.wandb_offline,
        "peak_tflops": args.peak_tflops,
        "debug": args.debug,
        "log_straggler": args.log_straggler,
        "torch_profiling": args.torch_profiling,
        "nsys_profiling": args.nsys_profiling,
        "nsys_start_step": args.nsys_start_step,
        "nsys_end_step": args.nsys_end_step,
        "nsys_ranks": args.nsys_ranks,
    }


class _Collect(argparse.Action):
    """Keep the flag's name; its value, if it has one, does not matter."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Called by argparse for each occurrence."""
        namespace.unavailable = [*(namespace.unavailable or ()), option_string]


_UNAVAILABLE_ACTION = {
    "action": _Collect,
    "dest": "unavailable",
    "nargs": "?",
    "const": True,
    "help": argparse.SUPPRESS,
}


def _add_unavailable(parser: argparse.ArgumentParser) -> None:
    for flag in _UNAVAILABLE:
        if flag != "--fasta-data":  # this one is a choice of the data source
            parser.add_argument(flag, **_UNAVAILABLE_ACTION)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``tasks.training.train.train``; None where the user did not speak."""
    return {
        "parallel": groups.parallel(args),
        **_data_options(args),
        **training_groups.windows(args),
        **_model_options(args),
        **_duration_options(args),
        **_optimizer_options(args),
        **_precision_options(args),
        **_communication_options(args),
        **groups.recompute(args),
        **_checkpoint_options(args),
        **training_groups.lora(args),
        **_logging_options(args),
    }


def _off(given: bool | None) -> bool | None:
    """Value of an option that a ``--no-...`` flag turns off."""
    return False if given else None


if __name__ == "__main__":
    main()
