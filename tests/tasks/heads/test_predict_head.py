# SPDX-License-Identifier: Apache-2.0
"""Predictions by a head: their files, what they depend on, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig, UserError
from tasks.heads.head_runs import NUM_VALIDATION, give_output, make_rows, predicted, train_all, write_csv


@pytest.fixture(scope="module")
def runs(megatron, tmp_path_factory):
    """Folder of two runs, and the validation data."""
    root = tmp_path_factory.mktemp("heads")
    rows = make_rows(61)
    common = {
        "train_data": write_csv(root / "train.csv", rows[NUM_VALIDATION:]),
        "base_ckpt_dir": str(write_tiny_checkpoint(root / "base", seq_length=64).parent),
        "result_dir": str(root),
        "max_steps": 2,
        "lora_finetune": True,
        "lora_dim": 4,
        "lr": 5e-3,
    }
    write_csv(root / "val.csv", rows[:NUM_VALIDATION])
    labels = {"task": "multilabel", "label_columns": ["starts", "rich"]}
    assert not train_all([common | {"experiment_name": "whole"}, common | labels | {"experiment_name": "labels"}])
    return root, rows[:NUM_VALIDATION]


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


def test_backbone_in_8_bits(runs, tmp_path):
    wide, _ = predicted(runs, "whole", tmp_path)
    narrow, _ = predicted(runs, "whole", tmp_path, quantize_weights="int8")
    assert json.loads((tmp_path / "predictions.tsv.manifest.json").read_text())["quantize_weights"] == "int8"
    for line, other in zip(narrow, wide, strict=True):
        difference = abs(float(line["probability_AT"]) - float(other["probability_AT"]))
        assert 0 < difference < 0.05


def test_fasta_and_its_manifest(runs, tmp_path):
    table, _ = predicted(runs, "whole", tmp_path, id_column="name")
    fasta = tmp_path / "val.fa"
    fasta.write_text("".join(f">{name} x\n{row['sequence'].lower()}\n" for name, row in zip("abcdefghijklm", runs[1])))
    lines, metrics = predicted(runs, "whole", tmp_path, source=fasta)
    assert metrics == {} and list(lines[0]) == ["id", "length", "prediction", "probability_AT", "probability_GC"]
    assert [line["id"] for line in lines] == list("abcdefghijklm") and table[3]["id"] == "s3"
    assert [line["probability_AT"] for line in lines] == [line["probability_AT"] for line in table]
    manifest = json.loads((tmp_path / "predictions.tsv.manifest.json").read_text())
    assert manifest["metrics"] == {} and manifest["precision"] == "fp32"
    assert not list(tmp_path.glob(".*"))


def test_sequences_that_are_no_dna(runs, tmp_path, caplog):
    fasta = tmp_path / "x.fa"
    fasta.write_text(">dna\nACGTN\n>protein\nMKLA\n")
    with caplog.at_level("WARNING"):
        predicted(runs, "whole", tmp_path, source=fasta)
    assert "1 of 2 sequences have letters that no DNA has; the first is 'L' in 'protein'" in caplog.text


def test_long_sequences_are_cut_as_in_training(runs, tmp_path, caplog):
    bases = runs[1][0]["sequence"]
    fasta = tmp_path / "long.fa"
    fasta.write_text(f">short\n{bases:A<24}\n>long\n{bases:A<24}CCCC\n")
    with caplog.at_level("WARNING"):
        lines, _ = predicted(runs, "whole", tmp_path, source=fasta)
    assert "1 sequences are cut to the 24 bases" in caplog.text
    assert lines[0]["length"] == "24" and lines[1]["length"] == "28"
    assert float(lines[0]["probability_AT"]) == pytest.approx(float(lines[1]["probability_AT"]), rel=1e-5)


def test_parquet_and_csv_hold_the_same(runs, tmp_path):
    from pyarrow import parquet

    from evo2_megatron.tasks.heads.predict_head import predict_head

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


def test_memory_that_runs_out(runs, tmp_path, monkeypatch, caplog):
    """A batch that does not fit is run in halves, and the results are the same."""
    from evo2_megatron.tasks.heads import head_runner

    before, _ = predicted(runs, "whole", tmp_path)
    run = head_runner._HeadRunner.__call__

    def short(self, items):
        if len(items) > 3:
            raise torch.OutOfMemoryError
        return run(self, items)

    monkeypatch.setattr(head_runner._HeadRunner, "__call__", short)
    after, _ = predicted(runs, "whole", tmp_path)
    assert "going on with batches half as large" in caplog.text
    for line, other in zip(before, after, strict=True):
        assert float(line["probability_AT"]) == pytest.approx(float(other["probability_AT"]), rel=1e-5)

    def never(self, items):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(head_runner._HeadRunner, "__call__", never)
    with pytest.raises(UserError, match=r"not enough memory for 1 sequence\(s\) of up to \d+ tokens, even in pieces"):
        predicted(runs, "whole", tmp_path)


def test_outputs_that_are_not_finite(runs, tmp_path, monkeypatch):
    give_output(monkeypatch, math.inf)
    with pytest.raises(UserError, match="sequence 's2': the model's output is not finite"):
        predicted(runs, "whole", tmp_path, id_column="name")
    assert not (tmp_path / "predictions.tsv").exists()


def test_what_cannot_be_predicted(runs, tmp_path):
    from evo2_megatron.tasks.heads.predict_head import predict_head

    with pytest.raises(UserError, match="has no prediction head; train one with evo2_train_head"):
        predict_head(runs[0] / "val.csv", runs[0] / "base", tmp_path / "p.tsv")
    with pytest.raises(UserError, match="the suffix says what is written; give one of .tsv, .csv, .parquet"):
        predict_head(runs[0] / "val.csv", runs[0] / "whole", tmp_path / "p.txt")
    fasta = tmp_path / "a.fa"
    fasta.write_text(">a\nACGT\n")
    empty = tmp_path / "empty.fa"
    empty.write_text(">a\nACGT\n>b\n")
    with pytest.raises(UserError, match="record 'b' of .* has no bases; remove it"):
        predict_head(empty, runs[0] / "whole", tmp_path / "p.tsv")
    table = Path(shutil.copy(runs[0] / "val.csv", tmp_path / "table.csv"))
    (tmp_path / "folder.tsv").mkdir()
    for target, message in (
        (table, "table.csv is an input"),
        (tmp_path / "folder.tsv", "is a folder; give the name of a file"),
        (table / "p.tsv", "is no folder that this user may write to"),
    ):
        with pytest.raises(UserError, match=message):
            predict_head(table, runs[0] / "whole", target)
    assert table.read_text() == (runs[0] / "val.csv").read_text()
    with pytest.raises(UserError, match="--id-column is about tables"):
        predict_head(fasta, runs[0] / "whole", tmp_path / "p.tsv", id_column="name")
    with pytest.raises(UserError, match="has no column 'bases'"):
        predict_head(runs[0] / "val.csv", runs[0] / "whole", tmp_path / "p.tsv", sequence_column="bases")
    assert not (tmp_path / "p.tsv").exists()


def test_language_model_commands_refuse_a_head(runs, tmp_path):
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.runtime.distributed import process_groups
    from evo2_megatron.tasks.conversion.calibrate_fp8 import calibrate_fp8
    from evo2_megatron.tasks.conversion.export import mbridge_to_vortex
    from evo2_megatron.tasks.conversion.merge_lora import merge_lora
    from evo2_megatron.tasks.generation.generation_model import find_checkpoint
    from evo2_megatron.tasks.scoring.predict import predict
    from evo2_megatron.tasks.scoring.prediction_settings import Files, Output

    with (
        process_groups(ParallelConfig()),
        pytest.raises(UserError, match="holds a prediction head.*evo2_predict_head"),
    ):
        load_model(runs[0] / "whole", parallel=ParallelConfig())
    # and before they look at anything else
    for refusing in (
        lambda head: merge_lora(head, tmp_path / "merged"),
        lambda head: mbridge_to_vortex(head, tmp_path / "vortex.pt"),
        lambda head: calibrate_fp8(tmp_path / "none.fa", head, tmp_path / "scaled"),
        lambda head: predicted(runs, "whole", tmp_path, base_ckpt_dir=head),
        lambda head: predict(tmp_path / "none.fa", head, output=Output(), files=Files(output_dir=tmp_path / "out")),
        find_checkpoint,
    ):
        with pytest.raises(UserError, match="holds a prediction head"):
            refusing(runs[0] / "whole")


def test_a_damaged_description(runs, tmp_path):
    from evo2_megatron.tasks.heads.predict_head import predict_head

    folder = shutil.copytree(max((runs[0] / "whole" / "checkpoints").glob("iter_*")), tmp_path / "iter_0000004")
    sections = yaml.safe_load((folder / "run_config.yaml").read_text())
    del sections["dataset"]["classes"]
    (folder / "run_config.yaml").write_text(yaml.safe_dump(sections))
    with pytest.raises(UserError, match="section 'dataset' does not say what was learnt; it is damaged"):
        predict_head(runs[0] / "val.csv", folder, tmp_path / "p.tsv")


def test_tracks_are_of_bases(runs, tmp_path):
    with pytest.raises(UserError, match="--tracks have a value for each base, and this head tells of whole sequences"):
        predicted(runs, "whole", tmp_path, tracks="bigwig")
