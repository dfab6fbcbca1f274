# SPDX-License-Identifier: Apache-2.0
"""The studies as they are run, on a checkpoint of a random model."""

from __future__ import annotations

import csv
import importlib
import runpy
from pathlib import Path

import numpy as np
import pytest

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from helpers import STUDIES

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPTS = (
    "mutational_scan", "gradient_scan", "essentiality", "needle", "dependency_map", "exon_classifier", "probe",
    "sparse_autoencoder",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def study(monkeypatch, checkpoint, tmp_path):
    """Run a script with flags; its tables and pictures, with the lines of the former."""
    monkeypatch.syspath_prepend(STUDIES)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    contigs = ["".join(rng.choice(list("ACGT"), 1200)) for _ in range(2)]
    Path("g.fa").write_text("".join(f">c{n}\n{bases}\n" for n, bases in enumerate(contigs)))
    Path("g.bed").write_text("c0\t20\t80\ta\t0\t+\nc0\t100\t400\tb\t0\t-\nc1\t100\t900\ta2\t0\t+\n")
    line = 'c{}\tx\texon\t{}\t{}\t.\t+\t.\tgene_id "g{}"; transcript_id "t{}"; exon_number "{}";\n'
    Path("g.gtf").write_text(
        "".join(line.format(c, 300 * e + 1, 300 * e + 99, c, c, e + 1) for c in (0, 1) for e in (0, 1))
    )
    Path("labels").write_text("a\t1\nb\t0\n")

    def run(name: str, *flags: str) -> dict[str, list[list[str]]]:
        flags = ("--ckpt-dir", str(checkpoint), "--output-dir", f"out_{name}", *flags)
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, flags)])
        runpy.run_path(str(STUDIES / f"{name}.py"), run_name="__main__")
        files = sorted(Path(f"out_{name}").iterdir())
        return {
            path.name: list(csv.reader(path.read_text().splitlines(), delimiter="\t")) if path.suffix == ".tsv" else []
            for path in files
        }

    return run


def test_scan(study):
    files = study("mutational_scan", "--fasta", "g.fa", "--contig", "c0", "--start", 20, "--end", 80, "--context", 50)
    assert list(files) == ["mutational_scan.png", "mutational_scan.tsv", "mutational_scan_classes.tsv"]
    assert len(files["mutational_scan.tsv"]) == 1 + 3 * (60 + 30 + 20)
    deltas = [float(row[-1]) for row in files["mutational_scan.tsv"][1:]]
    assert len(set(deltas)) > 300


def test_essentiality(study, capsys):
    files = study("essentiality", "--fasta", "g.fa", "--genes", "g.bed", "--window", 200, "--labels", "labels")
    assert list(files) == ["essentiality.png", "essentiality.tsv"] and len(files["essentiality.tsv"]) == 4
    assert "AUROC" in capsys.readouterr().out
    deltas = [float(row[6]) for row in files["essentiality.tsv"][1:]]
    assert deltas == sorted(deltas)


def test_gradient_scan(study, capsys):
    where = ("--fasta", "g.fa", "--contig", "c0", "--start", 20, "--end", 80, "--context", 50)
    files = study("gradient_scan", *where, "--check", 30)
    assert list(files) == ["gradient_scan.png", "gradient_scan.tsv", "gradient_scan_check.tsv"]
    assert len(files["gradient_scan.tsv"]) == 1 + 3 * 60 and len(files["gradient_scan_check.tsv"]) == 31
    told = {tuple(row[1:4]): float(row[4]) for row in files["gradient_scan.tsv"][1:]}
    checked = files["gradient_scan_check.tsv"][1:]
    assert all(told[tuple(row[1:4])] == float(row[4]) for row in checked)
    first_order, exact = np.array([row[4:] for row in checked], float).T
    pearson = float(capsys.readouterr().out.split("Pearson ")[1].split()[0])
    assert pearson == pytest.approx(np.corrcoef(first_order, exact)[0, 1], abs=1e-4) and pearson > 0.3


def test_gradients_are_those_of_a_small_step(study, checkpoint):
    """The log-likelihood where the embedding goes a thousandth of the way from a base to another."""
    import torch

    harness = importlib.import_module("harness")
    sequence, step = np.random.default_rng(4).choice(list(b"ACGT"), 60).astype(np.uint8).tobytes(), 1e-3
    ids_L = torch.tensor(list(sequence))
    with harness.open_model(checkpoint, longest=60) as model, torch.no_grad():
        own_L4, behind_L4 = model.first_order(sequence)
        distributions = model.distributions([sequence])[0]
        inner = model._loaded.model
        table_VH = inner.embedding.word_embeddings.weight

        def log_likelihood(at: int, base: int, share: float) -> float:
            towards = share * (table_VH[base] - table_VH[sequence[at]])
            hook = inner.embedding.word_embeddings.register_forward_hook(
                lambda module, ids, embedded: embedded.index_add(1, torch.tensor([at]), towards[None, None])
            )
            log_probs_LV = inner(ids_L[None], None, None)[0].double().log_softmax(-1)
            hook.remove()
            return log_probs_LV[:-1].gather(1, ids_L[1:, None]).sum().item()

        for at, base in ((0, b"A"), (7, b"G"), (30, b"C"), (58, b"T"), (59, b"A")):
            difference = (log_likelihood(at, base[0], step) - log_likelihood(at, base[0], -step)) / (2 * step)
            column = b"ACGT".index(base)
            assert behind_L4[at, column] == pytest.approx(difference, rel=0.02, abs=2e-3)
    letters = [b"ACGT".index(base) for base in sequence]
    differences = distributions - distributions[range(60), letters][:, None]
    np.testing.assert_allclose(own_L4[1:], differences[1:], atol=1e-4)
    assert not own_L4[0].any() and not own_L4[range(60), letters].any() and not behind_L4[59].any()


@pytest.mark.parametrize("measure", ["likelihood", "jacobian"])
def test_needle(study, measure):
    flags = ("--lengths", 96, 128, "--depths", 0, 1, "--needle-length", 20, "--repeats", 2, "--measure", measure)
    files = study("needle", *flags)
    assert list(files) == ["needle.png", "needle.tsv"] and len(files["needle.tsv"]) == 5
    assert all(np.isfinite([float(cell) for cell in row]).all() for row in files["needle.tsv"][1:])


def test_dependency_map(study):
    flags = ("--fasta", "g.fa", "--contig", "c1", "--start", 3, "--end", 73, "--context", 20)
    files = study("dependency_map", *flags)
    assert list(files) == ["dependency_map.png", "dependency_map.tsv"]
    rows = files["dependency_map.tsv"][1:]
    assert len(rows) == 70 * 69 and all(float(row[-1]) > 0 for row in rows)


def test_exon_classifier(study, capsys):
    flags = ("--fasta", "g.fa", "--gtf", "g.gtf", "--layer", 1, "--test-contigs", "c1", "--window", 200)
    files = study("exon_classifier", *flags)
    assert list(files) == ["exon_classifier.png", "exon_classifier.tsv", "exon_classifier_roc.tsv"]
    assert files["exon_classifier.tsv"][-1][:3] == ["all", "399", "198"]
    assert "AUROC" in capsys.readouterr().out


def test_sparse_autoencoder(study):
    flags = ("--fasta", "g.fa", "--layer", 0, "--features", "g.bed", "--window", 100, "--num-latents", 64, "--k", 4)
    files = study("sparse_autoencoder", *flags, "--steps", 20)
    names = ["sparse_autoencoder" + end for end in (".png", ".safetensors", ".tsv", "_features.tsv")]
    assert list(files) == names
    assert files["sparse_autoencoder.tsv"][1][0] == "500"  # a fifth of 24 windows of 100 bases, rounded up
    assert {row[0] for row in files["sparse_autoencoder_features.tsv"][1:]} <= {"a", "b", "a2"}


def test_numbers_are_those_of_predict(study, checkpoint, tmp_path):
    """Whatever the batches, and with windows of different lengths."""
    from evo2_megatron.tasks.scoring.predict import predict
    from evo2_megatron.tasks.scoring.prediction_settings import Files, Output

    harness = importlib.import_module("harness")
    rng = np.random.default_rng(3)
    sequences = ["".join(rng.choice(list("ACGT"), n)).encode() for n in (1, 40, 250, 39, 100)]
    with harness.open_model(checkpoint, longest=250, max_batch_tokens=300) as model:
        scores, log_probs = model.log_likelihoods(sequences), model.log_probs(sequences)
        rows = model.distributions(sequences)
    with harness.open_model(checkpoint, longest=250, layers=[-3], max_batch_tokens=300) as model:
        hidden = model.embed(sequences)
    Path("s.fa").write_text("".join(f">{n}\n{s.decode()}\n" for n, s in enumerate(sequences)))
    predict(
        Path("s.fa"),
        checkpoint,
        output=Output(log_probs="sum"),
        files=Files(output_dir=tmp_path / "p", formats=("tsv",)),
    )
    predict(
        Path("s.fa"),
        checkpoint,
        output=Output(embedding_layers=(1,)),
        files=Files(output_dir=tmp_path / "h", formats=("npz",)),
    )

    with (tmp_path / "p" / "scores.tsv").open() as stream:
        wanted = [float(row["log_likelihood"]) for row in csv.DictReader(stream, delimiter="\t")]
    np.testing.assert_allclose(scores, wanted, rtol=1e-4)
    np.testing.assert_allclose([values.sum() for values in log_probs], wanted, rtol=1e-4)
    assert [len(values) for values in log_probs] == [len(values) for values in rows] == [len(s) for s in sequences]
    for values, of_bases, sequence in zip(log_probs, rows, sequences):
        np.testing.assert_allclose(np.exp(of_bases).sum(-1), 1, rtol=1e-4)
        picked = of_bases[range(len(sequence)), [b"ACGT".index(base) for base in sequence]]
        assert (picked[1:] >= values[1:] - 1e-4).all()  # of four letters, not of all tokens
    with np.load(next((tmp_path / "h").glob("*.npz"))) as arrays:
        for number, states in enumerate(hidden):
            np.testing.assert_allclose(states, arrays[f"{number}/embedding"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("needle", ("--lengths", 300), "sequences of 300 bases are longer than the 256 positions"),
        ("needle", ("--lengths", 30), "--lengths 30 has no room for two needles of 100"),
        ("needle", ("--depths", 2), "--depths 2.0: give numbers from 0"),
        ("dependency_map", ("--fasta", "g.fa", "--contig", "c0", "--start", 5, "--end", 6), "give two bases or more"),
        (
            "dependency_map",
            ("--fasta", "g.fa", "--contig", "c0", "--start", 5, "--end", 50, "--context", 250),
            "sequences of 295 bases are longer than the 256 positions",
        ),
        ("essentiality", ("--fasta", "g.fa", "--genes", "g.gtf", "--insert", "TAX"), "--insert TAX: give bases"),
        ("essentiality", ("--fasta", "no.fa", "--genes", "g.bed"), "no such FASTA file: no.fa"),
        (
            "exon_classifier",
            ("--fasta", "g.fa", "--gtf", "g.gtf", "--layer", 9, "--test-contigs", "c1", "--window", 200),
            "Invalid embedding_layer 9",
        ),
        ("exon_classifier", ("--fasta", "g.fa", "--gtf", "g.gtf", "--layer", 1, "--test-contigs", "x"), "contig 'x'"),
        (
            "sparse_autoencoder",
            ("--fasta", "g.fa", "--layer", 1, "--k", 9, "--num-latents", 9),
            "--k 9 of",
        ),
        ("sparse_autoencoder", ("--fasta", "g.fa", "--layer", 1, "--features", "no"), "no such BED file: no"),
    ],
)
def test_bad_input_is_one_line(study, capsys, name, flags, message):
    with pytest.raises(SystemExit) as ended:
        study(name, *flags)
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{name}.py: error: ") and message in error
    assert list(Path(f"out_{name}").iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_command_line_is_one_line(monkeypatch, capsys, name):
    monkeypatch.syspath_prepend(STUDIES)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).build_parser().parse_args(["--ckpt-dir"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}.py: error: ") and line.endswith("--help lists the flags")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_does_not_load_torch(monkeypatch, name):
    import subprocess
    import sys

    code = f"import sys; sys.path.insert(0, {str(STUDIES)!r}); import {name}; {name}.build_parser().format_help()"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"])
    assert done.returncode == 0
