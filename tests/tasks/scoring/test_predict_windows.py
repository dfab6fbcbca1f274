# SPDX-License-Identifier: Apache-2.0
"""Records scored in windows: each base against its own context, and what must not change a byte."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pybigtools
import pytest
import torch
from pyarrow import parquet

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.data.nucleotides import reverse_complement

COMMAND = "from evo2_megatron.cli.predict import main; main()"
LENGTHS = (1, 2, 3, 7, 8, 11, 13, 14, 20, 29, 61)
RECORDS = {f"r{n}": "".join(random.Random(n).choices("ACGT", k=n)) for n in LENGTHS}
PER_TOKEN = {"log_probs": "per_token"}


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seq_length=512)


def write_fasta(path: Path, sequences: dict[str, str]) -> Path:
    path.write_text("".join(f">{name} x\n{bases}\n" for name, bases in sequences.items()))
    return path


@pytest.fixture(scope="module")
def fasta(tmp_path_factory) -> Path:
    return write_fasta(tmp_path_factory.mktemp("records") / "records.fa", RECORDS)


def run(fasta: Path, checkpoint: Path, out: Path, *, output=PER_TOKEN, formats=("tsv",), **settings) -> Path:
    from evo2_megatron.tasks.scoring.predict import predict
    from evo2_megatron.tasks.scoring.prediction_settings import Files, Output, Sequences

    files = Files(output_dir=out, formats=formats)
    predict(fasta, checkpoint, output=Output(**output), files=files, sequences=Sequences(**settings))
    return out


def rows(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def values(out: Path) -> dict[tuple[str, int], float]:
    """Name and place from 0 of each base to its value."""
    return {(name, int(position) - 1): float(value) for name, position, _, value in rows(out / "bases.tsv")}


@pytest.fixture(scope="module")
def by_context(checkpoint):
    """For sequences, each with numbers of bases before each base: its log-probability after these alone; slow."""
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.data.fasta_dataset import make_sample
    from evo2_megatron.runtime.distributed import process_groups
    from evo2_megatron.tasks.scoring.prediction_runner import Runner
    from evo2_megatron.tasks.scoring.prediction_settings import Output

    def compute(sequences: list[tuple[str, list[int]]], prepend_bos: bool) -> Iterator[list[float | None]]:
        with process_groups(ParallelConfig()):
            runner = Runner(
                load_model(checkpoint, parallel=ParallelConfig()).model, Output(**PER_TOKEN), precision="fp32"
            )
            for bases, contexts in sequences:
                slices = [bases[at - context : at + 1].encode() for at, context in enumerate(contexts)]
                samples = [make_sample(bases, 0, prepend_bos=prepend_bos) for bases in slices]
                found = runner(samples)["log_probs_seqs"]
                yield [
                    found[at, len(sample["tokens"]) - 2].item() if len(sample["tokens"]) > 1 else None
                    for at, sample in enumerate(samples)
                ]

    return compute


def contexts(num_bases: int, length: int, overlap: int) -> list[int]:
    """Bases before each base in the window that scores it."""
    start, found = 0, []
    for at in range(num_bases):
        while at >= start + length:
            start += length - overlap
        found.append(at - start)
    return found


@pytest.mark.parametrize(
    "length, overlap, prepend_bos",
    [(1, 0, True), (2, 1, False), (7, 0, True), (7, 1, False), (7, 6, True), (13, 12, False), (20, None, False)],
)
@pytest.mark.parametrize("both_strands", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_base_is_scored_after_its_own_context(
    fasta, checkpoint, by_context, tmp_path, monkeypatch, length, overlap, prepend_bos, both_strands
):
    monkeypatch.setattr("evo2_megatron.tasks.scoring.prediction_results._BLOCK_BASES", 9)
    settings = {"window_length": length, "window_overlap": overlap, "prepend_bos": prepend_bos}
    out = run(fasta, checkpoint, tmp_path / "out", both_strands=both_strands, max_batch_tokens=100, **settings)
    expected, totals, sequences = {}, {}, []
    for bases in RECORDS.values():
        before = contexts(len(bases), length, length // 2 if overlap is None else overlap)
        sequences += [(bases, before), (reverse_complement(bases), before)][: 1 + both_strands]
    each_strand = by_context(sequences, prepend_bos)
    for name in RECORDS:
        strands = [next(each_strand)]
        if both_strands:
            strands.append(next(each_strand)[::-1])
        totals[name] = sum(x for strand in strands for x in strand if x is not None) / len(strands)
        for at, found in enumerate(zip(*strands)):
            found = [x for x in found if x is not None]
            if found:
                expected[name, at] = sum(found) / len(found)
    assert list(each_strand) == []
    found = values(out)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4, atol=1e-4)
    scores = rows(out / "scores.tsv")
    assert [(row[0], int(row[1]), int(row[2])) for row in scores] == [
        (name, len(bases), len(bases) - (not prepend_bos)) for name, bases in RECORDS.items()
    ]
    assert [float(row[3]) for row in scores] == pytest.approx(list(totals.values()), rel=1e-4, abs=1e-4)
    sums = run(fasta, checkpoint, tmp_path / "sum", output={"log_probs": "sum"}, both_strands=both_strands, **settings)
    assert [float(row[3]) for row in rows(sums / "scores.tsv")] == pytest.approx(
        list(totals.values()), rel=1e-4, abs=1e-4
    )


@pytest.mark.parametrize("both_strands", [False, True])
@pytest.mark.parametrize("prepend_bos", [False, True])
def test_a_window_that_holds_every_record_changes_no_byte(checkpoint, tmp_path, both_strands, prepend_bos):
    fasta = write_fasta(tmp_path / "x.fa", RECORDS | {"tag": "|d__Bacteria;|" + RECORDS["r29"].lower()})
    settings = {"formats": ("tsv", "parquet"), "both_strands": both_strands, "prepend_bos": prepend_bos}
    whole = run(fasta, checkpoint, tmp_path / "whole", **settings)
    windows = run(fasta, checkpoint, tmp_path / "windows", window_length=61, window_overlap=60, **settings)
    assert contents(whole).keys() == contents(windows).keys()
    for name, content in contents(whole).items():
        assert content == contents(windows)[name] or name == "manifest.json", name


def test_a_tag_in_front_is_the_same_on_both_strands(checkpoint, tmp_path):
    tag, bases = "|d__Bacteria;|", RECORDS["r29"]
    both = values(
        run(write_fasta(tmp_path / "a.fa", {"x": tag + bases}), checkpoint, tmp_path / "a", both_strands=True)
    )
    strands = []
    for sequence in (bases, reverse_complement(bases)):
        found = values(run(write_fasta(tmp_path / "b.fa", {"x": tag + sequence}), checkpoint, tmp_path / "b"))
        strands.append([found[key] for key in sorted(found)])
    n = len(tag) - 1
    expected = [*strands[0][:n], *((a + b) / 2 for a, b in zip(strands[0][n:], strands[1][n:][::-1]))]
    assert [both[key] for key in sorted(both)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prepend_bos", [False, True])
def test_entropy_of_the_prediction_of_each_base(fasta, checkpoint, tmp_path, prepend_bos):
    """Against logits of the slices that windows are, on both strands."""
    output = PER_TOKEN | {"base_values": ("entropy", "log_prob")}
    settings = {"prepend_bos": prepend_bos, "window_length": 7, "window_overlap": 3}
    formats = ("tsv", "parquet", "bedgraph", "bigwig")
    out = run(fasta, checkpoint, tmp_path / "out", output=output, formats=formats, both_strands=True, **settings)
    strands = {"+": RECORDS, "-": {name: reverse_complement(bases) for name, bases in RECORDS.items()}}
    slices, terms = {}, {}
    for strand, records in strands.items():
        for name, bases in records.items():
            for at, context in enumerate(contexts(len(bases), 7, 3)):
                if context or prepend_bos:  # an A that is predicted stands for all: its own id does not matter
                    slices[f"{name}{strand}{at}"] = bases[at - context : at] + "A"
    write_fasta(tmp_path / "slices.fa", slices)
    logits = run(
        tmp_path / "slices.fa", checkpoint, tmp_path / "logits", output={"log_probs": None}, formats=("pt",),
        prepend_bos=prepend_bos,
    )  # fmt: skip
    stored = torch.load(logits / "predictions__rank_0__dp_rank_0.pt", weights_only=True)
    for (key, text), row in zip(slices.items(), stored["token_logits"].double()):
        name, strand, at = re.fullmatch(r"(r\d+)([+-])(\d+)", key).groups()
        place = int(at) if strand == "+" else len(RECORDS[name]) - 1 - int(at)
        log_prob = row[len(text) - 2 + prepend_bos].log_softmax(-1)
        terms.setdefault((name, place), []).append(-(log_prob.exp() * log_prob).sum().item())
    text = rows(out / "bases.tsv")
    assert (out / "bases.tsv").read_text().startswith("id\tposition\tbase\tentropy\tlog_prob\n")
    found = {(name, int(position) - 1): float(value) for name, position, _, value, _ in text}
    assert found.keys() == terms.keys()
    assert [found[key] for key in terms] == pytest.approx([sum(x) / len(x) for x in terms.values()], rel=1e-5)
    table = parquet.read_table(out / "bases.parquet").to_pydict()
    for number, column in ((3, "entropy"), (4, "log_prob")):
        expected = [(row[0], int(row[1]) - 1, int(row[1]), np.float32(row[number])) for row in text]
        assert [np.float32(x) for x in table[column]] == [x for *_, x in expected]
        lines = rows(out / f"{column}.bedgraph")
        assert [(name, int(a), int(b), np.float32(x)) for name, a, b, x in lines] == expected
        with pybigtools.open(str(out / f"{column}.bigwig")) as track:
            tracks = [(name, *record) for name in track.chroms() for record in track.records(name)]
        assert sorted((*place, np.float32(x)) for *place, x in tracks) == sorted(expected)
    alone = run(fasta, checkpoint, tmp_path / "alone", output=PER_TOKEN, both_strands=True, **settings)
    assert rows(alone / "bases.tsv") == [[*row[:3], row[4]] for row in text]


def test_entropy_in_tensor_files(fasta, checkpoint, tmp_path):
    output = PER_TOKEN | {"base_values": ("entropy",)}
    out = run(fasta, checkpoint, tmp_path / "out", output=output, formats=("pt", "tsv"))
    stored = torch.load(out / "predictions__rank_0__dp_rank_0.pt", weights_only=True)
    assert stored.keys() == {"log_probs_seqs", "entropy_seqs", "loss_mask", "seq_idx"}
    expected = [float(row[3]) for row in rows(out / "bases.tsv")]
    assert stored["entropy_seqs"][stored["loss_mask"]].tolist() == pytest.approx(expected, rel=1e-6)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def intervals_of_bedgraph(path: Path) -> Iterator[tuple[str, int, int, float]]:
    header, *lines = path.read_text().splitlines()
    assert header == 'track type=bedGraph name="log_prob"'
    for line in lines:
        name, start, end, value = line.split("\t")
        yield name, int(start), int(end), float(value)


@pytest.mark.parametrize("window_length", [None, 9])
@pytest.mark.parametrize("block", [4, 1 << 16])
def test_formats_hold_the_same(fasta, checkpoint, tmp_path, window_length, block, monkeypatch):
    monkeypatch.setattr("evo2_megatron.tasks.scoring.prediction_results._BLOCK_BASES", block)
    formats = ("bigwig", "bedgraph", "tsv", "parquet")
    out = run(fasta, checkpoint, tmp_path / "out", formats=formats, window_length=window_length, both_strands=True)
    text = rows(out / "bases.tsv")
    assert [row[2] for row in text] == [RECORDS[row[0]][int(row[1]) - 1] for row in text]
    expected = [(name, int(end) - 1, int(end), np.float32(value)) for name, end, _, value in text]
    assert len(expected) == sum(LENGTHS) - 1  # of the record of one base, no strand has a value
    assert [(*place, np.float32(x)) for *place, x in intervals_of_bedgraph(out / "log_prob.bedgraph")] == expected
    table = parquet.read_table(out / "bases.parquet").to_pydict()
    assert list(zip(table["id"], table["position"], map(np.float32, table["log_prob"]))) == [
        (name, end, x) for name, _, end, x in expected
    ]
    with pybigtools.open(str(out / "log_prob.bigwig")) as track:
        expected_chroms = {name: len(RECORDS[name]) for name in sorted(RECORDS) if name != "r1"}
        assert list(track.chroms().items()) == list(expected_chroms.items())
        found = [(name, *record) for name in track.chroms() for record in track.records(name)]
        low, high = min(x for *_, x in expected), max(x for *_, x in expected)
        summary = track.info()["summary"]
        assert (summary["basesCovered"], summary["min"], summary["max"]) == (len(expected), low, high)
    assert sorted((*place, np.float32(x)) for *place, x in found) == sorted(expected)


@pytest.fixture(scope="module")
def long_records(tmp_path_factory) -> Path:
    chance = random.Random(5)
    sequences = {f"c{i}": "".join(chance.choices("ACGT", k=n)) for i, n in enumerate((5000, 3001, 2, 700, 64))}
    return write_fasta(tmp_path_factory.mktemp("long") / "long.fa", sequences)


FLAGS = """
--output-log-prob-seqs --log-prob-collapse-option per_token --both-strands --window-length 64 --window-overlap 40
--max-batch-tokens 1024 --per-base-values log_prob entropy --output-format tsv parquet bedgraph bigwig
"""


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on(long_records, checkpoint, tmp_path):
    files = ["--fasta", str(long_records), "--ckpt-dir", str(checkpoint), "--output-dir"]
    command, environment = (
        [sys.executable, "-c", COMMAND, *FLAGS.split(), *files],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    job = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stderr=subprocess.DEVNULL)
    parts = tmp_path / "killed" / ".parts"
    while len(list(parts.glob("batch_*.pt"))) < 4:
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert 4 <= len(list(parts.glob("batch_*.pt"))) < 40 and not list((tmp_path / "killed").glob("bases.*"))
    again = subprocess.run(
        [*command, str(tmp_path / "killed")], check=True, env=environment, capture_output=True, text=True
    )
    assert "Going on with the run that was cut off" in again.stderr and " windows/s" in again.stderr
    # and two processes, which share the windows of a record
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    subprocess.run([*launcher, *command, str(tmp_path / "two")], check=True, env=environment, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    whole = contents(tmp_path / "whole")
    assert whole.keys() == {
        "bases.parquet", "bases.tsv", "entropy.bedgraph", "entropy.bigwig",
        "log_prob.bedgraph", "log_prob.bigwig", "manifest.json", "scores.parquet",
        "scores.tsv", "seq_idx_map.json",
    }  # fmt: skip
    for folder in ("killed", "two"):
        found = contents(tmp_path / folder)
        assert found.keys() == whole.keys() and [name for name in whole if whole[name] != found[name]] == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"window_overlap": 3}, "--window-overlap says how windows overlap; add --window-length"),
        ({"window_length": 8, "window_overlap": 8}, "leaves no base to score in windows of 8; give at most 7"),
        ({"window_length": 8, "window_overlap": 0}, "give --window-overlap of at least 1, or --prepend-bos"),
        ({"window_length": 1}, "windows of 1 bases that overlap by 0"),
        ({"window_length": 513}, "--window-length 513 is more than the 512 bases .* with --max-seq-length"),
        ({"window_length": 512, "prepend_bos": True}, "--window-length 512 is more than the 511 bases"),
        ({"window_length": 8, "mask_phylogenetic_tags": True}, "leave it or --window-length out"),
        ({"window_length": 8, "formats": ("pt",)}, "log-probabilities of windows are not written as .* pt; choose"),
        ({"both_strands": True, "formats": ("pt",)}, "of bases on both strands are not written as .* pt; choose"),
        (
            {"window_length": 8, "output": {"log_probs": None}, "formats": ("npz",)},
            "--window-length is about log-prob",
        ),
        (
            {"window_length": 8, "output": {"log_probs": None}, "formats": ("tsv",)},
            "--window-length is about log-prob",
        ),
        ({"max_seq_length": 2}, "more than the 2 positions .*; score it in windows with --window-length, or accept"),
        (
            {"output": {"log_probs": "sum", "base_values": ("entropy",)}},
            "--per-base-values says what there is for each",
        ),
        ({"output": {"log_probs": "sum"}, "formats": ("bedgraph",)}, "has a value for each base; add --log-prob-coll"),
    ],
)
def test_what_is_refused(fasta, checkpoint, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(fasta, checkpoint, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_longer_window_on_request(fasta, checkpoint, tmp_path):
    out = run(fasta, checkpoint, tmp_path / "out", window_length=600, max_seq_length=600)
    assert len(rows(out / "scores.tsv")) == len(RECORDS)
