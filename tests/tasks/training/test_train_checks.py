# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.recipes.options import TrainingOptions
from evo2_megatron.runtime import megatron
from evo2_megatron.tasks.training import train_checks


def options(**given) -> TrainingOptions:
    return TrainingOptions(**{"mock_data": True, "model_size": "evo2_tiny", **given})


def tensor(size: int, sequence_parallel: bool | None = None) -> ParallelConfig:
    return ParallelConfig(tensor=size, sequence_parallel=sequence_parallel)


INF = float("inf")
WINDOWS = {"mock_data": False, "sharded_windows": True, "sequence_db_dir": Path("no/such")}
WRONG = [
    ({"mock_data": False}, "give one of --dataset-config, --mock-data and --sharded-eden-data"),
    ({"sharded_windows": True}, "give one of --dataset-config, --mock-data and --sharded-eden-data"),
    (WINDOWS, "--sharded-eden-data needs --train-window-db"),
    (WINDOWS | {"sequence_db_dir": None}, "--sharded-eden-data needs --sequence-db-dir"),
    (WINDOWS | {"train_window_db": Path("no.db")}, "--sharded-eden-data needs --val-window-db"),
    (WINDOWS | {"train_window_db": Path("no.db"), "eval_iters": 0}, "no/such has no sequence database"),
    (WINDOWS | {"eod_pad_in_loss_mask": True}, "--eod-pad-in-loss-mask is about packed documents"),
    ({"reverse_complement": True}, "--rc-aug goes with --sharded-eden-data"),
    ({"stride": 3}, "--stride goes with --sharded-eden-data"),
    ({"dataset_dir": Path("/")}, "--dataset-dir goes with"),
    ({"mock_data": False, "dataset_config": Path("no/such.yaml")}, "cannot read no/such.yaml"),
    ({"tokenizer": Path("no/such/folder")}, "no/such/folder"),
    ({"model_size": "evo3"}, "Unknown model size 'evo3'"),
    ({"workers": -1}, "--workers is -1"),
    ({"hidden_dropout": 1.5}, "--hidden-dropout is 1.5; it must be from 0 to below 1"),
    ({"hidden_dropout": 1.0}, "--hidden-dropout is 1.0; it must be from 0 to below 1"),
    ({"attention_dropout": 1.0}, "--attention-dropout is 1.0; it must be from 0 to below 1"),
    ({"adam_beta1": 1.0}, "--adam-beta1 is 1.0; it must be from 0 to below 1"),
    ({"adam_beta2": 1.0}, "--adam-beta2 is 1.0; it must be from 0 to below 1"),
    ({"seed": 0}, "--seed is 0; it must be from 1 to 4294967295"),
    ({"seed": -1}, "--seed is -1; it must be from 1 to 4294967295"),
    ({"seed": 2**32}, "--seed is 4294967296; it must be from 1 to 4294967295"),
    ({"seed": 2**32 - 1, "parallel": ParallelConfig(pipeline=2)}, "--seed is .* it must be from 1 to 4294967195"),
    ({"dataset_seed": -1}, "--dataset-seed is -1; it must be from 0 to 4294967295"),
    ({"dataset_seed": 2**32}, "--dataset-seed is 4294967296; it must be from 0 to"),
    ({"rotary_base": 10**25}, "--rotary-base is 1.*; it must be from 1 to 9223372036854775807"),
    ({"lr": INF}, "--lr is inf; it must be 0 or more, and at most 1e.30"),
    ({"lr": 1e39}, "--lr is 1e.39; it must be 0 or more, and at most 1e.30"),
    ({"min_lr": INF}, "--min-lr is inf; it must be 0 or more, and at most 1e.30"),
    ({"wd": INF}, "--wd is inf; it must be 0 or more, and at most 1e.30"),
    ({"clip_grad": INF}, "--clip-grad is inf; it must be 0 or more, and at most 1e.30"),
    ({"adam_eps": INF}, "--adam-eps is inf; it must be above 0, and at most 1e.30"),
    ({"peak_tflops": INF}, "--peak-tflops is inf; it must be above 0, and at most 1e.30"),
    (
        {"seq_len_interpolation_factor": INF},
        "--seq-len-interpolation-factor is inf; it must be above 0, and",
    ),
    (
        {"eval_iters": 10**8},
        "--eval-iters 100000000 x 8 samples are 800000000 in each evaluation, .*; lower",
    ),
    ({"eval_iters": 10**5, "eval_interval": 1}, "100001 evaluations of 800000 samples are more than checkpoints"),
    ({"eval_iters": -1}, "--eval-iters is -1"),
    ({"lr": float("nan")}, "--lr is nan; it must be 0 or more, and at most 1e.30"),
    ({"lr": 1e-5}, "--lr 1e-05 is below --min-lr 3e-05"),
    ({"adam_eps": 0.0}, "--adam-eps is 0.0"),
    ({"most_recent_k": 0}, "--most-recent-k is 0"),
    ({"seq_len_interpolation_factor": 0.0}, "--seq-len-interpolation-factor is 0.0"),
    ({"max_steps": 2**28, "global_batch_size": 8}, "more than checkpoints can count"),
    ({"parallel": tensor(2)}, "1 processes do not fit tensor 2"),
    ({"global_batch_size": 8, "micro_batch_size": 3}, "--global-batch-size 8 is not a multiple"),
    ({"seq_length": 8193}, "position range of evo2_tiny, 8192 tokens; .* --seq-len-interpolation-factor 2 or more"),
    ({"seq_length": 8193, "model_size": "evo2_7b", "seq_len_interpolation_factor": 1.0}, "position range of evo2_7b"),
    ({"seq_length": 2**20 + 1, "model_size": "evo2_7b"}, "1048576 tokens; .* 129 or more"),
    ({"ckpt_format": "zarr"}, "zarr can no longer be read or written; use torch_dist"),
    ({"average_in_collective": True}, "--no-calculate-per-token-loss"),
    ({"warmup_steps": 20, "max_steps": 10}, "--warmup-steps 20"),
    ({"tp_comm_overlap_backend": "gloo"}, "--tp-comm-overlap-backend goes with"),
    ({"tp_comm_overlap": True}, "needs tensor and sequence parallelism"),
    ({"nsys_start_step": 5, "nsys_end_step": 4}, "--nsys-end-step 4 is not after the start, 5"),
    (
        {"nsys_profiling": True, "nsys_start_step": 4, "nsys_end_step": 4},
        "--nsys-end-step 4 is not after the start, 4",
    ),
    ({"torch_profiling": True, "nsys_start_step": 9, "max_steps": 9}, "--nsys-start-step 9: the run ends with step 9"),
    ({"torch_profiling": True, "nsys_ranks": [0, 1]}, "--nsys-ranks 1: there are 1 processes"),
    ({"torch_profiling": True, "nsys_profiling": True}, "watch the same steps"),
    ({"wandb_entity": "me"}, "go with --wandb-project"),
    ({"wandb_offline": True}, "go with --wandb-project"),
    ({"peak_tflops": 0.0}, "--peak-tflops is 0.0"),
    ({"torch_profiling": True, "tensorboard": False}, "--torch-profiling writes into TensorBoard's folder"),
    ({"wandb_project": "p", "tensorboard": False}, "leave --disable-tensorboard-logger out"),
    ({"nvidia_fault_tolerance": True}, "needs a start with ft_launcher"),
]


@pytest.mark.parametrize("given, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong_options(given, message):
    with pytest.raises(UserError, match=message) as caught:
        train_checks.check(options(**given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "world_size, given, message",
    [
        (4, {"parallel": tensor(2), "seq_length": 63}, "--seq-length 63 cannot be split .* use 62 or 64"),
        (2, {"parallel": ParallelConfig(context=2), "seq_length": 66}, "multiple of 4, and 516 or more; use 516"),
        (3, {"parallel": tensor(2)}, "start a multiple of 2, with --devices or torchrun"),
        (8, {"global_batch_size": 12, "micro_batch_size": 1}, "use 8 or a multiple"),
    ],
)
def test_wrong_layouts(world_size, given, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with pytest.raises(UserError, match=message):
        train_checks.check(options(**given))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"seq_length": 8193, "seq_len_interpolation_factor": 1.01},
        {"seq_length": 2**20, "model_size": "evo2_7b"},
        {"average_in_collective": True, "calculate_per_token_loss": False},
        {"max_steps": 1},
        {"most_recent_k": -1, "eval_iters": 0},
        {"seed": 1, "dataset_seed": 0, "rotary_base": 2**63 - 1},
        {"seed": 2**32 - 1, "dataset_seed": 2**32 - 1},
    ],
    ids=str,
)
def test_right_options(given):
    train_checks.check(options(**given))


@pytest.mark.parametrize(
    "given, flag",
    [
        ({"parallel": tensor(1, sequence_parallel=True)}, "--sequence-parallel"),
        ({"recompute": "none", "recompute_num_layers": 2}, "--activation-checkpoint-recompute-num-layers"),
        ({"recompute": "selective", "recompute_num_layers": 2}, "--activation-checkpoint-recompute-num-layers"),
    ],
)
def test_what_the_former_recipe_ignored_is_taken(given, flag, caplog):
    train_checks.check(options(**given))
    assert [record.getMessage().split(" has no effect")[0] for record in caplog.records] == [flag]


def test_unknown_name_on_the_hub(monkeypatch):
    import transformers

    def fail(name):
        raise OSError(f"{name} is not a local folder\nand much more")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(
        UserError, match="owner/name is not a local folder; give a folder with --hf-tokenizer"
    ) as caught:
        train_checks.check(options(tokenizer="owner/name"))
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(megatron, "on_cuda", lambda: False)
    monkeypatch.setattr(megatron, "have_transformer_engine", lambda: False)


@pytest.fixture
def gpu_without_packages(monkeypatch):
    monkeypatch.setattr(megatron, "on_cuda", lambda: True)
    monkeypatch.setattr(megatron, "have_transformer_engine", lambda: False)
    monkeypatch.setattr(train_checks.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"precision": "bf16_with_fp8_current_scaling_mixed"}, "use --mixed-precision-recipe bf16_mixed"),
        ({"precision": "bf16_with_nvfp4_mixed"}, "use --mixed-precision-recipe bf16_mixed"),
        ({"nsys_profiling": True}, "--nsys-profiling"),
        ({"tp_comm_overlap": True}, "needs a GPU and Transformer Engine"),
        ({"use_precision_aware_optimizer": True, "bf16_main_grads": True}, "--bf16-main-grads needs"),
    ],
)
def test_what_a_machine_without_gpu_cannot_do(given, message, no_gpu):
    with pytest.raises(UserError, match=message):
        train_checks.fit_to_machine(options(**given))


def test_what_a_machine_without_gpu_can_do_without(no_gpu, caplog):
    asked = options(use_subquadratic_ops=True, use_precision_aware_optimizer=True)
    with caplog.at_level(logging.WARNING):
        assert train_checks.fit_to_machine(asked) == options()
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == [
        "--use-precision-aware-optimizer",
        "--use-subquadratic-ops",
    ]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"precision": "bf16_with_fp8_current_scaling_mixed"}, "needs Transformer Engine"),
    ],
)
def test_what_a_gpu_without_packages_cannot_do(given, message, gpu_without_packages):
    with pytest.raises(UserError, match=message):
        train_checks.fit_to_machine(options(**given))


@pytest.mark.parametrize(
    "name, capability, fits",
    [
        ("bf16_with_fp8_current_scaling_mixed", (8, 0), False),
        ("bf16_with_fp8_current_scaling_mixed", (8, 9), True),
        ("bf16_with_fp8_subchannel_scaling_mixed", (8, 9), False),
        ("nanov2_bf16_with_fp8_current_scaling_mixed", (9, 0), True),
        ("bf16_with_mxfp8_mixed", (9, 0), False),
        ("bf16_with_nvfp4_mixed", (10, 0), True),
    ],
)
def test_8_bit_recipes_need_their_hardware(name, capability, fits, monkeypatch):
    import torch

    monkeypatch.setattr(megatron, "on_cuda", lambda: True)
    monkeypatch.setattr(megatron, "have_transformer_engine", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if fits:
        train_checks.fit_to_machine(options(precision=name))
    else:
        with pytest.raises(UserError, match=r"needs a GPU of compute capability .* use --mixed-precision-recipe bf16"):
            train_checks.fit_to_machine(options(precision=name))


@pytest.mark.parametrize("step, begins", [(0, 4), (4, 4), (5, 5), (6, 4)])
def test_nsys_profiles_the_steps_that_a_resumed_run_has_ahead(megatron, step, begins):
    from evo2_megatron.tasks.training import train

    config = SimpleNamespace(profiling=SimpleNamespace(profile_step_start=4))
    asked = options(nsys_profiling=True, nsys_start_step=4, nsys_end_step=6)
    assert train._profile(config, asked, train.Start(None, None, step, resumes=step > 0)) is None
    assert config.profiling.profile_step_start == begins
