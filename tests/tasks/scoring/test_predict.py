# SPDX-License-Identifier: Apache-2.0
"""predict() on a small random model, compared with logits of single sequences and arithmetic in float64."""

import json
from dataclasses import fields

import pytest
import torch
from safetensors import safe_open

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig, UserError

RECORDS = {
    "z": "ACGTTGCA" * 9 + "ACG",
    "tagged": "|d__Bacteria;p__P|" + "ACGTN" * 5,
    "one": "G",
    "two": "gA",
    "long": "GATTACA" * 18 + "TC",
    "b": "TTTTTTTTACGGGGGATTTAC",
}
TAG_LENGTH = len("|d__Bacteria;p__P|")


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    path = tmp_path_factory.mktemp("fasta") / "records.fa"
    path.write_text("".join(f">{name} comment\n{bases}\n" for name, bases in RECORDS.items()))
    return path


@pytest.fixture
def predict(checkpoint, fasta, tmp_path):
    """predict() into ``tmp_path/out``; returns the rows by record name, in the order of seq_idx."""
    from evo2_megatron.tasks.scoring.predict import predict as run
    from evo2_megatron.tasks.scoring.prediction_settings import Files, ModelChanges, Output, Sequences

    def pick(kind, settings):
        return kind(**{f.name: settings.pop(f.name) for f in fields(kind) if f.name in settings})

    def call(path=fasta, **settings):
        settings |= {"output_dir": tmp_path / "out"}
        parts = {
            "output": pick(Output, settings),
            "files": pick(Files, settings),
            "sequences": pick(Sequences, settings),
            "changes": pick(ModelChanges, settings),
        }
        run(path, checkpoint, **parts, **settings)
        index = json.loads((tmp_path / "out" / "seq_idx_map.json").read_text())
        rows = {}
        for file in (tmp_path / "out").glob("predictions__*.pt"):
            result = torch.load(file, weights_only=True)
            result.pop("batch_idx", None)
            for row, i in enumerate(result["seq_idx"].tolist()):
                rows[i] = {name: value[row] for name, value in result.items()}
        assert list(index.values()) == sorted(rows) == list(range(len(rows)))
        return {name: rows[i] for name, i in index.items()}

    return call


@pytest.fixture(scope="module")
def logits(checkpoint):
    """Float64 logits and ids of each record alone; with and without the token in front."""
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.runtime.distributed import process_groups

    with process_groups(ParallelConfig()), torch.no_grad():
        model = load_model(checkpoint, parallel=ParallelConfig()).model
        found = {}
        for with_bos in (False, True):
            for name, bases in RECORDS.items():
                ids = torch.tensor([0] * with_bos + list(bases.upper().encode()))
                found[name, with_bos] = (model(ids[None])[0].double(), ids)
    return found


def expected_log_probs(logits_and_ids):
    logits, ids = logits_and_ids
    return torch.log_softmax(logits, -1)[:-1].gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 6])
def test_per_token(predict, logits, prepend_bos, micro_batch_size):
    rows = predict(log_probs="per_token", prepend_bos=prepend_bos, micro_batch_size=micro_batch_size)
    assert list(rows) == list(RECORDS)
    for name, row in rows.items():
        expected = expected_log_probs(logits[name, prepend_bos])
        assert row["loss_mask"].dtype == torch.bool and row["loss_mask"].sum() == len(expected)
        assert row["loss_mask"][: len(expected)].all()
        got = row["log_probs_seqs"]
        assert not got[len(expected) :].any()
        torch.testing.assert_close(got[: len(expected)].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize("how", ["sum", "mean"])
def test_sum_and_mean(predict, logits, how, prepend_bos, tmp_path):
    rows = predict(log_probs=how, prepend_bos=prepend_bos, micro_batch_size=3, min_length=150)
    lines = (tmp_path / "out" / "scores.tsv").read_text().splitlines()
    assert lines[0].split("\t") == ["id", "length", "num_scored", "log_likelihood", "mean_log_likelihood"]
    assert [line.split("\t")[:2] for line in lines[1:]] == [[name, str(len(x))] for name, x in RECORDS.items()]
    for line, (name, row) in zip(lines[1:], rows.items()):
        log_probs = expected_log_probs(logits[name, prepend_bos])
        expected = log_probs.sum() / (max(len(log_probs), 1) if how == "mean" else 1)
        assert set(row) == {"log_probs_seqs", "seq_idx"}
        assert row["log_probs_seqs"].item() == pytest.approx(expected.item(), rel=1e-5)
        assert int(line.split("\t")[2]) == len(log_probs)
        assert float(line.split("\t")[3 if how == "sum" else 4]) == pytest.approx(row["log_probs_seqs"].item())
    assert prepend_bos or rows["one"]["log_probs_seqs"] == 0


def test_logits(predict, logits):
    for row, (name, bases) in zip(predict(micro_batch_size=2, min_length=5).values(), RECORDS.items()):
        expected, ids = logits[name, False]
        assert row["token_logits"].dtype == torch.float32 and row["pad_mask"].dtype == torch.int64
        assert row["pad_mask"].tolist()[: len(bases)] == [1] * len(bases) and row["pad_mask"].sum() == len(bases)
        assert torch.equal(row["tokens"][: len(bases)], ids)
        torch.testing.assert_close(row["token_logits"][: len(bases)].double(), expected, rtol=1e-4, atol=1e-3)


def test_padding_is_the_pad_token(predict):
    rows = predict(write_interval="batch", micro_batch_size=6, min_length=200)
    assert rows["one"]["tokens"].tolist() == [ord("G")] + [1] * 199


def test_pieces_of_long_sequences(predict):
    whole = predict(log_probs="per_token", micro_batch_size=2)
    pieces = predict(log_probs="per_token", micro_batch_size=2, chunk_length=17)
    for name, row in whole.items():
        torch.testing.assert_close(pieces[name]["log_probs_seqs"], row["log_probs_seqs"], rtol=1e-4, atol=1e-4)
    assert torch.equal(predict()["long"]["tokens"], predict(chunk_length=16)["long"]["tokens"])


@pytest.mark.parametrize("layer, chunk_length", [(0, 1000), (2, 1000), (-1, 1000), (1, 20)])
def test_embeddings(predict, checkpoint, layer, chunk_length, caplog):
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.runtime.distributed import process_groups

    with caplog.at_level("INFO"):
        rows = predict(embedding_layers=(layer,), chunk_length=chunk_length, micro_batch_size=2)
    used = layer % 4 + 1
    assert f"Model initialized with {used} layers" in caplog.text
    assert f"Embedding extraction after layer {used - 1}: using {used} of 4 layers" in caplog.text

    # the whole model, watched from outside
    with process_groups(ParallelConfig()), torch.no_grad():
        model = load_model(checkpoint, parallel=ParallelConfig()).model
        seen = []
        model.decoder.layers[layer].register_forward_hook(lambda m, i, output: seen.append(output))
        for name, row in rows.items():
            ids = row["tokens"][row["pad_mask"].bool()]
            model(ids[None])
            output = seen.pop()
            expected = (output[0] if isinstance(output, tuple) else output)[:, 0]
            assert row["hidden_embeddings"].dtype == torch.float32
            torch.testing.assert_close(row["hidden_embeddings"][: len(ids)], expected, rtol=1e-4, atol=1e-3)
            assert set(row) == {"hidden_embeddings", "pad_mask", "seq_idx", "tokens"}, name


def test_tags_are_masked(predict):
    rows = predict(log_probs="per_token", mask_phylogenetic_tags=True)
    scored = rows["tagged"]["loss_mask"].tolist()
    assert scored[: TAG_LENGTH - 1] == [False] * (TAG_LENGTH - 1) and all(scored[TAG_LENGTH - 1 : 42])
    unmasked = predict(log_probs="per_token")
    torch.testing.assert_close(rows["z"]["log_probs_seqs"], unmasked["z"]["log_probs_seqs"])


def test_the_first_layers_only(predict):
    by_number = predict(num_layers=2, micro_batch_size=6)
    by_pattern = predict(hybrid_override_pattern="SD", micro_batch_size=6)
    assert torch.equal(by_number["z"]["token_logits"], by_pattern["z"]["token_logits"])
    assert not torch.allclose(by_number["z"]["token_logits"], predict(micro_batch_size=6)["z"]["token_logits"])
    # layer -1 of two layers is layer 1 of four
    last = predict(num_layers=2, embedding_layers=(-1,), micro_batch_size=6)
    assert torch.equal(
        last["z"]["hidden_embeddings"], predict(embedding_layers=(1,), micro_batch_size=6)["z"]["hidden_embeddings"]
    )


def test_interpolated_positions(predict):
    changed = predict(log_probs="sum", seq_len_interpolation_factor=4.0)
    assert changed["z"]["log_probs_seqs"] != predict(log_probs="sum")["z"]["log_probs_seqs"]


def test_precision(predict, caplog):
    with caplog.at_level("INFO"):
        half = predict(log_probs="sum", precision="bf16_mixed")
    assert "precision bf16_mixed" in caplog.text
    single = predict(log_probs="sum")
    assert 0 < abs(half["z"]["log_probs_seqs"] / single["z"]["log_probs_seqs"] - 1) < 0.05


def test_throughput_is_reported(predict, caplog, monkeypatch):
    monkeypatch.setattr("evo2_megatron.tasks.scoring.batch_progress._SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level("INFO"):
        predict(log_probs="sum", micro_batch_size=4)
    num_tokens = sum(map(len, RECORDS.values()))
    for text in ("Predicted 4 sequences, ", " % of the bases, ", "time left 0:00:0"):
        assert text in caplog.text
    assert f"Predicted 6 sequences, {num_tokens} tokens in " in caplog.text


def test_earlier_results_are_replaced(predict, tmp_path):
    predict(write_interval="batch")
    predict(log_probs="sum")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "manifest.json", "predictions__rank_0__dp_rank_0.pt", "scores.tsv", "seq_idx_map.json",
    }  # fmt: skip


def test_sequences_that_are_no_dna(checkpoint, tmp_path, caplog):
    from evo2_megatron.tasks.scoring.predict import predict as run
    from evo2_megatron.tasks.scoring.prediction_settings import Output

    (tmp_path / "rna.fa").write_text(">dna\nACGTN\n>rna\nACGU\n")
    run(tmp_path / "rna.fa", checkpoint, output=Output(log_probs="sum"))
    assert "1 of 2 sequences have letters that no DNA has; the first is 'U' in 'rna'." in caplog.text


def test_without_output_dir(checkpoint, fasta, caplog):
    from evo2_megatron.tasks.scoring.predict import predict as run
    from evo2_megatron.tasks.scoring.prediction_settings import Sequences

    with caplog.at_level("INFO"):
        run(fasta, checkpoint, sequences=Sequences(micro_batch_size=6))
    assert "results are computed and dropped" in caplog.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"embedding_layers": (100,)}, "Invalid embedding_layer 100: the model has 4 layers; choose -4 to 3"),
        ({"embedding_layers": (2, -5)}, "Invalid embedding_layer -5"),
        ({"embedding_layers": (1,), "log_probs": "sum"}, "Cannot use --output-log-prob-seqs with --embedding-layer"),
        ({"parallel": ParallelConfig(tensor=2)}, "1 processes do not fit"),
        ({"precision": "bf16_with_mxfp8_mixed"}, "choose --mixed-precision-recipe bf16_mixed"),
    ],
)
def test_what_is_refused(predict, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        predict(**settings)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(megatron, tmp_path, monkeypatch):
    from evo2_megatron.tasks.scoring.prediction_settings import Files

    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"no permission to write in {tmp_path}$"):
        Files(output_dir=tmp_path / "new" / "folder")


@pytest.mark.parametrize("number, pattern", [(5, None), (None, "SDHH"), (None, "SDH*S"), (3, "SD"), (None, "")])
def test_layers_that_are_not_there(predict, number, pattern):
    with pytest.raises(UserError, match=r"do not name the first layers of the checkpoint's pattern SDH\*"):
        predict(num_layers=number, hybrid_override_pattern=pattern)


def test_too_long_a_sequence(predict, checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "long.fa"
    path.write_text(">fits\n" + "A" * 256 + "\n>too_long\n" + "A" * 257 + "\n")
    with monkeypatch.context() as patch:
        patch.setattr("evo2_megatron.tasks.self_test.load_model", None)
        with pytest.raises(UserError, match="'too_long' has 257 tokens, more than the 256 positions"):
            predict(path=path)
        with pytest.raises(UserError, match="'fits' has 257 tokens"):
            predict(path=path, prepend_bos=True)
    assert len(predict(path=path, log_probs="sum", max_seq_length=257)) == 2
    assert len(predict(path=path, log_probs="sum", seq_len_interpolation_factor=2.0)) == 2


@pytest.fixture(scope="module")
def not_finite(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("nan"), projection_factor=float("nan"))


@pytest.mark.parametrize(
    "settings", [{"log_probs": "sum"}, {"log_probs": "per_token"}, {}, {"embedding_layers": (0,)}]
)
def test_output_that_is_not_finite(not_finite, tmp_path, settings):
    from evo2_megatron.tasks.scoring.predict import predict as run
    from evo2_megatron.tasks.scoring.prediction_settings import Files, Output

    (tmp_path / "x.fa").write_text(">first\nACGT\n")
    with pytest.raises(UserError, match="sequence 'first': the model's output is not finite; check the weights, or"):
        run(tmp_path / "x.fa", not_finite, output=Output(**settings), files=Files(output_dir=tmp_path / "out"))
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_which_results_must_be_finite(megatron):
    from evo2_megatron.tasks.scoring.prediction_results import check_finite

    logits, pooled = torch.zeros(2, 3, 4), torch.zeros(2, 5)
    results = {"token_logits": logits, "hidden": pooled, "seq_idx": torch.arange(2), "pad_mask": torch.ones(2, 3)}
    logits[1, 2] = torch.nan  # beyond the second sequence's end
    check_finite(results, ["a", "b"], [3, 2])
    with pytest.raises(UserError, match="sequence 'b': the model's output is not finite"):
        check_finite(results, ["a", "b"], [3, 3])
    pooled[0, 4] = torch.inf
    with pytest.raises(UserError, match="sequence 'a'"):
        check_finite(results, ["a", "b"], [3, 2])


def test_a_name_that_safetensors_keeps(predict, tmp_path, monkeypatch):
    path = tmp_path / "x.fa"
    path.write_text(">a\nACGT\n>__metadata__\nACG\n")
    with monkeypatch.context() as patch:
        patch.setattr("evo2_megatron.tasks.self_test.load_model", None)
        with pytest.raises(UserError, match="keeps the name '__metadata__' for itself, .*; rename it, or write npz"):
            predict(path=path, formats=("pt", "safetensors"))
    predict(path=path, formats=("pt", "npz"))
    for pooling, found in ((None, {"a/embedding", "__metadata__/embedding"}), ("mean", {"embedding"})):
        predict(path=path, embedding_layers=(0,), pooling=pooling, formats=("pt", "safetensors"))
        with safe_open(tmp_path / "out" / "embeddings.safetensors", "pt") as arrays:
            assert set(arrays.keys()) == found


@pytest.mark.parametrize("multiple, expected", [(1, 5), (4, 8), (5, 5)])
def test_collate_rounds_up(megatron, multiple, expected):
    from evo2_megatron.tasks.scoring.prediction_runner import collate

    items = [
        {"tokens": torch.full((n,), 65), "loss_mask": torch.ones(n, dtype=torch.int64), "seq_idx": torch.tensor(n)}
        for n in (5, 2)
    ]
    batch = collate(items, 1, multiple)
    assert batch["tokens"].shape == (2, expected) and batch["tokens"].dtype == torch.int64
    assert batch["tokens"][1].tolist() == [65, 65] + [1] * (expected - 2)
    assert batch["loss_mask"].sum(1).tolist() == [5, 2] and batch["seq_idx"].tolist() == [5, 2]
