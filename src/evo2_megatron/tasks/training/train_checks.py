# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a training run's options: found before weights are made or data is read."""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import replace
from pathlib import Path

from evo2_megatron import layouts
from evo2_megatron.architectures import architecture
from evo2_megatron.config import UserError, uses_fp8
from evo2_megatron.data import blend, tokenizer, window_database
from evo2_megatron.recipes.options import LARGEST_NUMBER, TrainingOptions, schedule
from evo2_megatron.runtime import megatron
from evo2_megatron.runtime.distributed import world_size

logger = logging.getLogger(__name__)

_COUNTER_LIMIT = 2**31  # Megatron Bridge 0.3.1 stores its sample counters as int32
_LARGEST_SEED = 2**32 - 1  # of NumPy
_LARGEST_ROTARY_BASE = 2**63 - 1  # of torch's integers
# an index of all of a run's validation samples is made before its first step: so many are a slip of the keyboard
_MOST_SAMPLES_PER_EVALUATION = 2**24


def check(options: TrainingOptions) -> None:
    """Raise UserError for the first thing that cannot work, whatever the machine."""
    _check_ranges(options)
    _check_layout(options)
    _check_combinations(options)
    schedule(options)
    _check_tokenizer(options.tokenizer)
    if options.dataset_config is not None:
        needed = blend.SPLITS if options.eval_iters else ("train",)
        blend.read_blends(options.dataset_config, dataset_dir=options.dataset_dir, required=needed)
    if options.sharded_windows:
        _check_window_databases(options)


def fit_to_machine(options: TrainingOptions) -> TrainingOptions:
    """Leave out, with a warning, what this machine cannot do and what does not change the results.

    Raises:
        UserError: The machine lacks something that does change them, or that is plainly asked for.
    """
    _check_precision(options)
    with_te = megatron.have_transformer_engine()
    if options.nsys_profiling and not megatron.on_cuda():
        raise UserError("--nsys-profiling profiles CUDA, and there is no GPU here; leave it out")
    if options.tp_comm_overlap and not with_te:
        raise UserError("--use-megatron-comm-overlap-llama3-8k needs a GPU and Transformer Engine; leave it out")
    if options.bf16_main_grads and not (options.use_precision_aware_optimizer and with_te):
        raise UserError("--bf16-main-grads needs --use-precision-aware-optimizer and Transformer Engine; leave it out")
    if options.use_precision_aware_optimizer and not with_te:
        logger.warning(
            "--use-precision-aware-optimizer saves memory with Transformer Engine, which is not here: going on without"
        )
        options = replace(options, use_precision_aware_optimizer=False)
    if options.use_subquadratic_ops and not megatron.on_cuda():
        logger.warning("--use-subquadratic-ops are CUDA kernels, and there is no GPU here: going on without them")
        options = replace(options, use_subquadratic_ops=False)
    return options


def _check_tokenizer(name: str | Path) -> None:
    if isinstance(name, Path):
        tokenizer.read_vocab_size(name)
        return
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--hf-tokenizer-model-name {name}: {reason}; give a folder with --hf-tokenizer-model-path instead"
        ) from None


def _check_ranges(options: TrainingOptions) -> None:
    smallest = {
        "--workers": (options.workers, 0),
        "--eval-iters": (options.eval_iters, 0),
        "--gc-interval": (options.gc_interval, 0),
        "--debug-ddp-parity-freq": (options.debug_ddp_parity_freq, 0),
        "--log-interval": (options.log_interval, 1),
        "--most-recent-k": (options.most_recent_k, -1),
        "--lr": (options.lr, 0),
        "--min-lr": (options.min_lr, 0),
        "--wd": (options.wd, 0),
        "--clip-grad": (options.clip_grad, 0),
        "--warmup-steps": (options.warmup_steps, 0),
        "--constant-steps": (options.constant_steps, 0),
        "--nsys-start-step": (options.nsys_start_step, 0),
        "--stride": (options.stride, 1),
        "--window-min-length-threshold": (options.window_min_length, 0),
    }
    for flag, (value, low) in smallest.items():
        if value is not None and not low <= value <= LARGEST_NUMBER:
            raise UserError(f"{flag} is {value}; it must be {low} or more, and at most {LARGEST_NUMBER:g}")
    above_zero = {
        "--peak-tflops": options.peak_tflops,
        "--adam-eps": options.adam_eps,
        "--seq-len-interpolation-factor": options.seq_len_interpolation_factor,
    }
    for flag, value in above_zero.items():
        if value is not None and not 0 < value <= LARGEST_NUMBER:
            raise UserError(f"{flag} is {value}; it must be above 0, and at most {LARGEST_NUMBER:g}")
    below_one = {
        "--hidden-dropout": options.hidden_dropout,
        "--attention-dropout": options.attention_dropout,
        "--adam-beta1": options.adam_beta1,
        "--adam-beta2": options.adam_beta2,
    }
    for flag, value in below_one.items():
        if not 0 <= value < 1:
            raise UserError(f"{flag} is {value}; it must be from 0 to below 1")
    between = {
        # Megatron adds 100 for each pipeline stage after the first
        "--seed": (options.seed, 1, _LARGEST_SEED - 100 * (options.parallel.pipeline - 1)),
        "--dataset-seed": (options.dataset_seed, 0, _LARGEST_SEED),
        "--rotary-base": (options.rotary_base, 1, _LARGEST_ROTARY_BASE),
    }
    for flag, (value, low, high) in between.items():
        if value is not None and not low <= value <= high:
            raise UserError(f"{flag} is {value}; it must be from {low} to {high}")
    if options.lr < options.min_lr:
        raise UserError(f"--lr {options.lr} is below --min-lr {options.min_lr}; lower --min-lr too")
    if options.most_recent_k == 0:
        raise UserError("--most-recent-k is 0; keep 1 checkpoint or more, or -1 for all")
    _check_counts(options)


def _check_counts(options: TrainingOptions) -> None:
    if options.max_steps * options.global_batch_size >= _COUNTER_LIMIT:
        raise UserError(
            f"{options.max_steps} steps of {options.global_batch_size} samples are more than checkpoints can count "
            f"({_COUNTER_LIMIT - 1}); lower --max-steps"
        )
    at_once = options.eval_iters * options.global_batch_size
    if at_once > _MOST_SAMPLES_PER_EVALUATION:
        raise UserError(
            f"--eval-iters {options.eval_iters} x {options.global_batch_size} samples are {at_once} in each "
            f"evaluation, more than {_MOST_SAMPLES_PER_EVALUATION}; lower --eval-iters"
        )
    num_evaluations = options.max_steps // options.eval_interval + 1
    if num_evaluations * at_once >= _COUNTER_LIMIT:
        raise UserError(
            f"{num_evaluations} evaluations of {at_once} samples are more than checkpoints can count "
            f"({_COUNTER_LIMIT - 1}); lower --eval-iters, or raise --eval-interval"
        )


def _check_layout(options: TrainingOptions) -> None:
    layout = options.parallel
    layout.check_world_size(world_size())
    replicas = world_size() // layout.model_size
    per_pass = options.micro_batch_size * replicas
    if options.global_batch_size % per_pass:
        raise UserError(
            f"--global-batch-size {options.global_batch_size} is not a multiple of --micro-batch-size "
            f"{options.micro_batch_size} x {replicas} data-parallel processes; use {per_pass} or a multiple"
        )
    if layout.sequence_parallel and layout.tensor == 1:
        logger.warning("--sequence-parallel has no effect without --tensor-parallel-size above 1")
    layouts.check_sequence_length(options.seq_length, layout)
    _check_position_range(options)


def _check_position_range(options: TrainingOptions) -> None:
    model = architecture(options.model_size)
    most = model.position_range(options.seq_len_interpolation_factor)
    if options.seq_length > most:
        raise UserError(
            f"--seq-length {options.seq_length} is beyond the position range of {options.model_size}, {most} tokens; "
            "shorten it, or set --seq-len-interpolation-factor "
            f"{-(-options.seq_length // model.position_range(1.0))} or more"
        )


def _check_combinations(options: TrainingOptions) -> None:
    sources = (options.dataset_config is not None, options.mock_data, options.sharded_windows)
    if sum(sources) != 1:
        raise UserError("give one of --dataset-config, --mock-data and --sharded-eden-data")
    if options.dataset_dir is not None and options.dataset_config is None:
        raise UserError("--dataset-dir goes with --dataset-config")
    of_windows = {
        "--sequence-db-dir": options.sequence_db_dir,
        "--train-window-db": options.train_window_db,
        "--val-window-db": options.valid_window_db,
        "--test-window-db": options.test_window_db,
        "--stride": options.stride,
        "--window-min-length-threshold": options.window_min_length,
        "--rc-aug": options.reverse_complement or None,
        "--former-window-layout": options.former_windows or None,
    }
    for flag, value in of_windows.items():
        if value is not None and not options.sharded_windows:
            raise UserError(f"{flag} goes with --sharded-eden-data")
    if options.eod_pad_in_loss_mask and options.sharded_windows:
        raise UserError("--eod-pad-in-loss-mask is about packed documents; with --sharded-eden-data, leave it out")
    if options.ckpt_format != "torch_dist":
        raise UserError(f"--ckpt-format {options.ckpt_format} can no longer be read or written; use torch_dist")
    if options.average_in_collective and options.calculate_per_token_loss:
        raise UserError("--average-in-collective needs --no-calculate-per-token-loss, too; or leave it out")
    if options.recompute != "full" and options.recompute_num_layers is not None:
        logger.warning("--activation-checkpoint-recompute-num-layers has no effect without full recompute")
    if options.decay_steps is not None and options.constant_steps is not None:
        logger.warning(
            "--constant-steps has no effect beside --decay-steps: the decay ends on step %s", options.decay_steps
        )
    if options.tp_comm_overlap_backend is not None and not options.tp_comm_overlap:
        raise UserError("--tp-comm-overlap-backend goes with --use-megatron-comm-overlap-llama3-8k")
    if options.tp_comm_overlap and (options.parallel.tensor == 1 or options.parallel.sequence_parallel is False):
        raise UserError("--use-megatron-comm-overlap-llama3-8k needs tensor and sequence parallelism; leave it out")
    _check_profiling(options)
    _check_services(options)


def _check_window_databases(options: TrainingOptions) -> None:
    needed = {"--sequence-db-dir": options.sequence_db_dir, "--train-window-db": options.train_window_db}
    if options.eval_iters:
        needed |= {"--val-window-db": options.valid_window_db, "--test-window-db": options.test_window_db}
    for flag, path in needed.items():
        if path is None:
            raise UserError(f"--sharded-eden-data needs {flag}")
    window_database.SequenceDatabases(options.sequence_db_dir)
    for flag, path in needed.items():
        if flag == "--sequence-db-dir":
            continue
        plan = window_database.open_windows(path, stride=options.stride, min_length=options.window_min_length).plan
        if plan.window_size != options.seq_length:
            raise UserError(
                f"{flag} {path} has windows of {plan.window_size} bases, but --seq-length is {options.seq_length}; "
                "make them equal"
            )


def _check_profiling(options: TrainingOptions) -> None:
    if options.torch_profiling and not options.tensorboard:
        raise UserError("--torch-profiling writes into TensorBoard's folder; leave --disable-tensorboard-logger out")
    if options.torch_profiling and options.nsys_profiling:
        raise UserError("--torch-profiling and --nsys-profiling watch the same steps; leave one of the two out")
    start, end = options.profiled_steps
    if end <= start:
        raise UserError(f"--nsys-end-step {end} is not after the start, {start}; raise it")
    if not options.torch_profiling and not options.nsys_profiling:
        if start or options.nsys_end_step is not None or options.nsys_ranks != [0]:
            logger.warning(
                "--nsys-start-step, --nsys-end-step and --nsys-ranks have no effect without --nsys-profiling"
            )
        return
    last = min(options.max_steps, options.early_stop_on_step or options.max_steps)
    if start >= last:
        raise UserError(f"--nsys-start-step {start}: the run ends with step {last}; lower it")
    unknown = [rank for rank in options.nsys_ranks if not 0 <= rank < world_size()]
    if unknown:
        raise UserError(f"--nsys-ranks {unknown[0]}: there are {world_size()} processes, counted from 0")


def _check_services(options: TrainingOptions) -> None:
    if options.wandb_project is None and (options.wandb_entity or options.wandb_run_name or options.wandb_offline):
        raise UserError("--wandb-entity, --wandb-run-name and --wandb-offline go with --wandb-project")
    if options.wandb_project is not None and not options.tensorboard:
        raise UserError("Weights & Biases gets what TensorBoard gets; leave --disable-tensorboard-logger out")
    if options.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb-project needs the package wandb: pip install wandb; or leave the flag out")
    if options.nvidia_fault_tolerance and "FT_RANK_MONITOR_IPC_SOCKET" not in os.environ:
        raise UserError("--nvidia-fault-tolerance needs a start with ft_launcher instead of torchrun; or leave it out")


def _check_precision(options: TrainingOptions) -> None:
    name = options.precision
    if name is None or not uses_fp8(name):
        return
    advice = "use --mixed-precision-recipe bf16_mixed"
    if not megatron.on_cuda():
        raise UserError(f"{name} needs a GPU with 8-bit arithmetic, and there is no GPU here; {advice}")
    if not megatron.have_transformer_engine():
        raise UserError(f"{name} needs Transformer Engine, which is not installed; {advice}")
    import torch

    capability = torch.cuda.get_device_capability()
    # Ada has 8-bit matrix products, Hopper block-wise ones, Blackwell those with one scale per 16 or 32 numbers
    needed = (8, 9)
    if "subchannel" in name or "nanov2" in name:
        needed = (9, 0)
    elif "mxfp8" in name or "nvfp4" in name:
        needed = (10, 0)
    if capability < needed:
        have, want = (".".join(map(str, version)) for version in (capability, needed))
        raise UserError(f"{name} needs a GPU of compute capability {want}, and this one has {have}; {advice}")
