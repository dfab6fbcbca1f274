# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from evo2_megatron.cli import train
from evo2_megatron.recipes.options import TrainingOptions

QUICK_START = """
--hf-tokenizer-model-path tokenizers/nucleotide_fast_tokenizer_256
--model-size striped_hyena_1b_nv_parallel --max-steps 12 --eval-interval 10
--eval-iters 3 --mock-data
--micro-batch-size 16 --global-batch-size 32 --seq-length 1024
--tensor-model-parallel 1
--use-precision-aware-optimizer --dataset-seed 33
--seed 41 --spike-no-more-embedding-init
--no-weight-decay-embeddings --cross-entropy-loss-fusion
--align-param-gather --overlap-param-gather --grad-reduce-in-fp32
--decay-steps 100 --warmup-steps 10
--mixed-precision-recipe bf16_with_fp8_current_scaling_mixed
--no-fp32-residual-connection --activation-checkpoint-recompute-num-layers 1
--attention-dropout 0.001 --hidden-dropout 0.001
--eod-pad-in-loss-mask --enable-preemption
--log-interval 5 --debug-ddp-parity-freq 10
--result-dir tmpfp8 --no-renormalize-loss
--use-subquadratic-ops
"""
"""The command that users of the former recipe were given, as written."""


LORA = """
--hf-tokenizer-model-path tokenizers/nucleotide_fast_tokenizer_512
--model-size evo2_1b_base --max-steps 500 --eval-interval 100
--eval-iters 3 --mock-data
--micro-batch-size 4 --global-batch-size 8 --seq-length 1024
--mixed-precision-recipe bf16_mixed
--result-dir lora_run
--finetune-ckpt-dir base
--lora-finetune
--lora-dim 16
--lora-alpha 32
--lora-dropout 0.1
--lora-target-modules "dense_projection,linear_qkv,linear_proj,linear_fc1,linear_fc2"
"""
"""The same, for LoRA."""


FORMER_FLAGS = """
--dataset-config --mock-data --fasta-data --sharded-eden-data --fasta-file --sequence-db-dir --train-window-db
--val-window-db --test-window-db --stride --window-min-length-threshold --rc-aug --dataset-dir --seq-length --seed
--dataset-seed --workers --eod-pad-in-loss-mask --hf-tokenizer-model-path --hf-tokenizer-model-name --model-size
--num-layers --hybrid-override-pattern --ffn-hidden-size --hidden-dropout --attention-dropout --add-bias-output
--seq-len-interpolation-factor --no-fp32-residual-connection --spike-no-more-embedding-init
--use-targeted-variance-loss --use-subquadratic-ops --cross-entropy-loss-fusion --no-renormalize-loss
--no-calculate-per-token-loss --tensor-model-parallel-size --pipeline-model-parallel-size --context-parallel-size
--sequence-parallel --micro-batch-size --global-batch-size --max-steps --early-stop-on-step --eval-interval
--eval-iters --gc-interval --garbage-collect-at-inference --enable-preemption --debug-ddp-parity-freq
--no-check-for-nan-in-grad --debug --nvidia-fault-tolerance --lr --min-lr --wd --adam-beta1 --adam-beta2 --adam-eps
--clip-grad --use-precision-aware-optimizer --bf16-main-grads --log-num-zeros-in-grad --no-weight-decay-embeddings
--average-in-collective --optim-fmt-pre-mcore-014 --optim-full-reshardable --warmup-steps --constant-steps
--decay-steps --mixed-precision-recipe --no-fp8-wgrad --no-fp8-param-gather --grad-reduce-in-fp32
--overlap-param-gather --overlap-grad-reduce --align-param-gather --use-megatron-comm-overlap-llama3-8k
--tp-comm-overlap-backend --no-activation-checkpointing --selective-activation-checkpointing
--activation-checkpoint-recompute-num-layers --result-dir --experiment-name --finetune-ckpt-dir --ckpt-async-save
--ckpt-format --most-recent-k --log-interval --disable-tensorboard-logger --wandb-project --wandb-entity
--wandb-run-name --nsys-profiling --nsys-start-step --nsys-end-step --nsys-ranks --lora-finetune --lora-dim
--lora-alpha --lora-dropout --lora-target-modules --lora-skip-freeze-modules
"""
"""All that the former recipe's command takes, in the order of its documentation."""


def options_of(argv: list[str]) -> dict:
    """What the command passes on: only what the user said."""
    args = train.build_parser().parse_args(argv)
    return {name: value for name, value in train._options(args).items() if value is not None}


def test_quick_start_parses_as_written():
    options = options_of(shlex.split(QUICK_START))
    assert options.pop("parallel").tensor == 1
    assert options == {
        "tokenizer": Path("tokenizers/nucleotide_fast_tokenizer_256"),
        "model_size": "striped_hyena_1b_nv_parallel",
        "max_steps": 12,
        "eval_interval": 10,
        "eval_iters": 3,
        "mock_data": True,
        "micro_batch_size": 16,
        "global_batch_size": 32,
        "seq_length": 1024,
        "use_precision_aware_optimizer": True,
        "dataset_seed": 33,
        "seed": 41,
        "spike_no_more_embedding_init": True,
        "weight_decay_embeddings": False,
        "cross_entropy_loss_fusion": True,
        "align_param_gather": True,
        "overlap_param_gather": True,
        "grad_reduce_in_fp32": True,
        "decay_steps": 100,
        "warmup_steps": 10,
        "precision": "bf16_with_fp8_current_scaling_mixed",
        "fp32_residual_connection": False,
        "recompute_num_layers": 1,
        "attention_dropout": 0.001,
        "hidden_dropout": 0.001,
        "eod_pad_in_loss_mask": True,
        "enable_preemption": True,
        "log_interval": 5,
        "debug_ddp_parity_freq": 10,
        "result_dir": Path("tmpfp8"),
        "renormalize_loss": False,
        "use_subquadratic_ops": True,
    }


def test_lora_command_parses_as_written():
    options = options_of(shlex.split(LORA))
    assert {name: value for name, value in options.items() if "lora" in name or "finetune" in name} == {
        "finetune_ckpt_dir": Path("base"),
        "lora_finetune": True,
        "lora_dim": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "lora_target_modules": ["dense_projection", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
    }


def test_every_flag_of_the_former_recipe_is_known():
    """The values they take are in ``tests/recipes/test_pretrain.py``, and what is refused is below."""
    actions = train.build_parser()._option_string_actions
    flags = set(FORMER_FLAGS.split())
    assert len(flags) == 102 and flags <= actions.keys()
    refused = {flag for flag in flags if actions[flag].dest == "unavailable"}
    assert refused == {"--fasta-data", "--fasta-file", "--use-targeted-variance-loss", "--optim-fmt-pre-mcore-014"}
    assert refused == train._UNAVAILABLE.keys()


@pytest.mark.parametrize("text, names", [("", []), (" a , b.*,", ["a", "b.*"]), ("a", ["a"])])
def test_lists_of_modules(text, names):
    assert options_of(["--mock-data", "--lora-skip-freeze-modules", text])["lora_skip_freeze_modules"] == names


def test_every_option_is_one_that_training_knows():
    args = train.build_parser().parse_args(["--mock-data"])
    assert train._options(args).keys() == TrainingOptions.__dataclass_fields__.keys()


def test_nothing_but_the_source_is_passed_on_unasked():
    options = options_of(["--mock-data"])
    assert options.keys() == {"mock_data", "parallel"}


def test_help_tells_the_recipes_defaults():
    recipe = TrainingOptions()
    told = {}
    for action in train.build_parser()._actions:
        if match := re.search(r"\(default: ([^ ,;)]+)", action.help or ""):
            told[action.dest] = match[1]
    checked = [name for name in told if getattr(recipe, name, None) not in (None, [0])]
    assert len(checked) >= 24
    for name in set(checked) - {"workers", "result_dir", "lora_target_modules", "lora_skip_freeze_modules"}:
        assert told[name] == str(getattr(recipe, name)), name
    assert ",".join(recipe.lora_target_modules) in train.build_parser().format_help().replace("\n" + " " * 24, "")
    assert (told["lora_skip_freeze_modules"], recipe.lora_skip_freeze_modules) == ("none", [])
    assert told["result_dir"] == f"./{recipe.result_dir}"


@pytest.mark.parametrize(
    "argv", [[], ["--mock-data", "--dataset-config", "blend.yaml"], ["--mock-data", "--max-step", "3"]]
)
def test_wrong_command_line(argv, capsys):
    with pytest.raises(SystemExit) as ending:
        train.main(argv)
    assert ending.value.code == 2
    assert "train_evo2: error: " in capsys.readouterr().err


@pytest.mark.parametrize("flag", train._UNAVAILABLE)
def test_flags_that_cannot_be_honoured(flag, capsys):
    source = [] if flag == "--fasta-data" else ["--mock-data"]
    value = [] if flag == "--fasta-data" else ["7992"]
    with pytest.raises(SystemExit) as ending:
        train.main([*source, flag, *value])
    assert ending.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train_evo2: error: {flag}: ") and error.count("\n") == 1
