# SPDX-License-Identifier: Apache-2.0
"""What must not change a result: batch mates, padding, order, pieces, processes, and a job that was killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import UserError
from evo2_megatron.data.nucleotides import reverse_complement

COMMAND = "from evo2_megatron.cli.predict import main; main()"


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seq_length=8192)


def dna(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("ACGT", k=length))


def write_fasta(path: Path, sequences: dict[str, str]) -> Path:
    path.write_text("".join(f">{name}\n{bases}\n" for name, bases in sequences.items()))
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """200 sequences of 1 to 5,000 bases, most of them short."""
    chance = random.Random(1)
    lengths = [1, 2, 5000, *(int(2 ** chance.uniform(0, 12.28)) for _ in range(197))]
    sequences = {f"s{i}": dna(length, i) for i, length in enumerate(lengths)}
    return write_fasta(tmp_path_factory.mktemp("many") / "many.fa", sequences)


def run(
    fasta: Path, checkpoint: Path, out: Path, *, output=None, formats=("tsv",), precision=None, **settings
) -> Path:
    from evo2_megatron.tasks.scoring.predict import predict
    from evo2_megatron.tasks.scoring.prediction_settings import Files, Output, Sequences

    predict(
        fasta,
        checkpoint,
        output=Output(**(output or {"log_probs": "sum"})),
        files=Files(output_dir=out, formats=formats),
        sequences=Sequences(**settings),
        precision=precision,
    )
    return out


def scores(out: Path) -> dict[str, float]:
    rows = [line.split("\t") for line in (out / "scores.tsv").read_text().splitlines()[1:]]
    return {row[0]: float(row[3]) for row in rows}


def same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5, abs=1e-4)


@pytest.fixture(scope="module")
def alone(many, checkpoint, tmp_path_factory) -> dict[str, float]:
    """Every sequence by itself, unpadded, in one piece."""
    return scores(run(many, checkpoint, tmp_path_factory.mktemp("alone") / "out", micro_batch_size=1))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_batch_tokens": 700},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"micro_batch_size": 7, "min_length": 200}, marks=pytest.mark.slow),
        pytest.param({"chunk_length": 1000}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_batches_change_nothing(many, checkpoint, alone, tmp_path, settings):
    same(scores(run(many, checkpoint, tmp_path / "out", **settings)), alone)


@pytest.mark.slow
def test_order_changes_nothing(many, checkpoint, alone, tmp_path):
    records = many.read_text().split(">")[1:]
    random.Random(2).shuffle(records)
    shuffled = tmp_path / "shuffled.fa"
    shuffled.write_text("".join(">" + record for record in records))
    found = scores(run(shuffled, checkpoint, tmp_path / "out"))
    assert list(found) == [record.split("\n")[0] for record in records]
    same({name: found[name] for name in alone}, alone)


@pytest.mark.slow
def test_two_processes_change_nothing(many, checkpoint, alone, tmp_path):
    flags = ["--output-log-prob-seqs", "--output-format", "tsv"]
    arguments = ["--fasta", many, "--ckpt-dir", checkpoint, "--output-dir", tmp_path / "out", *flags]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--no-python", sys.executable, "-c", COMMAND, *map(str, arguments)]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    same(scores(tmp_path / "out"), alone)


@pytest.mark.parametrize("length", [300, pytest.param(2101, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunk_length", [1, 7, 64, 1000])
def test_pieces_change_nothing(checkpoint, tmp_path, length, chunk_length):
    if chunk_length == 1 and length > 300:
        length = 500
    fasta = write_fasta(tmp_path / "one.fa", {"a": dna(length, 3), "b": dna(length // 2, 4)})
    of_bases = {"output": {"log_probs": "per_token"}, "formats": ("parquet",)}
    whole = run(fasta, checkpoint, tmp_path / "whole", **of_bases)
    pieces = run(fasta, checkpoint, tmp_path / "pieces", chunk_length=chunk_length, **of_bases)
    one, other = (parquet.read_table(out / "bases.parquet").to_pydict() for out in (whole, pieces))
    assert one["position"] == other["position"] and len(one["position"]) == length + length // 2 - 2
    np.testing.assert_allclose(other["log_prob"], one["log_prob"], rtol=1e-4, atol=1e-4)
    one, other = (parquet.read_table(out / "scores.parquet")["log_likelihood"].to_pylist() for out in (whole, pieces))
    assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("pooling", [None, "mean", "last", (5, 90)])
@pytest.mark.parametrize("prepend_bos", [False, True])
def test_layers_and_pooling(checkpoint, tmp_path, pooling, prepend_bos):
    """Several layers in one pass are those of single passes; pooled, they are what numpy makes of them."""
    from evo2_megatron.tasks.scoring.prediction_settings import Window

    fasta = write_fasta(tmp_path / "x.fa", {"long": dna(150, 5), "short": dna(90, 6)})
    settings = {"prepend_bos": prepend_bos, "chunk_length": 64}
    per_base = [
        np.load(run(fasta, checkpoint, tmp_path / f"layer{layer}", output={"embedding_layers": (layer,)},
                    formats=("npz",), prepend_bos=prepend_bos) / "embeddings.npz")
        for layer in (0, 2, 3)
    ]  # fmt: skip
    window = Window(*pooling) if isinstance(pooling, tuple) else pooling
    output = {"embedding_layers": (-1, 0, 2), "pooling": window}
    found = run(
        fasta, checkpoint, tmp_path / "out", output=output, formats=("npz", "parquet", "safetensors"), **settings
    )
    with np.load(found / "embeddings.npz") as together:
        for row, name in enumerate(("long", "short")):
            for layer, single in zip((0, 2, 3), per_base):
                values = single[f"{name}/embedding"]
                assert values.shape == (150 if name == "long" else 90, 128)
                if pooling is None:
                    got, expected = together[f"{name}/layer_{layer}"], values
                else:
                    got = together[f"layer_{layer}"][row]
                    kept = {"mean": values, "last": values[-1:]}.get(pooling)
                    expected = (values[4:90] if kept is None else kept).mean(0)
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    table = parquet.read_table(found / ("bases.parquet" if pooling is None else "embeddings.parquet"))
    assert table.column_names[-3:] == ["layer_0", "layer_2", "layer_3"]
    assert len(table) == (240 if pooling is None else 2)
    assert (found / "embeddings.safetensors").is_file()


@pytest.mark.parametrize("short, masked", [(dna(90, 6), False), ("|d__Bacteria;|" + dna(90, 6), True)])
def test_a_window_that_no_sequence_reaches(checkpoint, tmp_path, short, masked):
    """What is masked is no base: the mean over nothing would be a vector of zeros."""
    from evo2_megatron.tasks.scoring.prediction_settings import Window

    fasta = write_fasta(tmp_path / "x.fa", {"long": dna(150, 5), "short": short})
    with pytest.raises(UserError, match="'short' has 90 bases, fewer than the 91 that --pooling-window reaches to"):
        output = {"embedding_layers": (0,), "pooling": Window(91, 91)}
        run(fasta, checkpoint, tmp_path / "out", output=output, formats=("npz",), mask_phylogenetic_tags=masked)


def test_both_strands(checkpoint, tmp_path):
    sequences = {"a": dna(100, 1), "b": dna(333, 2), "tagged": "|d__Bacteria;|" + dna(50, 3)}
    start = len("|d__Bacteria;|")
    opposite = {"a": reverse_complement(sequences["a"]), "b": reverse_complement(sequences["b"])}
    opposite["tagged"] = sequences["tagged"][:start] + reverse_complement(sequences["tagged"][start:])
    fasta = write_fasta(tmp_path / "one.fa", sequences)
    both = scores(run(fasta, checkpoint, tmp_path / "both", both_strands=True))
    singles = [
        scores(run(write_fasta(tmp_path / "single.fa", strand), checkpoint, tmp_path / "single"))
        for strand in (sequences, opposite)
    ]
    same(both, {name: (singles[0][name] + singles[1][name]) / 2 for name in both})
    with pytest.raises(UserError, match="use it with --pooling mean, or with"):
        run(fasta, checkpoint, tmp_path / "out", output={"log_probs": None}, formats=("npz",), both_strands=True)
    tag_inside = write_fasta(tmp_path / "inside.fa", {"x": "ACGT|d__Bacteria;|ACGT"})
    with pytest.raises(UserError, match="record 'x' of .* has a lineage tag after its first base"):
        run(tag_inside, checkpoint, tmp_path / "out", both_strands=True)


def test_positions_of_bases(checkpoint, tmp_path):
    fasta = write_fasta(tmp_path / "x.fa", {"a": "ACGTacgtN"})
    for prepend_bos, first in ((False, 2), (True, 1)):
        out = run(fasta, checkpoint, tmp_path / "out", output={"log_probs": "per_token"}, prepend_bos=prepend_bos)
        rows = [line.split("\t") for line in (out / "bases.tsv").read_text().splitlines()[1:]]
        assert [int(row[1]) for row in rows] == list(range(first, 10))
        assert "".join(row[2] for row in rows) == "ACGTacgtN"[first - 1 :]
        total = scores(out)["a"]
        assert sum(float(row[3]) for row in rows) == pytest.approx(total, rel=1e-5)


def test_logits_as_arrays(checkpoint, tmp_path):
    fasta = write_fasta(tmp_path / "x.fa", {"a": dna(20, 1), "b": dna(31, 2)})
    out = run(fasta, checkpoint, tmp_path / "out", output={"log_probs": None}, formats=("npz", "pt"))
    stored = torch.load(out / "predictions__rank_0__dp_rank_0.pt", weights_only=True)
    with np.load(out / "logits.npz") as arrays:
        assert arrays["a"].shape == (20, 512) and arrays["b"].shape == (31, 512)
        assert np.array_equal(arrays["a"], stored["token_logits"][0, :20].numpy())


@pytest.mark.parametrize(
    "output, formats, message",
    [
        ({"log_probs": None}, ("tsv",), "logits are not written as --output-format tsv; choose from pt, npz"),
        ({"log_probs": "sum"}, ("pt", "npz"), "log-probabilities are not written as --output-format npz"),
        ({"embedding_layers": (1,)}, ("tsv",), "embeddings are not written as --output-format tsv"),
    ],
)
def test_formats_that_do_not_fit(checkpoint, tmp_path, output, formats, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "x.fa", checkpoint, tmp_path / "out", output=output, formats=formats)


def test_manifest(checkpoint, tmp_path):
    import hashlib

    fasta = write_fasta(tmp_path / "x.fa", {"a": dna(20, 1)})
    out = run(fasta, checkpoint, tmp_path / "out", prepend_bos=True)
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["settings"]["sequences"]["prepend_bos"] and facts["precision"] == "fp32"
    assert facts["settings"]["fasta_sha256"] == hashlib.sha256(fasta.read_bytes()).hexdigest()
    assert facts["versions"]["torch"] == torch.__version__ and facts["device"].startswith("CPU")
    listed = "find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"
    digest = subprocess.run(["bash", "-c", listed], cwd=checkpoint, capture_output=True, text=True, check=True).stdout
    assert facts["checkpoint"]["sha256"] == digest.split()[0]


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("interval", ["epoch", "batch"])
def test_a_job_that_was_killed_goes_on(checkpoint, tmp_path, interval):
    """Kill it without warning after a few batches: the rerun leaves those alone, and ends with the same bytes."""
    fasta = write_fasta(tmp_path / "x.fa", {f"s{i}": dna(500 + i, i) for i in range(90)})
    flags = ["--output-log-prob-seqs", "--max-batch-tokens", "1800", "--write-interval", interval]
    flags += ["--output-format", "pt", "parquet", "tsv", "--fasta", str(fasta), "--ckpt-dir", str(checkpoint)]
    command = [sys.executable, "-c", COMMAND, *flags, "--output-dir"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment, capture_output=True)
    parts = tmp_path / "killed" / ".parts"
    job = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment, stderr=subprocess.DEVNULL)
    while len(list(parts.glob("batch_*.pt"))) < 4:
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    done = {path.name: path.stat().st_mtime_ns for path in parts.glob("batch_*.pt")}
    assert 4 <= len(done) < 25 and not (tmp_path / "killed" / "scores.tsv").exists()
    again = subprocess.run(
        [*command, str(tmp_path / "killed")], check=True, env=environment, capture_output=True, text=True
    )
    assert "Going on with the run that was cut off" in again.stderr
    predicted = int(again.stderr.split("Predicted ")[-1].split(" sequences, ")[0])
    assert 0 < predicted < 90
    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert whole.keys() == killed.keys() and not parts.exists()
    assert [name for name in whole if whole[name] != killed[name]] == []


@pytest.mark.parametrize("changed", ["sequences", "versions", "precision"])
def test_parts_of_another_run_are_not_used(checkpoint, tmp_path, monkeypatch, caplog, changed):
    from evo2_megatron.tasks.scoring.predict import Results

    fasta = write_fasta(tmp_path / "x.fa", {"a": dna(200, 1), "b": dna(100, 2)})
    with monkeypatch.context() as patch:
        patch.setattr(Results, "write", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(fasta, checkpoint, tmp_path / "out", micro_batch_size=1)
    assert len(list((tmp_path / "out" / ".parts").glob("batch_*.pt"))) == 2
    if changed == "sequences":
        write_fasta(fasta, {"a": dna(200, 7), "b": dna(100, 2)})
    elif changed == "versions":
        monkeypatch.setattr(torch, "__version__", "2.14.0")
    precision = "bf16_mixed" if changed == "precision" else None
    with caplog.at_level("INFO"):
        found = scores(run(fasta, checkpoint, tmp_path / "out", micro_batch_size=1, precision=precision))
    assert "is of a run with other settings; starting over" in caplog.text
    assert found == scores(run(fasta, checkpoint, tmp_path / "fresh", micro_batch_size=1, precision=precision))


@pytest.mark.slow
def test_memory_that_really_runs_out(many, checkpoint, alone, tmp_path):
    """A process that may have so much address space finds out that batches are too large, and goes on with smaller."""
    flags = ["--output-log-prob-seqs", "--output-format", "tsv", "--max-batch-tokens", "400000"]
    code = f"""
import resource
from evo2_megatron.tasks.scoring import batching, predict
upstream = predict.Backoff.__init__
def limit(self, *args, **settings):
    upstream(self, *args, **settings)
    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, resource.RLIM_INFINITY))
predict.Backoff.__init__ = limit
{COMMAND}"""
    command = [sys.executable, "-c", code, *flags, "--fasta", many, "--ckpt-dir", checkpoint, "--output-dir", tmp_path]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "Not enough memory for" in done.stderr and "going on with batches half as large" in done.stderr
    same(scores(tmp_path), alone)
