# SPDX-License-Identifier: Apache-2.0
"""Names and contents of prediction output: the interface of everything that reads it."""

import json

import pytest
import torch

from evo2_megatron.tasks.scoring.prediction_files import TensorFiles, concatenate, remove_stale_files, write_index


def batch(first, length, rows=2):
    return {
        "token_logits": torch.full((rows, length, 3), float(first + 1)),
        "pad_mask": torch.ones(rows, length, dtype=torch.int64),
        "seq_idx": torch.arange(first, first + rows),
    }


def tensor_files(folder, **settings):
    return TensorFiles(folder, **({"rank": 0, "data_parallel_rank": 0, "data_parallel_size": 1} | settings))


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_epoch_mode(tmp_path):
    out = tmp_path / "made"
    # longer sequences first, as they are run; rows by number, as they are read
    tensor_files(out, rank=5, data_parallel_rank=2, data_parallel_size=3).write_all([batch(2, 7, rows=1), batch(0, 4)])

    assert names(out) == ["predictions__rank_5__dp_rank_2.pt"]
    result = torch.load(out / "predictions__rank_5__dp_rank_2.pt", weights_only=True)
    assert result["seq_idx"].tolist() == [0, 1, 2]
    assert result["token_logits"].shape == (3, 7, 3) and result["token_logits"].dtype == torch.float32
    assert result["token_logits"][:, :, 0].tolist() == [[1] * 4 + [0] * 3] * 2 + [[3] * 7]
    assert result["pad_mask"].sum(1).tolist() == [4, 4, 7]


def test_a_process_without_batches_writes_nothing(tmp_path):
    tensor_files(tmp_path).write_all([])
    assert names(tmp_path) == []


def test_batch_mode(tmp_path):
    files = tensor_files(tmp_path)
    for number, first in enumerate((0, 2)):
        files.write_batch(number, batch(first, 4))
    assert names(tmp_path) == [f"predictions__rank_0__dp_rank_0__batch_{i}.pt" for i in range(2)]
    result = torch.load(tmp_path / "predictions__rank_0__dp_rank_0__batch_1.pt", weights_only=True)
    assert result["seq_idx"].tolist() == [2, 3] and result["batch_idx"].tolist() == [1]
    assert result["batch_idx"].dtype == torch.int64


def test_files_per_subdir_counts_the_files_of_all_copies(tmp_path):
    for copy in range(2):
        settings = {"rank": copy, "data_parallel_rank": copy, "data_parallel_size": 2, "files_per_subdir": 3}
        for number in range(4):
            tensor_files(tmp_path, **settings).write_batch(number, batch(number, 4))
    folders = [name.split("/")[0] for name in names(tmp_path)]
    assert sorted(folders) == ["subdir_1"] * 3 + ["subdir_2"] * 3 + ["subdir_3"] * 2
    assert "subdir_1/predictions__rank_1__dp_rank_1__batch_0.pt" in names(tmp_path)


@pytest.mark.parametrize("shapes", [[(2,), (1,)], [(2, 3), (1, 5)], [(1, 5, 2), (3, 1, 2), (2, 4, 2)]])
def test_concatenate(shapes):
    parts = [torch.randn(shape) for shape in shapes]
    joined = concatenate([{"x": part} for part in parts])["x"]
    assert joined.shape == (sum(s[0] for s in shapes), *(max(sizes) for sizes in zip(*(s[1:] for s in shapes))))
    for part, rows in zip(parts, joined.split([len(part) for part in parts])):
        kept = rows if part.dim() == 1 else rows[:, : part.shape[1]]
        assert torch.equal(kept, part) and (part.dim() == 1 or not rows[:, part.shape[1] :].any())


def test_index(tmp_path):
    write_index(tmp_path, ["chr10", "chr2"])
    assert json.loads((tmp_path / "seq_idx_map.json").read_text()) == {"chr10": 0, "chr2": 1}


def test_only_our_own_stale_files_are_removed(tmp_path, caplog):
    ours = ["predictions__rank_7__dp_rank_3.pt", "seq_idx_map.json", "scores.tsv", "bases.parquet", "manifest.json"]
    ours += ["embeddings.npz", "logits-00001-of-00002.safetensors", "logits.safetensors.index.json"]
    ours += [f"subdir_{i}/predictions__rank_0__dp_rank_0__batch_{i}.pt" for i in (1, 2)]
    others = [
        "predictions.pt",
        "notes.txt",
        "my_predictions__rank_0__dp_rank_0.pt",
        "subdir_1/x.pt",
        "kept/scores.tsv",
    ]
    for name in ours + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with caplog.at_level("INFO"):
        remove_stale_files(tmp_path)
    assert names(tmp_path) == sorted(others)
    assert not (tmp_path / "subdir_2").exists()
    assert "Removed 10 result files of an earlier run" in caplog.text
    remove_stale_files(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_index(tmp_path, ["old"])
    monkeypatch.setattr("os.replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_index(tmp_path, ["new"])
    assert names(tmp_path) == ["seq_idx_map.json"]
    assert "old" in (tmp_path / "seq_idx_map.json").read_text()
