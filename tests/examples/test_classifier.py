# SPDX-License-Identifier: Apache-2.0
"""examples/evo2_classifier.py: its parts, what it refuses, and that what it saves is what it trained."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"
LENGTH = 24
NUM_VALIDATION = 12


@pytest.fixture(scope="module")
def classifier():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("evo2_classifier")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def parts(classifier, megatron):
    """The module that needs Megatron."""
    return importlib.import_module("evo2_classifier_model")


# pooling and loss


@pytest.mark.parametrize("lengths", [[1], [5, 3, 1], [2, 2]])
def test_pool(parts, lengths):
    import torch

    torch.manual_seed(0)
    B, L, H = len(lengths), 5, 7
    hidden_LBH = torch.randn(L, B, H)
    mask_BL = torch.zeros(B, L, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask_BL[row, :length] = True
    for how in ("mean", "last"):
        got = parts.pool(hidden_LBH, mask_BL, how)
        for row, length in enumerate(lengths):
            own_LH = hidden_LBH[:length, row]
            torch.testing.assert_close(got[row], own_LH.mean(0) if how == "mean" else own_LH[-1])


def test_pool_is_in_float32(parts):
    import torch

    ones_LBH = torch.ones(1000, 1, 2, dtype=torch.bfloat16)  # whose sum bfloat16 does not hold
    pooled = parts.pool(ones_LBH, torch.ones(1, 1000, dtype=torch.bool), "mean")
    assert pooled.dtype == torch.float32 and pooled.tolist() == [[1.0, 1.0]]


def test_summed_loss(parts):
    import torch

    scores = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]])
    loss, count, report = parts.summed_loss(torch.tensor([0, 2]), scores)
    want = sum(math.log(sum(math.exp(s) for s in row)) - row[label] for row, label in zip(scores.tolist(), (0, 2)))
    assert loss.item() == pytest.approx(want) and count.item() == 2
    assert report["ce loss"].tolist() == pytest.approx([want, 2])
    assert report["accuracy"].tolist() == [1, 2]


# data


def write_lines(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_samples(parts, tmp_path, caplog):
    lines = [{"sequence": "ACGTAC", "label": 1}, "\n", {"sequence": " gg ", "label": 0, "name": "x"}]
    data = parts.LabelledSequences(write_lines(tmp_path / "a.jsonl", lines), seq_length=4, num_classes=2)
    assert "1 sequences are cut to 4 bases" in caplog.text
    long, short = data
    assert long["tokens"].tolist() == list(b"ACGT") and long["pool_mask"].all() and long["label"] == 1
    assert short["tokens"].tolist() == [*b"GG", 1, 1] and short["label"] == 0
    assert short["pool_mask"].tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "holds no sequences"),
        (["\n", "ACGT\n"], "line 2: it must be like"),
        ([["ACGT", 0]], "line 1: it must be like"),
        ([{"sequence": "ACGT"}], "line 1: it must be like"),
        ([{"sequence": "", "label": 0}], "line 1: sequence is ''"),
        ([{"sequence": 7, "label": 0}], "line 1: sequence is 7"),
        ([{"sequence": "A\nC", "label": 0}], "line 1 contains b'.n'"),
        ([{"sequence": "ACGT", "label": 3}], "label is 3; it must be a whole number from 0 to 2"),
        ([{"sequence": "ACGT", "label": -1}], "label is -1"),
        ([{"sequence": "ACGT", "label": True}], "label is True"),
        ([{"sequence": "ACGT", "label": "1"}], "label is '1'"),
    ],
)
def test_broken_lines(parts, tmp_path, lines, message):
    path = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(UserError, match=message):
        parts.read_labelled(path, 3)


def test_files_that_cannot_be_read(parts, tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.jsonl"):
        parts.read_labelled(tmp_path / "none.jsonl", 3)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not text"):
        parts.read_labelled(tmp_path / "binary", 3)


# options

NEEDED = {
    "train_jsonl": Path("t"),
    "base_ckpt_dir": Path(),
    "result_dir": Path("r"),
    "experiment_name": "e",
    "num_classes": 3,
}


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_classes": 1}, "--num-classes is 1; it must be 2 or more"),
        ({"lr": 1e-5}, "--lr is 1e-05; it must be 0.0001 or more"),
        ({"weight_decay": float("nan")}, "--weight-decay is nan"),
        ({"classifier_dropout": 1.0}, "--classifier-dropout is 1.0"),
        ({"lora_dropout": -0.1}, "--lora-dropout is -0.1"),
        ({"micro_batch_size": 3}, "--global-batch-size 8 is not a multiple of --micro-batch-size 3 x 1 processes"),
        ({"decay_steps": 20}, "--decay-steps 20 is not after --warmup-iters 20"),
        ({"base_ckpt_dir": Path("none")}, "none does not exist; check --base-ckpt-dir"),
        ({"wandb_entity": "me"}, "go with --wandb-project"),
        ({"tokenizer_path": Path("none")}, "cannot read none"),
    ],
)
def test_options_that_cannot_work(classifier, given, message):
    with pytest.raises(UserError, match=message):
        classifier.check(classifier.Options(**(NEEDED | given)))


def test_defaults_are_those_that_help_tells(classifier):
    flags = ["--train-jsonl=t", "--base-ckpt-dir=.", "--result-dir=r", "--experiment-name=e", "--num-classes=3"]
    assert classifier.Options(**vars(classifier.build_parser().parse_args(flags))) == classifier.Options(**NEEDED)
    options, told = classifier.Options(**NEEDED), 0
    for action in classifier.build_parser()._actions:
        value = getattr(options, action.dest, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "default" in action.help:
            assert float(action.help.partition("(default: ")[2].rstrip(")")) == value, action.dest
            told += 1
    assert told == 16


# training

TRAIN = """
import json, sys
from pathlib import Path
import evo2_classifier as classifier
from evo2_megatron.config import UserError
for given in json.loads(sys.argv[1]):
    paths = ("train_jsonl", "val_jsonl", "base_ckpt_dir", "result_dir")
    try:
        classifier.train(classifier.Options(**(given | {name: Path(given[name]) for name in paths})))
    except UserError as error:
        print("ERROR", error, flush=True)
"""


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory):
    """Folder of several runs and what they printed. One process: importing Megatron takes longer than a small run."""
    root = tmp_path_factory.mktemp("classifier")
    rng = random.Random(0)
    samples = []
    for number in range(60):
        # unequal lengths, and classes that differ in what they are made of
        bases = "".join(
            rng.choices("ACGT", weights=([5, 1, 1, 5], [1, 5, 5, 1])[number % 2], k=rng.randint(9, LENGTH))
        )
        samples.append({"sequence": bases, "label": number % 2})
    common = {
        "train_jsonl": str(write_lines(root / "train.jsonl", samples[NUM_VALIDATION:])),
        "val_jsonl": str(write_lines(root / "val.jsonl", samples[:NUM_VALIDATION])),
        "base_ckpt_dir": str(write_tiny_checkpoint(root / "base", seq_length=64).parent),
        "result_dir": str(root),
        "num_classes": 2,
        "seq_length_tokens": LENGTH,
        "train_iters": 4,
        "global_batch_size": 6,
        "micro_batch_size": 3,
        "warmup_iters": 1,
        "decay_steps": 4,
        "eval_interval": 2,
        "eval_iters": NUM_VALIDATION // 6,
        "log_interval": 1,
        "lr": 5e-3,
        "classifier_hidden_size": 16,
    }
    lora = common | {"lora_finetune": True, "lora_dim": 4, "lora_alpha": 8}
    jobs = [
        lora | {"experiment_name": "whole"},
        lora | {"experiment_name": "halves", "train_iters": 2},
        lora | {"experiment_name": "halves"},
        lora | {"experiment_name": "halves", "train_iters": 6, "decay_steps": 6, "pool": "last"},
        lora | {"experiment_name": "other", "lora_target_modules": ["dense", "linear_qvk"]},
        lora | {"experiment_name": "other", "seq_length_tokens": 65},
        lora | {"experiment_name": "other", "micro_batch_size": 20, "global_batch_size": 20},
        lora | {"experiment_name": "bf16", "precision_recipe": "bf16_mixed"},
        common
        | {"experiment_name": "head", "train_iters": 60, "decay_steps": 60, "eval_interval": 60, "pool": "last"},
    ]
    path = f"{EXAMPLES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(jobs)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    errors = [line.removeprefix("ERROR ") for line in done.stdout.splitlines() if line.startswith("ERROR")]
    return root, errors, samples[:NUM_VALIDATION]


def scalars(run, tag):
    """Steps and their first values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb_logs"))
    events.Reload()
    first = {event.step: event.value for event in reversed(events.Scalars(tag))}
    return dict(sorted(first.items()))


@pytest.mark.parametrize("name", ["whole", "head", "bf16"])
def test_what_is_loaded_is_what_was_trained(classifier, runs, name):
    """Loss and accuracy of the run's last validation, from the files that it left."""
    root, _, samples = runs
    sequences, labels = ([sample[key] for sample in samples] for key in ("sequence", "label"))
    result = classifier.predict(
        trained_ckpt_dir=root / name / "checkpoints", sequences=sequences, micro_batch_size=5, return_logits=True
    )
    logits = result["logits"].astype(np.float64)
    assert logits.shape == (NUM_VALIDATION, 2) and np.array_equal(result["predictions"], logits.argmax(1))
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(NUM_VALIDATION), labels]
    (last, loss), accuracy = (
        max(scalars(root / name, "ce loss validation").items()),
        np.mean(result["predictions"] == labels),
    )
    assert losses.mean() == pytest.approx(loss, rel=1e-3 if name == "bf16" else 1e-4)
    assert accuracy == pytest.approx(scalars(root / name, "accuracy validation")[last])


def test_a_prediction_does_not_depend_on_its_batch(classifier, runs):
    root, _, samples = runs
    sequences = [sample["sequence"] for sample in samples]
    arguments = {"trained_ckpt_dir": root / "whole", "sequences": sequences, "return_logits": True}
    alone, together = (classifier.predict(micro_batch_size=size, **arguments)["logits"] for size in (1, 12))
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)


def test_adapters_have_a_say(classifier, runs, tmp_path):
    """With another backbone, to which they do not belong, the scores are others."""
    root, _, samples = runs
    other = write_tiny_checkpoint(tmp_path / "other", seq_length=64, seed=2)
    arguments = {"sequences": [samples[0]["sequence"]], "return_logits": True, "trained_ckpt_dir": root / "whole"}
    own = classifier.predict(**arguments)["logits"]
    assert not np.allclose(own, classifier.predict(base_ckpt_dir=other, **arguments)["logits"], atol=1e-3)


def test_the_head_alone_learns_what_composition_tells(runs):
    assert max(scalars(runs[0] / "head", "accuracy validation").items()) == (60, 1.0)


def test_a_resumed_run_equals_an_unbroken_one(runs):
    losses = {name: scalars(runs[0] / name, "ce loss") for name in ("whole", "halves")}
    assert list(losses["whole"]) == [1, 2, 3, 4]
    assert losses["whole"] == losses["halves"]


def test_counts(classifier, runs):
    H, h, C, base = 128, 16, 2, 884_192
    head = 2 * H + (H + 1) * h + (h + 1) * C
    only_head = classifier.count_params_from_checkpoint(runs[0] / "head")
    assert only_head == {
        "total": base + head,
        "head": head,
        "lora_adapters": 0,
        "fine_tuned": head,
        "fine_tuned_fraction": head / (base + head),
    }
    F, rank = 352, 4
    mlp = 4 * rank * ((H + 2 * F) + (F + H))  # in four layers
    mixers = 4 * rank * ((H + 3 * H) + (H + H))
    with_adapters = classifier.count_params_from_checkpoint(runs[0] / "whole")
    assert with_adapters["lora_adapters"] == mlp + mixers
    assert with_adapters["total"] == base + head + mlp + mixers


@pytest.mark.parametrize(
    "number, message",
    [
        (0, "was trained with classifier_pool mean, not last; choose another --result-dir"),
        (1, "'linear_qvk' matches no module with weights"),
        (2, "--seq-length-tokens 65 is more than the backbone's 64"),
        (3, "val.jsonl holds 12 sequences, fewer than --micro-batch-size 20"),
    ],
)
def test_runs_that_cannot_begin(runs, number, message):
    root, errors, _ = runs
    assert len(errors) == 4 and message in errors[number]
    assert not (root / "other").exists()


def test_a_checkpoint_of_another_kind(classifier, runs):
    with pytest.raises(UserError, match="is no checkpoint of a classifier"):
        classifier.predict(trained_ckpt_dir=runs[0] / "base", sequences=["ACGT"])
    with pytest.raises(UserError, match="is no checkpoint of a classifier"):
        classifier.count_params_from_checkpoint(runs[0] / "base")


@pytest.mark.parametrize("sequences, message", [(["ACGT", ""], "sequence 2: sequence is ''"), ([3], "sequence 1: ")])
def test_sequences_that_are_none(classifier, runs, sequences, message):
    with pytest.raises(UserError, match=message):
        classifier.predict(trained_ckpt_dir=runs[0] / "whole", sequences=sequences)


def test_no_sequences(classifier, runs):
    result = classifier.predict(trained_ckpt_dir=runs[0] / "whole", sequences=[], return_logits=True)
    assert result["predictions"].shape == (0,) and result["logits"].shape == (0, 2)


def test_a_command_line_that_cannot_work():
    flags = ["--train-jsonl=t", "--base-ckpt-dir=b", "--result-dir=r", "--experiment-name=e", "--num-classes=1"]
    done = subprocess.run([sys.executable, EXAMPLES / "evo2_classifier.py", *flags], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "evo2_classifier.py: error: --num-classes is 1; it must be 2 or more\n"
