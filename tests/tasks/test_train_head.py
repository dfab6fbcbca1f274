# SPDX-License-Identifier: Apache-2.0
"""Prediction heads: that what is saved is what was trained, what is refused, and what predictions depend on."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
import yaml

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.data.nucleotides import reverse_complement
from tasks.head_runs import scalars, train_all

LENGTH = 24
NUM_VALIDATION = 13  # no multiple of the batch


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["name", *rows[0]])
        writer.writeheader()
        writer.writerows({"name": f"s{number}", **row} for number, row in enumerate(rows))
    return str(path)


def make_rows(count):
    """Unequal lengths, and classes that differ in what they are made of."""
    rng, rows = random.Random(0), []
    for number in range(count):
        label = int(number % 3 > 0)
        weights = ([5, 1, 1, 5], [1, 5, 5, 1])[label]
        bases = "".join(rng.choices("ACGT", weights=weights, k=rng.randint(9, LENGTH)))
        gc = sum(map(bases.count, "GC")) / len(bases)
        row = {"sequence": bases, "label": ("AT", "GC")[label], "gc": 100 * gc, "starts": int(bases[0] in "AC")}
        rows.append(row | {"rich": "" if number % 4 == 0 else int(gc > 0.5)})
    return rows


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
    lora = common | {"lora_finetune": True, "lora_dim": 4, "lora_alpha": 8}
    halves = lora | {"experiment_name": "halves", "decay_steps": 4}
    numbers = {"task": "regression", "label_columns": ["gc", "rich"]}
    long = {"max_steps": 60, "eval_interval": 20}
    errors = train_all(
        [
            lora | {"experiment_name": "whole"},
            halves | {"max_steps": 2},
            halves,
            halves | {"max_steps": 6, "decay_steps": 6, "pooling": "last"},
            halves | {"max_steps": 6, "decay_steps": 6, "embedding_layer": 1},
            lora | {"experiment_name": "other", "lora_target_modules": ["dense", "linear_qvk"]},
            lora | {"experiment_name": "other", "seq_length": 65},
            lora | {"experiment_name": "other", "micro_batch_size": 50, "global_batch_size": 50},
            lora | {"experiment_name": "other", "embedding_layer": 4},
            lora | {"experiment_name": "other", "classes": ["AT", "CG"]},
            lora | {"experiment_name": "other", "classes": ["AT", "GC", "N"], "class_weights": "balanced"},
            lora | {"experiment_name": "bf16", "precision": "bf16_mixed", "recompute": True},
            common | long | {"experiment_name": "head", "class_weights": "balanced"},
            common | long | numbers | {"experiment_name": "numbers", "embedding_layer": -3, "both_strands": True},
            lora
            | {"experiment_name": "labels", "task": "multilabel", "label_columns": ["starts", "rich"]}
            | {"class_weights": "balanced", "head_hidden_size": 0, "pooling": "last"},
            # the learning rate is far too high: the first validation stays the best
            lora | {"experiment_name": "stalls", "max_steps": 40, "lr": 1.0, "patience": 2, "warmup_steps": 4},
            lora | {"experiment_name": "stalls", "max_steps": 40, "lr": 1.0, "patience": 2, "warmup_steps": 4},
        ]
    )
    return root, errors, rows[:NUM_VALIDATION]


def predicted(runs, name, tmp_path, **options):
    from evo2_megatron.tasks.predict_head import predict_head

    source = options.pop("source", runs[0] / "val.csv")
    target = tmp_path / "predictions.tsv"
    metrics = predict_head(source, runs[0] / name, target, **options)
    with target.open() as file:
        return list(csv.DictReader(file, delimiter="\t")), metrics


def model_section(runs, name):
    (path, *_) = sorted((runs[0] / name / "checkpoints").glob("iter_*/run_config.yaml"))
    return yaml.safe_load(path.read_text())["model"]


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


@pytest.mark.parametrize("name", ["whole", "head", "bf16", "labels"])
def test_what_is_loaded_is_what_was_trained(runs, tmp_path, name):
    """The best validation's loss and accuracy again, from the files that the run left."""
    model, (step, loss) = model_section(runs, name), best_of(runs, name)
    lines, metrics = predicted(runs, name, tmp_path)
    total, count = loss_of(lines, model)
    assert total / count == pytest.approx(loss, rel=2e-3 if name == "bf16" else 1e-4)
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


@pytest.mark.parametrize(
    "number, message",
    [
        (0, "was trained with head_pooling mean, not last; choose another --result-dir"),
        (1, "was trained with num_layers 4, not 2; choose another --result-dir"),
        (2, "'linear_qvk' matches no module with weights"),
        (3, "--seq-length 65 is more than the backbone's 64"),
        (4, "train.csv holds 48 samples, fewer than --micro-batch-size 50"),
        (5, "--embedding-layer 4: the model has 4 layers; choose -4 to 3"),
        (6, "label is 'GC'; it must be one of AT, CG"),
        (7, "has no row of class 'N'"),
    ],
)
def test_runs_that_cannot_begin(runs, number, message):
    root, errors, _ = runs
    assert len(errors) == 8 and message in errors[number]
    assert not (root / "other").exists()


# prediction


def test_a_prediction_does_not_depend_on_its_batch(runs, tmp_path):
    alone, _ = predicted(runs, "whole", tmp_path, max_batch_tokens=1)
    together, _ = predicted(runs, "whole", tmp_path)
    for line, other in zip(alone, together, strict=True):
        assert float(line["probability_AT"]) == pytest.approx(float(other["probability_AT"]), rel=1e-5)


def test_adapters_have_a_say(runs, tmp_path):
    """With another backbone, to which they do not belong, the scores are others."""
    other = write_tiny_checkpoint(tmp_path / "other", seq_length=64, seed=2)
    own, _ = predicted(runs, "whole", tmp_path)
    foreign, _ = predicted(runs, "whole", tmp_path, base_ckpt_dir=other)
    assert abs(float(own[0]["probability_AT"]) - float(foreign[0]["probability_AT"])) > 1e-4


def test_fasta_and_its_manifest(runs, tmp_path):
    table, _ = predicted(runs, "whole", tmp_path, id_column="name")
    fasta = tmp_path / "val.fa"
    fasta.write_text("".join(f">{name} x\n{row['sequence'].lower()}\n" for name, row in zip("abcdefghijklm", runs[2])))
    lines, metrics = predicted(runs, "whole", tmp_path, source=fasta)
    assert metrics == {} and list(lines[0]) == ["id", "length", "prediction", "probability_AT", "probability_GC"]
    assert [line["id"] for line in lines] == list("abcdefghijklm") and table[3]["id"] == "s3"
    assert [line["probability_AT"] for line in lines] == [line["probability_AT"] for line in table]
    manifest = json.loads((tmp_path / "predictions.manifest.json").read_text())
    assert manifest["metrics"] == {} and manifest["precision"] == "fp32"
    assert not list(tmp_path.glob(".*"))


def test_long_sequences_are_cut_as_in_training(runs, tmp_path, caplog):
    bases = runs[2][0]["sequence"]
    fasta = tmp_path / "long.fa"
    fasta.write_text(f">short\n{bases:A<24}\n>long\n{bases:A<24}CCCC\n")
    with caplog.at_level("WARNING"):
        lines, _ = predicted(runs, "whole", tmp_path, source=fasta)
    assert "1 sequences are cut to the 24 bases" in caplog.text
    assert lines[0]["length"] == "24" and lines[1]["length"] == "28"
    assert float(lines[0]["probability_AT"]) == pytest.approx(float(lines[1]["probability_AT"]), rel=1e-5)


def test_parquet_and_csv_hold_the_same(runs, tmp_path):
    from pyarrow import parquet

    from evo2_megatron.tasks.predict_head import predict_head

    for suffix in (".parquet", ".csv"):
        predict_head(runs[0] / "val.csv", runs[0] / "labels", tmp_path / f"p{suffix}")
    table = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    with (tmp_path / "p.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(table[0])
    for line, row in zip(lines, table, strict=True):
        for name, value in row.items():
            got = line[name]
            assert got == ("" if value is None else str(value)) or np.float32(got) == np.float32(value), name


def test_a_named_iteration_wins_over_the_best(runs):
    from evo2_megatron.tasks.predict_head import find_checkpoint

    folder, (best, _) = runs[0] / "stalls" / "checkpoints", best_of(runs, "stalls")
    newest = max(folder.glob("iter_*"))
    assert int(find_checkpoint(runs[0] / "stalls").name[5:]) == best == int(find_checkpoint(folder).name[5:])
    assert find_checkpoint(newest) == newest


def test_memory_that_runs_out(runs, tmp_path, monkeypatch, caplog):
    """A batch that does not fit is run in halves, and the results are the same."""
    from evo2_megatron.tasks import predict_head

    before, _ = predicted(runs, "whole", tmp_path)
    run = predict_head._HeadRunner.__call__

    def short(self, items):
        if len(items) > 3:
            raise torch.OutOfMemoryError
        return run(self, items)

    monkeypatch.setattr(predict_head._HeadRunner, "__call__", short)
    after, _ = predicted(runs, "whole", tmp_path)
    assert "going on with batches half as large" in caplog.text
    for line, other in zip(before, after, strict=True):
        assert float(line["probability_AT"]) == pytest.approx(float(other["probability_AT"]), rel=1e-5)

    def never(self, items):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(predict_head._HeadRunner, "__call__", never)
    with pytest.raises(UserError, match=r"not enough memory for 1 sequence\(s\) of up to \d+ tokens; give shorter"):
        predicted(runs, "whole", tmp_path)


def test_what_cannot_be_predicted(runs, tmp_path):
    from evo2_megatron.tasks.predict_head import predict_head

    with pytest.raises(UserError, match="has no prediction head; train one with evo2_train_head"):
        predict_head(runs[0] / "val.csv", runs[0] / "base", tmp_path / "p.tsv")
    with pytest.raises(UserError, match="the suffix says what is written; give one of .tsv, .csv, .parquet"):
        predict_head(runs[0] / "val.csv", runs[0] / "whole", tmp_path / "p.txt")
    fasta = tmp_path / "a.fa"
    fasta.write_text(">a\nACGT\n")
    with pytest.raises(UserError, match="--id-column is about tables"):
        predict_head(fasta, runs[0] / "whole", tmp_path / "p.tsv", id_column="name")
    with pytest.raises(UserError, match="has no column 'bases'"):
        predict_head(runs[0] / "val.csv", runs[0] / "whole", tmp_path / "p.tsv", sequence_column="bases")
    assert not (tmp_path / "p.tsv").exists()


def test_language_model_commands_refuse_a_head(runs, tmp_path):
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.runtime.distributed import process_groups
    from evo2_megatron.tasks.generation_model import find_checkpoint
    from evo2_megatron.tasks.merge_lora import merge_lora
    from evo2_megatron.tasks.predict import predict
    from evo2_megatron.tasks.prediction_settings import Files, Output

    with (
        process_groups(ParallelConfig()),
        pytest.raises(UserError, match="holds a prediction head.*evo2_predict_head"),
    ):
        load_model(runs[0] / "whole", parallel=ParallelConfig())
    # and before they look at anything else
    for refusing in (
        lambda head: merge_lora(head, tmp_path / "merged"),
        lambda head: predict(tmp_path / "none.fa", head, output=Output(), files=Files(output_dir=tmp_path / "out")),
        find_checkpoint,
    ):
        with pytest.raises(UserError, match="holds a prediction head"):
            refusing(runs[0] / "whole")


def test_a_damaged_description(runs, tmp_path):
    from evo2_megatron.tasks.predict_head import predict_head

    folder = shutil.copytree(max((runs[0] / "whole" / "checkpoints").glob("iter_*")), tmp_path / "iter_0000004")
    sections = yaml.safe_load((folder / "run_config.yaml").read_text())
    del sections["dataset"]["classes"]
    (folder / "run_config.yaml").write_text(yaml.safe_dump(sections))
    with pytest.raises(UserError, match="section 'dataset' does not say what was learnt; it is damaged"):
        predict_head(runs[0] / "val.csv", folder, tmp_path / "p.tsv")
