# SPDX-License-Identifier: Apache-2.0
"""The study that tries linear models on embeddings, with embeddings whose content is known, and with a model."""

from __future__ import annotations

import runpy

import numpy as np
import pytest

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import UserError
from evo2_megatron.data.labelled import Labelled
from evo2_megatron.data.labels import Labels
from evo2_megatron.data.nucleotides import reverse_complement
from helpers import STUDIES, read_tsv

CLASSES = Labels(task="classification", columns=("label",), classes=("no", "yes"))
NUMBERS = Labels(task="regression", columns=("label",))


def rows_of(targets: np.ndarray) -> Labelled:
    return Labelled([f"s{n}" for n in range(len(targets))], [], np.asarray(targets, np.float32)[:, None])


def test_finds_the_layer_that_knows(study, tmp_path):
    """Of numbers: the layer that holds them with noise; R2 is what the noise leaves."""
    probe, models = study("probe"), study("linear_models")
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((200, 12))
    targets = hidden @ rng.standard_normal(12) + 5
    candidates = [
        models.Candidate("-", "4-mers", rng.standard_normal((200, 12)).astype(np.float32)),
        models.Candidate("0", "mean", rng.standard_normal((200, 12)).astype(np.float32)),
        models.Candidate("1", "mean", (3 * hidden + 100).astype(np.float32)),
        models.Candidate("2", "mean", (hidden + rng.standard_normal(hidden.shape)).astype(np.float32)),
    ]
    rows = rows_of(targets)
    folds = models.nested_folds(NUMBERS, rows.targets[:, 0], None, 4, 1)

    results = probe.probe(candidates, NUMBERS, rows, folds, tmp_path)

    r2 = [result.means["r2"] for result in results]
    assert r2[0] < 0.1 and r2[1] < 0.1 and r2[2] > 0.999 and 0.3 < r2[3] < 0.7
    assert probe.best_of(results, "r2").layer == "1"
    found = read_tsv(tmp_path / "probe.tsv")
    assert [row["layer"] for row in found] == ["-", "0", "1", "2"] and float(found[2]["r2"]) == pytest.approx(r2[2])
    predicted = read_tsv(tmp_path / "probe_predictions.tsv")
    assert {row["fold"] for row in predicted} == set("1234") and [row["id"] for row in predicted] == rows.names
    np.testing.assert_allclose([float(row["prediction"]) for row in predicted], targets, atol=0.2)
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_nothing_is_known_where_nothing_is(study):
    """Many features and labels at random: what was fitted must not be what is measured."""
    models = study("linear_models")
    rng = np.random.default_rng(1)
    features, targets = rng.standard_normal((90, 60)).astype(np.float32), np.repeat([0, 1], 45).astype(np.float32)
    folds = models.nested_folds(CLASSES, targets, None, 3, 1)
    result = models.measure(models.Candidate("0", "mean", features), CLASSES, targets, folds)
    assert 0.3 < result.means["auroc"] < 0.7
    np.testing.assert_allclose(result.predictions.sum(1), 1, rtol=1e-6)
    features[:, :20] += 2 * targets[:, None]
    result = models.measure(models.Candidate("0", "mean", features), CLASSES, targets, folds)
    assert result.means["auroc"] > 0.9 and result.means["accuracy"] > 0.8


def test_a_group_is_in_one_fold(study):
    models = study("linear_models")
    rng = np.random.default_rng(2)
    groups = rng.permutation(np.arange(60) // 5)
    targets = np.tile([0.0, 1.0], 30)
    for labels in (CLASSES, NUMBERS):
        folds = models.nested_folds(labels, targets, groups, 4, 1)
        assert sorted(np.concatenate([fold.held_out for fold in folds])) == list(range(60))
        for fold in folds:
            assert not set(groups[fold.learned]) & set(groups[fold.held_out])
            for learned, held_out in fold.inner:
                inside = groups[fold.learned]
                assert not set(inside[learned]) & set(inside[held_out])


def test_a_table_to_measure_on_needs_no_groups(study, tmp_path):
    probe = study("probe")
    learned, measured = tmp_path / "a.csv", tmp_path / "b.csv"
    learned.write_text("sequence,label,chrom\nAC,1,x\nGT,2,y\nTT,3,x\n")
    measured.write_text("sequence,label\nAC,1\n")
    flags = ["--ckpt-dir", "c", "--output-dir", "o", "--group-column", "chrom"]
    args = probe.build_parser().parse_args([*flags, "--data", str(learned), "--test-data", str(measured)])
    first, second = probe.read_tables(args, NUMBERS)
    assert first.group_of.tolist() == [0, 1, 0] and second.group_of is None and second.columns == [[b"AC"]]


def test_too_few(study):
    models = study("linear_models")
    for labels, targets, groups, message in (
        (NUMBERS, [1.0, 2, 3], None, "3 sequences cannot be divided into 4 folds"),
        (CLASSES, [0.0] * 20 + [1.0] * 3, None, "3 sequences of class 'yes' cannot be divided into 4"),
        (CLASSES, [0.0, 1.0] * 10, np.arange(20) % 3, "3 groups cannot be divided into 4"),
        (CLASSES, [0.0] * 16 + [1.0] * 4, np.arange(20) // 4, "a class is in so few groups"),
    ):
        with pytest.raises(UserError, match=message):
            models.folds_of(labels, np.array(targets), groups, 4, 1)


def own_bases(sequences, pooling):
    """Two layers: shares of A, C, G, T among the bases that are pooled, and minus these."""
    parts = [
        s if pooling == "mean" else s[-1:] if pooling == "last" else s[pooling.start : pooling.stop] for s in sequences
    ]
    shares = np.array([[part.count(base) / len(part) for base in b"ACGT"] for part in parts], np.float32)
    return {0: shares, 1: -shares}


def test_embeddings_of_strands_columns_and_the_middle(study):
    probe = study("probe")
    first, second = [b"AACCG", b"ACGTTTGG", b"GGATC"], [b"TTTTT", b"AAAAAAAA", b"CCCCC"]
    found = probe.embeddings(own_bases, [first, second], "mean", both_strands=True)
    assert set(found) == {0, 1} and found[0].shape == (3, 16)
    np.testing.assert_allclose(found[0][0], [0.4, 0.4, 0.2, 0, 0, 0.2, 0.4, 0.4, 0, 0, 0, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(found[1], -found[0])
    # the same bases of both strands, wherever an odd one is over
    for size in (1, 2, 3, 4, 20):
        middle = probe.embeddings(own_bases, [first], f"middle:{size}", both_strands=True)[0]
        for row, sequence in enumerate(first):
            n = min(size, len(sequence))
            start = (len(sequence) - n) // 2
            part = sequence[start : start + n]
            wanted = [s.count(base) / n for s in (part, reverse_complement(part)) for base in b"ACGT"]
            np.testing.assert_allclose(middle[row], wanted, rtol=1e-6)


def test_kmers(study):
    counts = study("probe").kmer_counts([[b"ACACGNAC", b"A", b""], [b"TTT", b"GG", b"NN"]], 2)
    assert counts.shape == (3, 32)
    names = [a + b for a in "ACGT" for b in "ACGT"]
    wanted = dict.fromkeys(names, 0) | {"AC": 0.6, "CA": 0.2, "CG": 0.2}
    np.testing.assert_allclose(counts[0, :16], list(wanted.values()), rtol=1e-6)
    assert not counts[1, :16].any() and not counts[2].any()
    assert counts[0, 31] == 1 and counts[1, 16 + names.index("GG")] == 1


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.usefixtures("one_thread")
def test_on_a_model(study, checkpoint, tmp_path, monkeypatch, capsys):
    """Vectors are those of predict_evo2, of each layer; the table that was held out is measured with the best."""
    rng = np.random.default_rng(0)
    lines = ["sequence\tgc"]
    for _ in range(60):
        gc = rng.uniform(0.2, 0.8)
        bases = rng.choice(list("ACGT"), rng.integers(30, 60), p=[(1 - gc) / 2, gc / 2, gc / 2, (1 - gc) / 2])
        lines.append("".join(bases) + f"\t{np.isin(bases, ['G', 'C']).mean()}")
    (tmp_path / "train.tsv").write_text("\n".join(lines[:41]) + "\n")
    (tmp_path / "test.tsv").write_text("\n".join([lines[0], *lines[41:]]) + "\n")
    study("harness")
    flags = ["--ckpt-dir", checkpoint, "--output-dir", tmp_path / "out", "--data", tmp_path / "train.tsv"]
    flags += ["--task", "regression", "--label-column", "gc", "--folds", 3, "--pooling", "mean", "middle:11"]
    flags += ["--test-data", tmp_path / "test.tsv"]
    monkeypatch.setattr("sys.argv", ["probe.py", *map(str, flags)])

    runpy.run_path(str(STUDIES / "probe.py"), run_name="__main__")

    rows = read_tsv(tmp_path / "out" / "probe.tsv")
    assert [(row["layer"], row["pooling"]) for row in rows] == [
        ("-", "4-mers"), *((str(layer), pooling) for pooling in ("mean", "middle:11") for layer in range(4))
    ]  # fmt: skip
    assert {row["num_features"] for row in rows} == {"256"}
    assert max(float(row["r2"]) for row in rows[1:5]) > 0.5
    assert "best: layer" in capsys.readouterr().out
    predicted = read_tsv(tmp_path / "out" / "probe_test.tsv")
    assert len(predicted) == 20
    correlation = np.corrcoef(
        [[float(row[name]) for name in ("true_gc", "prediction")] for row in predicted], rowvar=False
    )
    assert correlation[0, 1] > 0.7


def test_pooled_is_the_mean_of_predict(study, checkpoint, tmp_path):
    from evo2_megatron.tasks.scoring.predict import predict
    from evo2_megatron.tasks.scoring.prediction_settings import Files, Output, Window

    rng = np.random.default_rng(3)
    sequences = ["".join(rng.choice(list("ACGT"), n)).encode() for n in (9, 40, 25)]
    with study("harness").open_model(checkpoint, longest=40, layers=[2, -4], max_batch_tokens=60) as model:
        assert model.layers == [0, 2]
        found = model.pooled(sequences, range(3, 8))
    (tmp_path / "s.fa").write_text("".join(f">{n}\n{s.decode()}\n" for n, s in enumerate(sequences)))
    output = Output(embedding_layers=(0, 2), pooling=Window(4, 8))
    predict(tmp_path / "s.fa", checkpoint, output=output, files=Files(output_dir=tmp_path / "h", formats=("npz",)))
    with np.load(next((tmp_path / "h").glob("*.npz"))) as arrays:
        for layer in (0, 2):
            np.testing.assert_allclose(found[layer], arrays[f"layer_{layer}"], rtol=1e-4, atol=1e-5)
