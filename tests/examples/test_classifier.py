# SPDX-License-Identifier: Apache-2.0
"""examples/evo2_classifier.py: its flags, and what it makes of checkpoints. The rest is ``train_head``'s."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import UserError
from evo2_megatron.recipes.head_options import HeadOptions

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "evo2_classifier.py"
LENGTH = 24
FLAGS = ["--train-jsonl=t", "--base-ckpt-dir=.", "--result-dir=r", "--experiment-name=e", "--num-classes=3"]


@pytest.fixture(scope="module")
def classifier():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("evo2_classifier")
    sys.path.remove(str(EXAMPLES))


def options_of(classifier, *flags):
    return classifier.options_of(classifier.build_parser().parse_args([*FLAGS, *flags]))


def test_defaults(classifier):
    options = options_of(classifier)
    assert options.classes == ("0", "1", "2") and options.label_columns == ("label",)
    assert (options.max_steps, options.warmup_steps, options.decay_steps) == (300, 20, 280)
    assert (options.eval_interval, options.eval_iters, options.save_interval) == (50, 10, 300)
    assert options.seq_length == 512 and options.tokenizer is None  # the checkpoint's
    own = HeadOptions(train_data=Path("t"), base_ckpt_dir=Path(), result_dir=Path("r"))
    for name in ("lora_target_modules", "lora_dim", "lora_alpha", "lora_dropout", "head_dropout", "pooling", "lr"):
        assert getattr(options, name) == getattr(own, name), name


def test_decay_that_is_not_after_the_warm_up(classifier):
    assert options_of(classifier, "--train-iters=10").decay_steps == 21
    assert options_of(classifier, "--decay-steps=100000").decay_steps == 100_000


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(megatron, tmp_path_factory):
    """The script's run, its folder, and the validation data."""
    root, rng, samples = tmp_path_factory.mktemp("classifier"), random.Random(0), []
    for number in range(36):
        weights = ([5, 1, 1, 5], [1, 5, 5, 1])[number % 2]
        samples.append({"sequence": "".join(rng.choices("ACGT", weights=weights, k=LENGTH)), "label": number % 2})
    train, val = write_lines(root / "train.jsonl", samples[12:]), write_lines(root / "val.jsonl", samples[:12])
    base = write_tiny_checkpoint(root / "base", seq_length=64).parent
    done = subprocess.run(
        [
            sys.executable, SCRIPT, "--train-jsonl", train, "--val-jsonl", val, "--base-ckpt-dir", base,
            "--result-dir", root, "--experiment-name", "run", "--num-classes", "2", "--seq-length-tokens", str(LENGTH),
            "--train-iters", "4", "--global-batch-size", "6", "--warmup-iters", "1", "--eval-interval", "2",
            "--eval-iters", "2", "--save-interval", "2", "--lora-finetune", "--lora-dim", "4", "--lora-alpha", "8",
            "--classifier-hidden-size", "16", "--log-interval", "1", "--lr", "5e-3",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return root, samples[:12]


@pytest.mark.slow
def test_scores_are_those_of_the_training(classifier, run):
    root, samples = run
    sequences, labels = ([sample[key] for sample in samples] for key in ("sequence", "label"))
    arguments = {"trained_ckpt_dir": root / "run" / "checkpoints", "sequences": sequences, "return_logits": True}
    alone, together = (classifier.predict(micro_batch_size=size, **arguments)["logits"] for size in (1, 12))
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)
    logits = together.astype(np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(12), labels]
    evaluations = dict(json.loads((root / "run" / "checkpoints" / "evaluations.json").read_text()))
    assert losses.mean() == pytest.approx(evaluations[4], rel=1e-4)
    assert np.array_equal(classifier.predict(**arguments)["predictions"], logits.argmax(1))


@pytest.mark.slow
def test_counts(classifier, run):
    H, h, C, base, F, rank = 128, 16, 2, 884_192, 352, 4
    head = 2 * H + (H + 1) * h + (h + 1) * C
    mlp = 4 * rank * ((H + 2 * F) + (F + H))  # in four layers
    mixers = 4 * rank * ((H + 3 * H) + (H + H))
    fine_tuned = head + mlp + mixers
    assert classifier.count_params_from_checkpoint(run[0] / "run") == {
        "total": base + fine_tuned,
        "head": head,
        "lora_adapters": mlp + mixers,
        "fine_tuned": fine_tuned,
        "fine_tuned_fraction": fine_tuned / (base + fine_tuned),
    }


@pytest.mark.slow
def test_a_checkpoint_of_another_kind(classifier, run):
    with pytest.raises(UserError, match="has no prediction head"):
        classifier.predict(trained_ckpt_dir=run[0] / "base", sequences=["ACGT"])
    with pytest.raises(UserError, match="has no prediction head"):
        classifier.count_params_from_checkpoint(run[0] / "base")


@pytest.mark.slow
@pytest.mark.parametrize(
    "sequences, message",
    [(["ACGT", ""], "sequence 2: sequence is ''"), ([3], "sequence 1: "), ("ACGT", "give a list")],
)
def test_sequences_that_are_none(classifier, run, sequences, message):
    with pytest.raises(UserError, match=message):
        classifier.predict(trained_ckpt_dir=run[0] / "run", sequences=sequences)


@pytest.mark.slow
def test_no_sequences(classifier, run):
    result = classifier.predict(trained_ckpt_dir=run[0] / "run", sequences=[], return_logits=True)
    assert result["predictions"].shape == (0,) and result["logits"].shape == (0, 2)


def test_a_command_line_that_cannot_work():
    flags = [*FLAGS[:-1], "--num-classes=1"]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "evo2_classifier.py: error: --num-classes is 1; it must be 2 or more\n"
