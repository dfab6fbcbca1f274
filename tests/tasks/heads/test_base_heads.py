# SPDX-License-Identifier: Apache-2.0
"""Heads that tell something of each base, from tables to predictions."""

from __future__ import annotations

import csv
import json
import math
import random
import re

import numpy as np
import pytest
import torch
from pyarrow import parquet

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import UserError
from processes import launch
from tasks.heads.head_runs import give_output, model_section, predicted, scalars, train_all, write_csv

pytestmark = pytest.mark.slow

NUM_VALIDATION, WINDOW = 13, 16


def make_rows(count):
    """Sequences and what is told of their bases; only what follows a base tells whether the next one is an A."""
    rng, rows = random.Random(0), []
    for _ in range(count):
        bases = "".join(rng.choices("ACGT", k=rng.randint(9, 40)))
        following = "".join("ny"[base == "A"] for base in bases[1:]) + "."
        strong = " ".join(str(int(base in "GC")) for base in bases)
        depth = " ".join("nan" if i % 5 == 4 else f"{10 * (base in 'GC') + 0.1 * i:g}" for i, base in enumerate(bases))
        rows.append({"sequence": bases, "next": following, "strong": strong, "depth": depth})
    return rows


@pytest.fixture(scope="module")
def runs(megatron, tmp_path_factory):
    """Folder of several runs, and the errors of those that could not begin."""
    root = tmp_path_factory.mktemp("base_heads")
    rows = make_rows(150)
    swapped = [dict(row) for row in rows[NUM_VALIDATION:]]
    swapped[0]["depth"] = swapped[0]["depth"].replace("10", "9", 1)
    common = {
        "train_data": write_csv(root / "train.csv", rows[NUM_VALIDATION:]),
        "val_data": write_csv(root / "val.csv", rows[:NUM_VALIDATION]),
        "base_ckpt_dir": str(write_tiny_checkpoint(root / "base", seq_length=64).parent),
        "result_dir": str(root),
        "per_base": True,
        "max_steps": 60,
        "eval_interval": 30,
        "log_interval": 1,
        "lr": 5e-3,
        "head_hidden_size": 16,
    }
    following = common | {"label_columns": ["next"]}
    sides = following | {"both_strands": True}
    lora = common | {"task": "regression", "label_columns": ["depth", "strong"], "both_strands": True}
    lora |= {"max_steps": 4, "eval_interval": 2, "lora_finetune": True, "lora_dim": 4, "decay_steps": 4}
    errors = train_all(
        [
            following | {"experiment_name": "one"},
            sides | {"experiment_name": "both", "class_weights": "balanced"},
            sides | {"experiment_name": "windows", "seq_length": WINDOW, "quantize_weights": "int8"},
            lora | {"experiment_name": "whole"},
            lora | {"experiment_name": "halves", "max_steps": 2},
            lora | {"experiment_name": "halves"},
            lora | {"experiment_name": "halves", "max_steps": 6, "both_strands": False},
            lora
            | {"experiment_name": "halves", "max_steps": 6, "decay_steps": 6}
            | {"train_data": write_csv(root / "swapped.csv", swapped)},
            sides | {"experiment_name": "other", "pooling": "last"},
            sides | {"experiment_name": "other", "label_columns": ["depth"], "task": "multilabel"},
            sides | {"experiment_name": "other", "per_base": False},
            common | {"experiment_name": "labels", "task": "multilabel", "label_columns": ["strong"], "max_steps": 2},
        ]
    )
    return root, errors


def best_loss(runs, name):
    evaluations = json.loads((runs[0] / name / "checkpoints" / "evaluations.json").read_text())
    return min(loss for _, loss in evaluations)


def losses(lines, model):
    """Of each label that is known, by the definition."""
    for line in lines:
        if model["head_task"] == "classification" and line["true_next"]:
            weight = (model["head_weights"] or [1, 1])[model["head_outputs"].index(line["true_next"])]
            yield -weight * math.log(float(line[f"probability_{line['true_next']}"]))
        elif model["head_task"] == "multilabel":
            p = float(line["probability_strong"])
            yield -math.log(p if line["true_strong"] == "1" else 1 - p)
        elif model["head_task"] == "regression":
            for number, name in enumerate(model["head_outputs"]):
                if line[f"true_{name}"]:
                    error = float(line[f"prediction_{name}"]) - float(line[f"true_{name}"])
                    yield (error / model["head_target_scale"][number]) ** 2


@pytest.mark.parametrize("name", ["one", "both", "windows", "whole", "labels"])
def test_what_is_loaded_is_what_was_trained(runs, tmp_path, name):
    """The best validation's loss again, from the files that the run left, base by base."""
    lines, metrics = predicted(runs, name, tmp_path)
    found = list(losses(lines, model_section(runs, name)))
    assert np.mean(found) == pytest.approx(best_loss(runs, name), rel=1e-4)
    assert len(lines) == sum(len(row["sequence"]) for row in make_rows(150)[:NUM_VALIDATION])
    counts = [part["num_bases"] for part in metrics["columns"].values()] if name == "whole" else [metrics["num_bases"]]
    assert sum(counts) == len(found)


def test_only_both_strands_tell_what_follows(runs, tmp_path):
    aurocs = {name: predicted(runs, name, tmp_path)[1]["auroc"] for name in ("one", "both", "windows")}
    assert 0.35 < aurocs["one"] < 0.65 and aurocs["both"] > 0.9 and aurocs["windows"] > 0.9


def test_weights_and_standardisation_are_those_of_the_bases(runs):
    rows = make_rows(150)[NUM_VALIDATION:]
    following = "".join(row["next"] for row in rows).replace(".", "")
    weights = [len(following) / 2 / following.count(name) for name in "ny"]
    assert model_section(runs, "both")["head_weights"] == pytest.approx(weights)
    depth = np.array(" ".join(row["depth"] for row in rows).split(), float)
    assert model_section(runs, "whole")["head_target_mean"][0] == pytest.approx(np.nanmean(depth), rel=1e-5)
    assert model_section(runs, "whole")["head_target_scale"][0] == pytest.approx(np.nanstd(depth), rel=1e-5)


def test_a_resumed_run_equals_an_unbroken_one(runs):
    of_each = [scalars(runs[0] / name, "mse loss") for name in ("whole", "halves")]
    assert list(of_each[0]) == [1, 2, 3, 4] and of_each[0] == of_each[1]


_TWO_COPIES = """
import json, sys
from pathlib import Path
from evo2_megatron.runtime.megatron import enter_training
from processes import fork

def run(given):
    from evo2_megatron.recipes.head_options import HeadOptions
    from evo2_megatron.tasks.heads.train_head import train_head

    options = {key: Path(value) if key.endswith(("_data", "_dir")) else value for key, value in given.items()}
    train_head(HeadOptions(**options, label_columns=("next",)))

if __name__ == "__main__":
    enter_training()
    for given in json.loads(sys.argv[1]):
        fork(2, run, given)
"""


def test_copies_go_on_with_the_dropout_of_an_unbroken_run(megatron, tmp_path):
    """They draw for the bases of their own batches, which are not as many."""
    given = {
        "train_data": write_csv(tmp_path / "train.csv", make_rows(40)),
        "base_ckpt_dir": str(write_tiny_checkpoint(tmp_path / "base", seq_length=64).parent),
        "result_dir": str(tmp_path),
        "per_base": True,
        "micro_batch_size": 1,
        "decay_steps": 4,
        "warmup_steps": 1,
        "log_interval": 1,
        "head_dropout": 0.5,
    }
    script = tmp_path / "two_copies.py"
    script.write_text(_TWO_COPIES)
    of_runs = [{"experiment_name": n, "max_steps": k} for n, k in (("unbroken", 4), ("broken", 2), ("broken", 4))]
    launch(script, json.dumps([given | of_run for of_run in of_runs]))
    of_each = [scalars(tmp_path / name, "ce loss") for name in ("unbroken", "broken")]
    assert list(of_each[0]) == [1, 2, 3, 4] and of_each[0] == of_each[1]


def test_lines_of_a_file(runs, tmp_path):
    lines, _ = predicted(runs, "both", tmp_path, id_column="name")
    rows = make_rows(150)[:NUM_VALIDATION]
    assert list(lines[0]) == ["id", "position", "base", "true_next", "prediction", "probability_n", "probability_y"]
    assert "".join(line["base"] for line in lines) == "".join(row["sequence"] for row in rows)
    assert "".join(line["true_next"] or "." for line in lines) == "".join(row["next"] for row in rows)
    expected = [(f"s{n}", str(i)) for n, row in enumerate(rows) for i in range(1, len(row["sequence"]) + 1)]
    assert [(line["id"], line["position"]) for line in lines] == expected
    assert all(line["prediction"] == max("ny", key=lambda c: float(line[f"probability_{c}"])) for line in lines)


def test_parquet_and_tsv_hold_the_same(runs, tmp_path, monkeypatch):
    """Also if the file is written in parts."""
    from evo2_megatron.tasks.heads import head_tables
    from evo2_megatron.tasks.heads.predict_head import predict_head

    lines, _ = predicted(runs, "whole", tmp_path)
    monkeypatch.setattr(head_tables, "_BASES_AT_ONCE", 50)
    in_parts, _ = predicted(runs, "whole", tmp_path)
    predict_head(runs[0] / "val.csv", runs[0] / "whole", tmp_path / "p.parquet")
    table = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert lines == in_parts and parquet.ParquetFile(tmp_path / "p.parquet").num_row_groups > 3
    for line, row in zip(lines, table, strict=True):
        for name, value in row.items():
            got = line[name]
            assert got == ("" if value is None else str(value)) or np.float32(got) == np.float32(value), name


def test_processes_share_outputs_a_part_at_a_time(runs, tmp_path, monkeypatch):
    """Those of a whole genome would not fit on a GPU."""
    from evo2_megatron.tasks.heads import head_runner

    lines, _ = predicted(runs, "whole", tmp_path)
    monkeypatch.setattr(head_runner, "_SHARED_AT_ONCE", 50)
    shared, reduce = [], torch.distributed.all_reduce

    def recorded(tensor, *given, **named):
        if tensor.ndim == 2:  # those of loading have other shapes
            shared.append(len(tensor))
        return reduce(tensor, *given, **named)

    monkeypatch.setattr(torch.distributed, "all_reduce", recorded)
    in_parts, _ = predicted(runs, "whole", tmp_path)
    assert lines == in_parts and max(shared) == 50 and sum(shared) == len(lines)


def test_a_prediction_does_not_depend_on_its_batch(runs, tmp_path):
    alone, _ = predicted(runs, "both", tmp_path, max_batch_tokens=1)
    together, _ = predicted(runs, "both", tmp_path)
    for line, other in zip(alone, together, strict=True):
        assert float(line["probability_y"]) == pytest.approx(float(other["probability_y"]), rel=1e-4)


def test_long_sequences_are_windows_that_overlap_by_half(runs, tmp_path):
    """What stands for a base is what its window by itself gives it: the one that has most context on both sides."""
    before = after = WINDOW // 4
    bases = "".join(random.Random(1).choices("ACGT", k=45))
    starts = range(0, len(bases) - WINDOW // 2, WINDOW // 2)
    windows = [bases[start : start + WINDOW] for start in starts]
    fasta = tmp_path / "long.fa"
    fasta.write_text(f">long\n{bases.lower()}\n" + "".join(f">w{n}\n{w}\n" for n, w in enumerate(windows)))
    lines, metrics = predicted(runs, "windows", tmp_path, source=fasta)
    assert metrics == {} and not any(column.startswith("true") for column in lines[0])
    of = {}
    for line in lines:
        of.setdefault(line["id"], []).append(float(line["probability_y"]))
    for place, got in enumerate(of["long"]):
        (number,) = (
            n
            for n, start in enumerate(starts)
            if (start == 0 or place >= start + before)
            and (n == len(starts) - 1 or place < start + len(windows[n]) - after)
        )
        assert got == pytest.approx(of[f"w{number}"][place - starts[number]], rel=1e-4)


def test_outputs_that_are_not_finite(runs, tmp_path, monkeypatch):
    give_output(monkeypatch, math.nan)
    with pytest.raises(UserError, match="sequence 's2': the model's output is not finite"):
        predicted(runs, "both", tmp_path, id_column="name")
    assert not (tmp_path / "predictions.tsv").exists()


def test_strands_are_those_of_training(runs, tmp_path):
    for name, asked, does in (("both", False, "both strands"), ("one", True, "one strand")):
        with pytest.raises(UserError, match=f"sees {does} of a base; leave out"):
            predicted(runs, name, tmp_path, both_strands=asked)
    predicted(runs, "both", tmp_path, both_strands=True)


@pytest.mark.parametrize(
    "number, message",
    [
        (0, "was trained with head_both_sides True, not False; choose another --result-dir"),
        (1, "was trained with other sequences or labels than those of .*swapped.csv; give the same"),
        (2, "--pooling makes one vector of a sequence, and --per-base tells its bases apart; leave out one"),
        (3, r"train.csv, row 1, base \d+: depth is '.*'; it must be 0 or 1"),
        (4, r"val.csv, row 1: next is '[ny]+\.'; it must be one of"),
    ],
)
def test_runs_that_cannot_begin(runs, number, message):
    root, errors = runs
    assert len(errors) == 5 and re.search(message, errors[number])
    assert not (root / "other").exists()


def test_a_table_without_labels(runs, tmp_path):
    source = tmp_path / "bases.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([["sequence"], ["ACGT"], ["GG"]])
    lines, metrics = predicted(runs, "both", tmp_path, source=source)
    assert metrics == {} and len(lines) == 6 and "true_next" not in lines[0]


@pytest.mark.parametrize("kind", ["bedgraph", "bigwig"])
def test_tracks_for_genome_browsers(runs, tmp_path, monkeypatch, kind):
    """Also if a sequence is written in parts."""
    import pybigtools

    from evo2_megatron.tasks.heads import head_tracks

    monkeypatch.setattr(head_tracks, "_BASES_AT_ONCE", 7)
    lines, _ = predicted(runs, "whole", tmp_path, id_column="name", tracks=kind)
    names = {f"predictions.prediction_{name}.{kind}" for name in ("depth", "strong")}
    tables = {"predictions.tsv", "predictions.tsv.manifest.json"}
    assert {path.name for path in tmp_path.iterdir()} == names | tables
    path = tmp_path / f"predictions.prediction_depth.{kind}"
    if kind == "bedgraph":
        got = [line.split("\t") for line in path.read_text().splitlines()[1:]]
        wanted = [
            [line["id"], str(int(line["position"]) - 1), line["position"], line["prediction_depth"]] for line in lines
        ]
        assert got == wanted
        return
    named = tmp_path / "x.bw"  # the library goes by the end of the name
    named.symlink_to(path)
    track = pybigtools.open(str(named))
    for name, length in track.chroms().items():
        of_name = [float(line["prediction_depth"]) for line in lines if line["id"] == name]
        assert len(of_name) == length
        np.testing.assert_allclose(track.values(name, 0, length, fillna=None), of_name, rtol=1e-6)
    assert len(track.chroms()) == NUM_VALIDATION


def test_tracks_that_cannot_be(runs, tmp_path):
    source = tmp_path / "bases.csv"
    source.write_text("sequence,name\nACGT,a\nGG,a\nT,b c\n")
    with pytest.raises(UserError, match="--tracks: 'a' names several sequences, or has spaces; give each a name"):
        predicted(runs, "both", tmp_path, source=source, id_column="name", tracks="bedgraph")
    source.write_text("sequence,name\nT,b c\n")
    with pytest.raises(UserError, match="--tracks: 'b c' names several"):
        predicted(runs, "both", tmp_path, source=source, id_column="name", tracks="bigwig")
    source.write_text("sequence,name\nT,a/b\n")
    predicted(runs, "both", tmp_path, source=source, id_column="name", tracks="bedgraph")
    assert (tmp_path / "predictions.probability_y.bedgraph").read_text().splitlines()[1].startswith("a/b\t0\t1\t")
