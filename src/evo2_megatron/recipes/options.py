# SPDX-License-Identifier: Apache-2.0
"""What a user may choose about a training run, and the defaults. Importing this loads neither torch nor Megatron."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from evo2_megatron.config import ParallelConfig, UserError, WeightFormat
from evo2_megatron.data import tokenizer
from evo2_megatron.runtime import megatron

DEFAULT_RAMP_STEPS = 2500
"""Default length of the warm-up, and of the tail at the lowest learning rate."""

LARGEST_NUMBER = 1e30
"""Of rates and the like: float32 ends at 3e38, and what is computed from them must fit, too."""

LORA_TARGETS = ["dense_projection", "dense", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
"""All linear layers of the stack."""


def default_workers() -> int:
    """Loader processes per dataset: with a GPU 8, at most one per core.

    Without one, none: a sample takes less time to make than to fetch from another process, and the cores are busy.
    """
    return min(8, os.cpu_count() or 1) if megatron.on_cuda() else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOptions:
    """What a user may choose about a training run. The defaults are the recipe; one field per flag of train_evo2."""

    # data: one of the first three
    dataset_config: Path | None = None  # YAML file of a blend
    mock_data: bool = False
    sharded_windows: bool = False  # SQLite databases, with the next seven
    sequence_db_dir: Path | None = None
    train_window_db: Path | None = None
    valid_window_db: Path | None = None
    test_window_db: Path | None = None
    stride: int | None = None  # bases; None, here and below: that of the databases
    window_min_length: int | None = None  # bases
    reverse_complement: bool = False  # of half of the training windows
    former_windows: bool = False  # EOS after every window, as the former loader did
    dataset_dir: Path | None = None  # folder of the blend's relative paths; None: current
    seq_length: int = 8192  # tokens
    seed: int = 1234
    dataset_seed: int | None = None  # None: seed
    workers: int = field(default_factory=default_workers)  # loader processes per dataset
    eod_pad_in_loss_mask: bool = False
    tokenizer: str | Path = field(default_factory=tokenizer.tokenizer_dir)

    # model: None keeps what the model size says
    model_size: str = "evo2_1b_base"
    num_layers: int | None = None
    hybrid_override_pattern: str | None = None
    ffn_hidden_size: int | None = None
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    add_bias_output: bool = False
    rotary_base: int | None = None
    seq_len_interpolation_factor: float | None = None
    # Megatron Core 0.16 casts the residual to the branch's type in every layer, so True would only convert twice
    fp32_residual_connection: bool = False
    spike_no_more_embedding_init: bool = False
    use_subquadratic_ops: bool = False
    quantize_weights: WeightFormat = "none"  # of linear layers, which are not trained then
    cross_entropy_loss_fusion: bool = False
    renormalize_loss: bool = True
    lowercase_loss_weight: float = 0.1
    loss_normalization: Literal["sequence", "micro_batch"] = "sequence"
    calculate_per_token_loss: bool = True

    # layout, batch and duration
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batch_size: int = 1  # samples
    global_batch_size: int = 8  # samples
    max_steps: int = 100_000
    early_stop_on_step: int | None = None
    eval_interval: int = 100  # steps; checkpoints too
    eval_iters: int = 32  # batches
    gc_interval: int = 0  # steps; 0: Python decides
    garbage_collect_at_inference: bool = False
    enable_preemption: bool = False
    debug_ddp_parity_freq: int = 0  # steps; 0: never
    check_for_nan_in_grad: bool = True
    nvidia_fault_tolerance: bool = False

    # optimizer and learning rate
    lr: float = 3e-4
    min_lr: float = 3e-5
    wd: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    warmup_steps: int | None = None  # None, here and below: see schedule
    constant_steps: int | None = None
    decay_steps: int | None = None
    use_precision_aware_optimizer: bool = False
    bf16_main_grads: bool = False
    log_num_zeros_in_grad: bool = False
    weight_decay_embeddings: bool = True

    # precision; None: bf16_mixed on a GPU, fp32 without one
    precision: str | None = None
    fp8_wgrad: bool = True
    fp8_param_gather: bool | None = None  # None: the precision recipe's
    grad_reduce_in_fp32: bool = False  # bfloat16 recipes do so anyway

    # communication
    overlap_param_gather: bool = False
    overlap_grad_reduce: bool = False
    align_param_gather: bool = False
    average_in_collective: bool = False
    tp_comm_overlap: bool = False
    tp_comm_overlap_backend: str | None = None  # None: nccl

    # activation recompute
    recompute: Literal["full", "selective", "none"] = "full"
    recompute_num_layers: int | None = None  # None: the model size's

    # checkpoints
    result_dir: Path = Path("results")
    experiment_name: str = "evo2"
    finetune_ckpt_dir: Path | None = None
    ckpt_async_save: bool = False
    ckpt_format: str = "torch_dist"
    most_recent_k: int = 5  # -1: all
    optim_full_reshardable: bool = False

    # LoRA; the lists hold patterns (see model.lora.matches)
    lora_finetune: bool = False
    lora_dim: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    lora_target_modules: list[str] = field(default_factory=LORA_TARGETS.copy)
    lora_skip_freeze_modules: list[str] = field(default_factory=list)

    # logging and profiling
    log_interval: int = 10  # steps
    tensorboard: bool = True
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_run_name: str | None = None  # None: made from the settings
    wandb_offline: bool = False
    peak_tflops: float | None = None  # None: known GPUs' by their names
    debug: bool = False
    log_straggler: bool = False
    torch_profiling: bool = False
    nsys_profiling: bool = False
    nsys_start_step: int = 0
    nsys_end_step: int | None = None  # None: see profiled_steps
    nsys_ranks: list[int] = field(default_factory=lambda: [0])

    @property
    def run_dir(self) -> Path:
        """Absolute folder of everything that the run writes."""
        return (self.result_dir / self.experiment_name).absolute()

    @property
    def profiled_steps(self) -> tuple[int, int]:
        """Steps done when a profile begins and when it ends; without an end, two steps."""
        start, end = self.nsys_start_step, self.nsys_end_step
        return start, start + 2 if end is None else end

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the run's checkpoints; a run resumes from what is there."""
        return self.run_dir / "checkpoints"


def precision_recipe(options: TrainingOptions) -> str:
    """The precision recipe asked for, or else the one that suits this machine."""
    return options.precision or ("bf16_mixed" if megatron.on_cuda() else "fp32")


class Schedule(NamedTuple):
    """Learning rate over the steps: linear from 0 to ``lr``, cosine to ``min_lr``, then constant."""

    warmup_end: int
    """Step at which the learning rate is highest."""

    decay_end: int
    """Step from which on it stays at its lowest."""


def schedule(options: TrainingOptions) -> Schedule:
    """The learning-rate schedule, with defaults that fit any number of steps.

    By default the tail lasts 2500 steps, but at most a quarter of ``max_steps``; and the warm-up 2500, but at most a
    third of the steps before the tail. Either is 2500 from 10,000 steps on. ``decay_steps`` counts from step 0, so
    that it includes the warm-up; without it the decay ends where the tail begins.

    Raises:
        UserError: What was asked for leaves no step to decay in.
    """
    steps = options.max_steps
    constant = options.constant_steps
    if constant is None:
        constant = min(DEFAULT_RAMP_STEPS, steps // 4)
    decay_end = options.decay_steps or steps - constant
    warmup_end = options.warmup_steps
    if warmup_end is None:
        warmup_end = min(DEFAULT_RAMP_STEPS, min(steps, decay_end) // 3)
    if not 0 <= warmup_end < decay_end:
        tail = f"--decay-steps {decay_end}"
        if options.decay_steps is None:
            tail = f"--max-steps {steps} less --constant-steps {constant}"
        raise UserError(f"--warmup-steps {warmup_end} must be between 0 and the end of the decay, {tail}; lower it")
    return Schedule(warmup_end, decay_end)
