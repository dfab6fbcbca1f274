# SPDX-License-Identifier: Apache-2.0
"""LoRA runs of train_evo2: what they save, how they go on, what they refuse, and that they learn."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import yaml

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from data.test_datasets import write, write_config
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.recipes.options import TrainingOptions
from evo2_megatron.tasks.training import train_lora
from tasks.training.test_train import SMALL, checkpoint, run_config, train_all

LORA = {"lora_finetune": True, "lora_dim": 4, "lora_alpha": 8, "lr": 3e-3}
KEPT = ["final_norm", "word_embeddings", "output_layer"]


@pytest.fixture(scope="module")
def runs(megatron, tmp_path_factory):
    """All runs that the tests below look at, in one process."""
    root = tmp_path_factory.mktemp("lora")
    base = write_tiny_checkpoint(root / "base", seq_length=8192)
    whole = SMALL | LORA | {"finetune_ckpt_dir": base, "result_dir": root / "whole"}
    halves = whole | {"result_dir": root / "halves"}
    kept = whole | {"result_dir": root / "kept", "lora_skip_freeze_modules": KEPT, "max_steps": 2, "eval_interval": 2}
    narrow = whole | {"result_dir": root / "narrow", "quantize_weights": "int8"}
    half = root / "half"
    shutil.copytree(base.parent, half)
    described = half / base.name / "run_config.yaml"
    described.write_text(yaml.safe_dump(run_config(half / base.name) | {"mixed_precision": "fp16_mixed"}))
    named = {
        "whole": whole,
        "first half": halves | {"early_stop_on_step": 3},
        "second half": halves,
        "kept": kept,
        "other rank": halves | {"max_steps": 7, "lora_dim": 8},
        "other modules": halves | {"max_steps": 7, "lora_target_modules": ["dense"]},
        "all weights": SMALL | {"max_steps": 7, "result_dir": root / "halves", "finetune_ckpt_dir": base},
        "on adapters": whole | {"result_dir": root / "other", "finetune_ckpt_dir": root / "whole/evo2/checkpoints"},
        "typing error": whole | {"result_dir": root / "other", "lora_target_modules": ["dense", "linear_qvk"]},
        "nothing": whole | {"result_dir": root / "other", "lora_target_modules": []},
        "8 bits": narrow | {"early_stop_on_step": 3},
        "8 bits on": narrow,
        "wide on": narrow | {"quantize_weights": "none", "max_steps": 7},
        "8 bits of half": narrow | {"result_dir": root / "other", "finetune_ckpt_dir": half},
        "8 bits trained": narrow
        | {"result_dir": root / "other", "lora_skip_freeze_modules": ["*.layers.1.*.dense"]}
        | {"lora_target_modules": ["linear_fc1"]},
        "no attention": whole | {"result_dir": root / "other", "hybrid_override_pattern": "SDHS"},
    }
    done, different = train_all(
        list(named.values()), compare=[(checkpoint(root / "whole", 6), checkpoint(root / "halves", 6))]
    )
    return dict(zip(named, done, strict=True)), different, root


def weights(folder):
    from evo2_megatron.checkpoint.load import tensor_shapes
    from evo2_megatron.checkpoint.names import is_weight

    return {name for name in tensor_shapes(folder) if is_weight(name)}


def test_a_checkpoint_holds_adapters_only(runs):
    names = weights(checkpoint(runs[2] / "whole", 6))
    assert len(names) == 2 * 16 and all(".adapter.linear_" in name for name in names)
    kept = weights(checkpoint(runs[2] / "kept", 2)) - names
    assert kept == {"decoder.final_norm.weight", "embedding.word_embeddings.weight"}


def test_what_a_checkpoint_says(runs):
    folder = checkpoint(runs[2] / "whole", 6)
    section = run_config(folder)["peft"]
    assert section["_target_"] == "evo2_megatron.model.lora.Evo2LoRA"
    assert (section["dim"], section["alpha"], section["dropout"]) == (4, 8, 0.1)
    # the iteration: adapters belong to one
    assert run_config(folder)["checkpoint"]["pretrained_checkpoint"] == str(runs[2] / "base" / "iter_0000001")
    begun_with = yaml.safe_load((runs[2] / "whole" / "evo2" / "config.yaml").read_text())
    assert begun_with["peft"]["dim"] == 4


def test_only_what_is_to_be_trained_changes(runs):
    import torch

    from evo2_megatron.checkpoint.distcp import read_index, stored_tensors

    base, kept = runs[2] / "base" / "iter_0000001", checkpoint(runs[2] / "kept", 2)
    for name in ("decoder.final_norm.weight", "embedding.word_embeddings.weight"):
        before, after = (stored_tensors(d, read_index(d), {name: name})[name].read() for d in (base, kept))
        assert not torch.equal(before, after)
    own = stored_tensors(kept, read_index(kept), {name: name for name in weights(kept) if "linear_out" in name})
    assert len(own) == 16 and all(tensor.read().abs().max() > 0 for tensor in own.values())


def test_a_resumed_run_equals_an_unbroken_one(runs):
    named, different, _ = runs
    whole, first, second = named["whole"], named["first half"], named["second half"]
    assert list(first.losses) == [1, 2, 3] and list(second.losses) == [4, 5, 6]
    assert first.losses | second.losses == whole.losses
    assert whole.losses[6] < whole.losses[1]
    assert different == [[]]


def test_on_weights_in_8_bits(runs, caplog):
    """It learns much as on wide weights, and whoever uses the adapters has the same weights, unless told otherwise."""
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.runtime.distributed import process_groups

    named, _, root = runs
    losses = named["8 bits"].losses | named["8 bits on"].losses
    assert list(losses) == [1, 2, 3, 4, 5, 6] and losses[6] < losses[1]
    # the text has four digits
    assert list(losses.values()) == pytest.approx(list(named["whole"].losses.values()), rel=0.01)
    assert losses != named["whole"].losses
    folder = checkpoint(root / "narrow", 6)
    assert weights(folder) == weights(checkpoint(root / "whole", 6))
    for asked, narrow in (({}, True), ({"quantize_weights": "none"}, False)):
        with process_groups(ParallelConfig()):
            loaded = load_model(folder, parallel=ParallelConfig(), provider_overrides=asked)
        names = {name for name, p in loaded.model.named_parameters() if str(p.dtype) == "torch.int8"}
        assert bool(names) == narrow


def test_merged_they_are_wide(runs, tmp_path):
    from evo2_megatron.tasks.conversion.merge_lora import merge_lora

    merged = merge_lora(checkpoint(runs[2] / "narrow", 6), tmp_path, verify=True)
    assert run_config(merged)["model"]["quantize_weights"] == "none"


@pytest.mark.parametrize(
    "name, message",
    [
        ("other rank", "--lora-dim is 8, but .* was trained with 4; resume with the same"),
        ("other modules", "--lora-target-modules is dense, but .* was trained with dense_projection,"),
        ("all weights", "is of a run that trained LoRA adapters, and this one is to train all weights"),
        ("on adapters", "holds LoRA adapters without their base model .* evo2_merge_lora"),
        ("typing error", "'linear_qvk' matches no module with weights; this model has dense, dense_projection,"),
        ("nothing", "leave nothing to train"),
        ("no attention", "has hybrid_override_pattern SDHS, but"),
        ("wide on", "was trained with --quantize-weights int8; resume with the same, or"),
        ("8 bits of half", "int8 takes and gives bfloat16, and precision fp16_mixed is something else"),
        ("8 bits trained", "matches decoder.layers.1.mixer.dense, whose weights --quantize-weights keeps in few bits"),
    ],
)
def test_runs_that_cannot_begin(runs, name, message):
    assert re.match(f"ERROR .*{message}", runs[0][name].text)
    assert not (runs[2] / "other").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"lora_dim": 4}, "--lora-dim goes with --lora-finetune"),
        ({"lora_skip_freeze_modules": []}, "--lora-skip-freeze-modules goes with --lora-finetune"),
        ({"quantize_weights": "int8"}, "--quantize-weights goes with --lora-finetune; add that, or leave it out"),
        *(
            (
                LORA | {"finetune_ckpt_dir": Path("b"), "quantize_weights": "int8", "precision": precision},
                "takes and gives bf",
            )
            for precision in (
                "fp16_mixed",
                "fp16-mixed",
                "bf16_with_fp8_current_scaling_mixed",
                "bf16_with_nvfp4_mixed",
            )
        ),
        ({"lora_finetune": True}, "needs a pretrained checkpoint to adapt; give one with --finetune-ckpt-dir"),
        (LORA | {"finetune_ckpt_dir": Path("b"), "lora_dropout": 1.0}, "--lora-dropout is 1.0"),
        (LORA | {"finetune_ckpt_dir": Path("b"), "lora_dropout": float("nan")}, "--lora-dropout is nan"),
        (LORA | {"finetune_ckpt_dir": Path("b"), "parallel": ParallelConfig(tensor=8)}, "not a multiple of .* 8"),
    ],
)
def test_options_that_cannot_work(given, message):
    options = TrainingOptions(**given)
    with pytest.raises(UserError, match=message):
        train_lora.check_options(options, given)
        train_lora.check_base(options)


def test_a_stage_that_would_be_idle(megatron):
    from evo2_megatron.model.lora import Evo2LoRA
    from evo2_megatron.model.provider import provider_for

    provider = provider_for("evo2_tiny", vocab_size=512, pipeline_model_parallel_size=2)
    for targets, kept, stage in (
        (["*.layers.3.*.linear_fc1"], [], 0),
        (["*.layers.1.*.dense"], [], 1),
        ([], ["final_norm"], 0),
    ):
        with pytest.raises(UserError, match=f"leave pipeline stage {stage}, layers .* nothing to train"):
            train_lora.check_modules(Evo2LoRA(target_modules=targets, skip_freeze_modules=kept), provider)
    train_lora.check_modules(
        Evo2LoRA(target_modules=["*.layers.1.*.dense"], skip_freeze_modules=["final_norm"]), provider
    )


def test_names_of_other_models_layers_are_no_error(megatron):
    """The defaults name attention's layers."""
    from evo2_megatron.model.lora import Evo2LoRA
    from evo2_megatron.model.provider import provider_for

    provider = provider_for("evo2_tiny", vocab_size=512, hybrid_override_pattern="SDHS")
    train_lora.check_modules(Evo2LoRA(target_modules=TrainingOptions().lora_target_modules), provider)


def test_the_base_that_a_run_began_with(runs, tmp_path):
    """Not the newest that its folder has by now; and another only where that is gone."""
    from evo2_megatron.checkpoint.run_config import read_run_config

    root = runs[2]
    folder = shutil.copytree(checkpoint(root / "whole", 6), tmp_path / "iter_0000006")
    newer = shutil.copytree(root / "base" / "iter_0000001", tmp_path / "base" / "iter_0000009")
    options = dataclasses.replace(TrainingOptions(**LORA), finetune_ckpt_dir=newer.parent)
    assert train_lora.base_of_own(folder, read_run_config(folder), options) == root / "base" / "iter_0000001"
    text = (folder / "run_config.yaml").read_text()
    (folder / "run_config.yaml").write_text(text.replace(str(root / "base"), str(tmp_path / "gone")))
    assert train_lora.base_of_own(folder, read_run_config(folder), options) == newer


@pytest.mark.slow
def test_lora_learns_what_full_fine_tuning_does(megatron, tmp_path):
    """A motif that repeats: in 200 steps the loss falls below a tenth of what it is at the start."""
    motif = "ACGGTTACATGC" * 12
    for split in ("train", "validation", "test"):
        write(tmp_path / split, [motif[i % 12 :].encode()[:130] + b"\0" for i in range(200)])
    blend = write_config(tmp_path, [(tmp_path / split, 1.0, split) for split in ("train", "validation", "test")])
    base = write_tiny_checkpoint(tmp_path / "base", seq_length=8192)
    task = SMALL | {
        "mock_data": False,
        "dataset_config": blend,
        "finetune_ckpt_dir": base,
        "max_steps": 200,
        "eval_interval": 200,
        "lr": 5e-3,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    lora = task | {"lora_finetune": True, "result_dir": tmp_path / "lora"}
    runs, _ = train_all([lora, task | {"result_dir": tmp_path / "all"}])
    for run in runs:
        assert run.losses[200] < 0.1 * run.losses[1]
