# SPDX-License-Identifier: Apache-2.0
"""Runs that go on with other settings than before, what is refused of them, and runs that diverge."""

from __future__ import annotations

import re
import shutil

import pytest

from tasks.training.test_train import SMALL, checkpoint, train_all

pytestmark = pytest.mark.slow

BEGUN = SMALL | {"max_steps": 8, "early_stop_on_step": 3, "warmup_steps": 2, "constant_steps": 1}
LORA = {"lora_finetune": True, "lora_dim": 4, "lora_alpha": 8, "max_steps": 3, "early_stop_on_step": 1}
LONGER = {"max_steps": 8, "early_stop_on_step": 4}

OTHER_MODELS = {
    "order of layers": ({"hybrid_override_pattern": "SHD*"}, "with hybrid_override_pattern SDH*, not SHD*; resume"),
    "kinds of layers": ({"hybrid_override_pattern": "SDD*"}, "with hybrid_override_pattern SDH*, not SDD*; resume"),
    "rotary base": ({"rotary_base": 1000}, "was trained with rotary_base 10000, not 1000; resume"),
    "position scale": ({"seq_len_interpolation_factor": 7.0}, "with seq_len_interpolation_factor None, not 7.0; resu"),
    "size": ({"model_size": "evo2_mini"}, "with hybrid_override_pattern SDH*, not SDH*SDH*; resume"),
    "bias": ({"add_bias_output": True}, "with add_bias_output False, not True; resume"),
    "untied": ({"spike_no_more_embedding_init": True}, "share_embeddings_and_output_weights True, not False; resume"),
    "precision": (
        {"precision": "bf16_mixed"},
        "with parameters in float32, not bfloat16; resume with the --mixed-prec",
    ),
    "lora, no rotary base": (LORA | LONGER, "was trained with rotary_base 1000, not 10000; resume"),
    "lora, precision": (
        LORA | LONGER | {"rotary_base": 1000, "precision": "bf16_mixed"},
        "with parameters in float32, not bfloat16; resume",
    ),
}
DIVERGES = SMALL | {"lr": 1e30, "warmup_steps": 0, "eval_iters": 0, "hidden_dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All the runs that the tests below look at, in one process."""
    root = tmp_path_factory.mktemp("runs")
    begun = BEGUN | {"result_dir": root / "begun"}
    lora = SMALL | LORA | {"result_dir": root / "lora", "finetune_ckpt_dir": checkpoint(root / "begun", 3)}
    named = {"begun": begun, "lora": lora | {"rotary_base": 1000}}
    for name, (change, _) in OTHER_MODELS.items():
        named[name] = (lora if "lora" in name else begun | LONGER) | change
    named["lora on"] = lora | LONGER | {"rotary_base": 1000}
    for name, size in (("up", 8), ("down", 2)):
        own = BEGUN | {"result_dir": root / name}
        named[f"{name}, first"] = own
        named[f"{name}, second"] = own | {"early_stop_on_step": 6, "global_batch_size": size}
        named[f"{name}, third"] = own | {"early_stop_on_step": 8}
        whole = {"result_dir": root / f"{name}_whole", "early_stop_on_step": 8, "global_batch_size": size}
        named[f"{name}, unbroken"] = BEGUN | whole
    named["diverges"] = DIVERGES | {"result_dir": root / "diverges", "eval_interval": 1}
    named["diverges at once"] = DIVERGES | {"result_dir": root / "diverges_at_once"}
    named["lr, first"] = BEGUN | {"result_dir": root / "lr"}
    named["lr, second"] = named["lr, first"] | {"early_stop_on_step": 4, "lr": 1e-5, "min_lr": 1e-6}
    named["seq_length"] = begun | {"early_stop_on_step": 6, "seq_length": 32, "micro_batch_size": 1}
    done, _ = train_all(list(named.values()))
    return dict(zip(named, done, strict=True)), root


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_run_does_not_go_on_with_another_model(runs, name):
    error = runs[0][name].text.strip()
    assert error.startswith("ERROR ") and "\n" not in error and OTHER_MODELS[name][1] in error
    assert "--result-dir" in error


def test_a_lora_run_goes_on_with_the_positions_it_was_begun_with(runs):
    assert list(runs[0]["lora"].losses) == [1] and list(runs[0]["lora on"].losses) == [2, 3, 4]


def test_a_run_goes_on_with_another_length_and_micro_batch(runs):
    assert list(runs[0]["begun"].losses) == [1, 2, 3] and list(runs[0]["seq_length"].losses) == [4, 5, 6]


def test_weights_that_are_not_those_of_the_configuration(runs, megatron, tmp_path):
    """Megatron would leave what it does not find at random."""
    from evo2_megatron.config import UserError
    from evo2_megatron.recipes.options import TrainingOptions
    from evo2_megatron.recipes.pretrain import pretrain_config
    from evo2_megatron.tasks.training.same_run import check_resumed_model

    folder = shutil.copytree(checkpoint(runs[1] / "begun", 3), tmp_path / "iter_0000003")
    config = pretrain_config(TrainingOptions(**BEGUN, precision="fp32"))
    config.model.vocab_size = 256
    check_resumed_model(folder, config)
    text = (folder / "run_config.yaml").read_text()
    (folder / "run_config.yaml").write_text(
        text.replace("hybrid_override_pattern: SDH*", "hybrid_override_pattern: SHD*")
    )
    config.model.hybrid_override_pattern = "SHD*"
    with pytest.raises(
        UserError, match="are not those of the model that is to go on: 5 missing .*; resume with"
    ) as caught:
        check_resumed_model(folder, config)
    assert "\n" not in str(caught.value)


def learning_rates(run) -> dict[int, str]:
    found = re.findall(r"iteration +(\d+)/.* learning rate: (\S+) \|", run.text)
    return {int(step): rate for step, rate in found}


@pytest.mark.parametrize("name", ["up", "down"])
def test_the_schedule_goes_on_by_steps_with_another_batch(runs, name):
    named, _ = runs
    parts = [learning_rates(named[f"{name}, {part}"]) for part in ("first", "second", "third")]
    assert [list(part) for part in parts] == [[1, 2, 3], [4, 5, 6], [7, 8]]
    unbroken = learning_rates(named[f"{name}, unbroken"])
    assert len(set(unbroken.values())) == 7  # the last two are the lowest
    assert parts[0] | parts[1] | parts[2] == unbroken
    samples = named[f"{name}, second"].samples
    assert samples[5] - samples[4] == {"up": 8, "down": 2}[name]


def test_a_run_goes_on_with_another_learning_rate(runs):
    named, _ = runs
    rates = learning_rates(named["lr, second"])
    assert rates.keys() == {4} and 1e-6 < float(rates[4]) < 1e-5


def test_a_run_that_diverges_ends_with_one_line(runs):
    """It says what to go on from."""
    *_, error = runs[0]["diverges"].text.strip().splitlines()
    assert re.match(
        r"ERROR the (loss|gradient) of step 2 is (NaN|Inf): the run diverges; run the command again", error
    )
    assert "a lower --lr" in error and error.endswith("it goes on from iter_0000001")
    *_, error = runs[0]["diverges at once"].text.strip().splitlines()
    assert error.startswith("ERROR the ") and error.endswith("it begins anew, for there is no checkpoint yet")
    # what a failed run leaves does not stand in the way of the next in the process
    assert runs[0]["seq_length"].losses
