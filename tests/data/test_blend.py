# SPDX-License-Identifier: Apache-2.0
"""Schema of the dataset YAML."""

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data.blend import Blend, read_blends
from evo2_megatron.data.indexed_dataset import IndexedDatasetWriter


def make(prefix, documents=(b"ACGT\0",), dtype="uint8"):
    writer = IndexedDatasetWriter(prefix, dtype)
    for document in documents:
        writer.write_bytes(document)
        writer.end_document()
    writer.finish()
    writer.publish()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Datasets a, b.v1 and empty in ``data``; the current directory is elsewhere."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b.v1"):
        make(data / name)
    make(data / "empty", ())
    monkeypatch.chdir(tmp_path)
    return data


def config(tmp_path, *entries):
    path = tmp_path / "data.yaml"
    keys = ("dataset_prefix", "dataset_weight", "dataset_split")
    path.write_text("\n".join("- " + str(dict(zip(keys, entry, strict=True))) for entry in entries))
    return path


def test_read_blends(folder, tmp_path):
    path = config(tmp_path, ("a", 3, "train"), ("b.v1", 1, "train"), (str(folder / "a"), 2, "validation"),
                  ("b.v1", 0.5, "test"))  # fmt: skip

    assert read_blends(path, dataset_dir="data") == {
        "train": Blend([f"{folder}/a", f"{folder}/b.v1"], [0.75, 0.25]),
        "validation": Blend([f"{folder}/a"], [1.0]),
        "test": Blend([f"{folder}/b.v1"], [1.0]),
    }


def test_relative_prefixes_start_at_the_current_directory(folder, tmp_path):
    path = config(tmp_path, ("data/a", 1, "train"))

    assert read_blends(path, required=["train"])["train"].prefixes == [f"{folder}/a"]


def test_the_home_folder_in_a_prefix(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    blends = read_blends(config(tmp_path, ("~/data/a", 1, "train")), required=["train"])
    assert blends["train"].prefixes == [f"{folder}/a"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("b", 1, "train"), "no such file: .*data/b.bin"),
        (("a.bin", 1, "train"), "leave off the ending"),
        (("a", 0, "train"), "dataset_weight is 0; it must be above 0"),
        (("a", -1, "train"), "must be above 0"),
        (("a", "x", "train"), "dataset_weight is 'x'; it must be a number"),
        (("a", 1, "val"), "dataset_split is 'val'; use one of train, validation, test"),
        (("empty", 1, "train"), "holds no tokens"),
    ],
)
def test_errors_in_an_entry(folder, tmp_path, entry, message):
    with pytest.raises(UserError, match=f"entry 1: .*{message}"):
        read_blends(config(tmp_path, entry), dataset_dir=folder)


def test_required_splits(folder, tmp_path):
    with pytest.raises(UserError, match="no dataset for validation and test"):
        read_blends(config(tmp_path, ("a", 1, "train")), dataset_dir=folder)


def test_missing_and_unknown_keys(folder, tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text("- {dataset_prefix: a, weight: 1}")
    with pytest.raises(UserError, match="unknown key 'weight'; did you mean 'dataset_weight'"):
        read_blends(path)
    path.write_text("- {dataset_prefix: a}")
    with pytest.raises(UserError, match="dataset_weight and dataset_split missing"):
        read_blends(path)


def test_missing_dataset_dir(folder, tmp_path):
    with pytest.raises(UserError, match="no such dataset directory: nowhere"):
        read_blends(config(tmp_path, ("a", 1, "train")), dataset_dir="nowhere")


def test_damaged_datasets(folder, tmp_path):
    path = config(tmp_path, ("a", 1, "train"))
    (folder / "a.bin").write_bytes(b"ACG")
    with pytest.raises(UserError, match="has 3 bytes where its index expects 5"):
        read_blends(path, dataset_dir=folder)
    (folder / "a.idx").write_bytes(b"something else, and longer than a header of an index")
    with pytest.raises(UserError, match="not the index of a Megatron dataset"):
        read_blends(path, dataset_dir=folder)
    (folder / "a.idx").unlink()
    with pytest.raises(UserError, match=r"no such file: .*a\.idx"):
        read_blends(path, dataset_dir=folder)
