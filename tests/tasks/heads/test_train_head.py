# SPDX-License-Identifier: Apache-2.0
"""Prediction heads: that what is saved is what was trained, what is refused, and what predictions depend on."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import UserError
from evo2_megatron.data.labels import Labels
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.data.tokenizer import tokenizer_dir
from evo2_megatron.recipes.head_options import HeadOptions
from evo2_megatron.tasks.heads import train_head
from tasks.heads.head_runs import NUM_VALIDATION, make_rows, model_section, predicted, scalars, train_all, write_csv


@pytest.fixture(scope="module")
def runs(megatron, tmp_path_factory):
    """Folder of several runs, the errors of those that could not begin, and the validation data."""
    root = tmp_path_factory.mktemp("heads")
    rows = make_rows(61)
    common = {
        "train_data": write_csv(root / "train.csv", rows[NUM_VALIDATION:]),
        "val_data": write_csv(root / "val.csv", rows[:NUM_VALIDATION]),
        "base_ckpt_dir": str(write_tiny_checkpoint(root / "base", seq_length=64).parent),
        "result_dir": str(root),
        "max_steps": 4,
        "global_batch_size": 6,
        "micro_batch_size": 3,
        "warmup_steps": 1,
        "eval_interval": 2,
        "log_interval": 1,
        "lr": 5e-3,
        "head_hidden_size": 16,
    }
    test = {"test_data": write_csv(root / "test.csv", make_rows(90)[61:])}  # more than for validation
    lora = common | {"lora_finetune": True, "lora_dim": 4, "lora_alpha": 8}
    halves = lora | {"experiment_name": "halves", "decay_steps": 4}
    numbers = {"task": "regression", "label_columns": ["gc", "rich"]}
    long = {"max_steps": 60, "eval_interval": 20}
    small_base = {"base_ckpt_dir": str(write_tiny_checkpoint(root / "small", seq_length=64, rows=256).parent)}
    errors = train_all(
        [
            lora | test | {"experiment_name": "whole"},
            halves | {"max_steps": 2},
            halves,
            halves | {"max_steps": 6, "decay_steps": 6, "pooling": "last"},
            halves | {"max_steps": 6, "decay_steps": 6, "embedding_layer": 1},
            halves | {"max_steps": 6, "decay_steps": 6, "global_batch_size": 12},
            lora | {"experiment_name": "other", "lora_target_modules": ["dense", "linear_qvk"]},
            lora | {"experiment_name": "other", "seq_length": 65},
            lora | {"experiment_name": "other", "micro_batch_size": 50, "global_batch_size": 50},
            lora | {"experiment_name": "other", "embedding_layer": 4},
            lora | {"experiment_name": "other", "classes": ["AT", "CG"]},
            lora | {"experiment_name": "other", "classes": ["AT", "GC", "N"], "class_weights": "balanced"},
            lora | {"experiment_name": "bf16", "precision": "bf16_mixed", "recompute": True},
            common | long | {"experiment_name": "head", "class_weights": "balanced"},
            common | {"experiment_name": "narrow", "quantize_weights": "int8"},
            common | long | numbers | {"experiment_name": "numbers", "embedding_layer": -3, "both_strands": True},
            lora
            | {"experiment_name": "labels", "task": "multilabel", "label_columns": ["starts", "rich"]}
            | {"class_weights": "balanced", "head_hidden_size": 0, "pooling": "last"},
            # the learning rate is far too high: the first validation stays the best
            *[
                lora
                | test
                | {"experiment_name": "stalls", "max_steps": 40, "lr": 1.0, "patience": 2, "warmup_steps": 4}
            ]
            * 2,
            *[halves | {"max_steps": 6, "decay_steps": 6} | change for change in _other_data(root, rows, common)],
            common | small_base | {"experiment_name": "other", "tokenizer": str(tokenizer_dir(512))},
        ]
    )
    return root, errors, rows[:NUM_VALIDATION]


def _other_data(root, rows, common):
    """What a run is not to go on with: as many rows, and of them one label, two labels or one base are others."""
    rows = [dict(row) for row in rows]
    train, val = rows[NUM_VALIDATION:], rows[:NUM_VALIDATION]
    first, second = (next(row for row in train if row["label"] == name) for name in ("AT", "GC"))
    first["label"], second["label"] = second["label"], first["label"]
    swapped = {"train_data": write_csv(root / "swapped.csv", train)}
    val[0]["sequence"] = "T" + val[0]["sequence"][1:] if val[0]["sequence"][0] != "T" else "A" + val[0]["sequence"][1:]
    base = {"val_data": write_csv(root / "other_base.csv", val)}
    done = {"max_steps": 4, "decay_steps": 4}  # the run has no step left
    after_it = [done | change for change in ({"pooling": "last"}, {"lora_dim": 8}, {}, swapped)]
    return [swapped, base, {"seq_length": 20}, {"seed": 0}, {"precision": "bf16_mixed"}, *after_it]


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(runs, megatron, caplog):
    """Its run_config.yaml does not say what its data were."""
    from evo2_megatron.checkpoint.run_config import read_run_config
    from evo2_megatron.data.providers import LabelledSequencesProvider
    from evo2_megatron.tasks.heads.train_head import _check_same_data

    (path, *_) = sorted((runs[0] / "halves" / "checkpoints").glob("iter_*/run_config.yaml"))
    own, values = read_run_config(path.parent), yaml.safe_load(path.read_text())["dataset"]
    assert set(values["data_digests"]) == {"train", "val"}
    known = {name: values[name] for name in ("train_data", "seq_length", "task", "label_columns", "classes")}
    dataset = LabelledSequencesProvider(**known, sequence_column="sequence", data_digests={"train": "0" * 64})
    with pytest.raises(UserError, match="other sequences or labels than those of .*train.csv; give the same"):
        _check_same_data(own, values["data_digests"], dataset)
    _check_same_data(own, None, dataset)
    assert "does not say what data it was trained with" in caplog.text


def loss_of(lines, model):
    """Sum of the losses of lines of a predictions file and how many they are, by their definition."""
    total, count = 0.0, 0
    for line in lines:
        for number, name in enumerate(model["head_outputs"]):
            if model["head_task"] == "classification":
                if line["true_label"] == name:
                    weight = (model["head_weights"] or [1, 1])[number]
                    total, count = total - weight * math.log(float(line[f"probability_{name}"])), count + 1
            elif line[f"true_{name}"]:
                target, count = float(line[f"true_{name}"]), count + 1
                if model["head_task"] == "regression":
                    error = float(line[f"prediction_{name}"]) - target
                    total += (error / model["head_target_scale"][number]) ** 2
                else:
                    p = float(line[f"probability_{name}"])
                    total -= model["head_weights"][number] * math.log(p) if target else math.log(1 - p)
    return total, count


def best_of(runs, name):
    """Step and loss of the best validation of a run."""
    evaluations = json.loads((runs[0] / name / "checkpoints" / "evaluations.json").read_text())
    return min(evaluations, key=lambda pair: pair[1])


@pytest.mark.parametrize("name", ["whole", "head", "narrow", "bf16", "labels"])
def test_what_is_loaded_is_what_was_trained(runs, tmp_path, name):
    """The best validation's loss and accuracy again, from the files that the run left."""
    model, (step, loss) = model_section(runs, name), best_of(runs, name)
    lines, metrics = predicted(runs, name, tmp_path)
    total, count = loss_of(lines, model)
    # with 8-bit weights batches of other lengths are multiplied in other ways, which bfloat16 rounds differently
    assert total / count == pytest.approx(loss, rel=2e-3 if name in ("bf16", "narrow") else 1e-4)
    assert scalars(runs[0] / name, f"{model_loss(model)} validation")[step] == pytest.approx(loss)
    of_each = metrics["columns"].values() if name == "labels" else [metrics]
    right = sum(part["accuracy"] * part["num_sequences"] for part in of_each)
    accuracy = scalars(runs[0] / name, "accuracy validation")[step]
    assert right / sum(part["num_sequences"] for part in of_each) == pytest.approx(accuracy)


def model_loss(model):
    return {"classification": "ce loss", "multilabel": "bce loss", "regression": "mse loss"}[model["head_task"]]


def test_weights_and_standardisation_are_those_of_the_training_data(runs):
    rows = make_rows(61)[NUM_VALIDATION:]
    classes = [row["label"] for row in rows]
    assert model_section(runs, "head")["head_weights"] == pytest.approx(
        [len(rows) / 2 / classes.count(name) for name in ("AT", "GC")]
    )
    rich = [row["rich"] for row in rows if row["rich"] != ""]
    numbers = model_section(runs, "numbers")
    assert numbers["head_target_mean"] == pytest.approx([np.mean([row["gc"] for row in rows]), np.mean(rich)])
    assert numbers["head_target_scale"] == pytest.approx([np.std([row["gc"] for row in rows]), np.std(rich)])
    assert model_section(runs, "labels")["head_weights"][1] == pytest.approx(rich.count(0) / rich.count(1))


def test_both_strands(runs, tmp_path):
    """The validation of a run with both strands saw each strand by itself; predictions are the mean of the two."""
    root, _, rows = runs
    turned = [row | {"sequence": reverse_complement(row["sequence"])} for row in rows]
    write_csv(root / "turned.csv", turned)
    model, (_, loss) = model_section(runs, "numbers"), best_of(runs, "numbers")
    forward, _ = predicted(runs, "numbers", tmp_path, both_strands=False)
    backward, _ = predicted(runs, "numbers", tmp_path, both_strands=False, source=root / "turned.csv")
    sums = [loss_of(lines, model) for lines in (forward, backward)]
    assert sum(total for total, _ in sums) / sum(count for _, count in sums) == pytest.approx(loss, rel=1e-4)
    both, metrics = predicted(runs, "numbers", tmp_path)
    for name in ("prediction_gc", "prediction_rich"):
        of_each = np.array([[float(line[name]) for line in lines] for lines in (forward, backward, both)])
        np.testing.assert_allclose(of_each[:2].mean(0), of_each[2], rtol=1e-5)
        assert np.abs(of_each[0] - of_each[1]).max() > 1e-3
    assert metrics["columns"]["gc"]["pearson"] > 0.9


def test_a_head_on_an_earlier_layer(runs):
    """Only the layers before it are there, and those are the backbone's."""
    model = model_section(runs, "numbers")
    assert model["num_layers"] == 2 and model["hybrid_override_pattern"] == "SD"


def test_the_head_alone_learns_what_composition_tells(runs):
    assert max(scalars(runs[0] / "head", "accuracy validation").items()) == (60, 1.0)


def test_a_resumed_run_equals_an_unbroken_one(runs):
    losses = {name: scalars(runs[0] / name, "ce loss") for name in ("whole", "halves")}
    assert list(losses["whole"]) == [1, 2, 3, 4]
    assert losses["whole"] == losses["halves"]
    assert best_of(runs, "whole") == best_of(runs, "halves")


def test_a_run_that_gets_no_better_ends_and_keeps_its_best(runs):
    folder = runs[0] / "stalls" / "checkpoints"
    evaluations = json.loads((folder / "evaluations.json").read_text())
    last, (best, lowest) = evaluations[-1][0], best_of(runs, "stalls")
    assert last < 40 and last == best + 2 * 2
    assert all(loss >= lowest for _, loss in evaluations)
    assert sorted(int(path.name[5:]) for path in folder.glob("iter_*")) == [best, last]


@pytest.mark.parametrize("name", ["whole", "stalls"])
def test_the_test_set_is_gone_through_once_at_the_end(runs, tmp_path, name):
    """All of it, though there are fewer validation data; also when the run ends early."""
    newest = max((runs[0] / name / "checkpoints").glob("iter_*"))
    folder = newest.relative_to(runs[0])
    _, metrics = predicted(runs, folder, tmp_path, source=runs[0] / "test.csv")
    ((step, accuracy),) = scalars(runs[0] / name, "accuracy test").items()
    assert metrics["num_sequences"] == 29 and step == int(newest.name[5:])
    assert metrics["accuracy"] == pytest.approx(accuracy)


def test_every_row_is_trained_on(runs):
    """Bridge leaves out what does not fill a micro-batch of all processes, the same rows in every pass."""
    from megatron.bridge.training.config import DatasetBuildContext

    from evo2_megatron.data.providers import LabelledSequencesProvider

    values = {"seq_length": 24, "task": "classification", "label_columns": ["label"], "classes": ["AT", "GC"]}
    provider = LabelledSequencesProvider(
        train_data=str(runs[0] / "test.csv"), sequence_column="sequence", samples_at_once=8, **values
    )
    train, _, _ = provider.build_datasets(DatasetBuildContext(0, 0, 0, None))
    known = [not train[place]["targets"].isnan().item() for place in range(len(train))]
    assert known == [True] * 29 + [False] * 3


@pytest.mark.parametrize(
    "number, message",
    [
        (0, "was trained with head_pooling mean, not last; choose another --result-dir"),
        (1, "was trained with num_layers 4, not 2; choose another --result-dir"),
        (2, "was trained with global_batch_size 6, not 12; choose another --result-dir"),
        (3, "'linear_qvk' matches no module with weights"),
        (4, "--seq-length 65 is more than the backbone's 64"),
        (5, "train.csv holds 48 samples, fewer than --micro-batch-size 50"),
        (6, "--embedding-layer 4: the model has 4 layers; choose -4 to 3"),
        (7, "label is 'GC'; it must be one of AT, CG"),
        (8, "has no sequence of class 'N'"),
        (9, "was trained with other sequences or labels than those of"),
        (10, "other_base.csv; give the same, or choose another --result-dir"),
        (11, "was trained with seq_length 24, not 20; choose another --result-dir"),
        (12, "--seed is 0; it must be from 1 to 4294967295"),
        (13, "was trained with parameters in float32, not bfloat16; resume with the --mixed-precision-recipe"),
        (14, "was trained with head_pooling mean, not last; choose another --result-dir"),
        (15, "--lora-dim is 8, but"),
        (16, "was trained with other sequences or labels than those of"),
        (17, "has 512 tokens, the model 256; leave --tokenizer-path out to use the checkpoint's"),
    ],
)
def test_runs_that_cannot_begin(runs, number, message):
    root, errors, _ = runs
    assert len(errors) == 18 and message in errors[number]
    assert not (root / "other").exists()


def test_a_named_iteration_wins_over_the_best(runs):
    from evo2_megatron.tasks.heads.predict_head import find_checkpoint

    folder, (best, _) = runs[0] / "stalls" / "checkpoints", best_of(runs, "stalls")
    newest = max(folder.glob("iter_*"))
    assert int(find_checkpoint(runs[0] / "stalls").name[5:]) == best == int(find_checkpoint(folder).name[5:])
    assert find_checkpoint(newest) == newest


def test_sequences_that_are_no_dna(tmp_path, caplog):
    train = tmp_path / "train.csv"
    train.write_text("sequence,label\nACGTN,a\nAUGC,b\n")
    options = HeadOptions(train_data=train, base_ckpt_dir=tmp_path, result_dir=tmp_path, micro_batch_size=1)
    train_head._read_data(options, SimpleNamespace(seq_length=64))
    assert f"1 of 2 sequences of {train} have letters that no DNA has; the first is 'U' in '2'" in caplog.text


def test_classes_that_look_like_labels_of_bases(tmp_path, caplog):
    train = tmp_path / "train.csv"
    options = HeadOptions(train_data=train, base_ckpt_dir=tmp_path, result_dir=tmp_path, micro_batch_size=1)
    for labels, told in ((("nnyyn", "yn"), True), (("nnyyn", "y"), False)):
        train.write_text("sequence,label\nACGTN,{}\nAC,{}\n".format(*labels))
        caplog.clear()
        train_head._read_data(options, SimpleNamespace(seq_length=64))
        assert ("if these are their labels, add --per-base" in caplog.text) is told


@pytest.mark.slow
def test_weights_of_more_labels_than_float32_counts():
    """float32, which the targets are, goes from 2^24 on in steps of 2 and more."""
    targets = np.zeros((20_000_000, 2), np.float32)
    targets[:18_000_000] = 1
    options, labels = SimpleNamespace(class_weights="balanced"), Labels(task="multilabel", columns=("a", "b"))
    weights = train_head._of_targets(targets, labels, options)["head_weights"]
    assert weights == pytest.approx([1 / 9] * 2, rel=1e-9)
