# SPDX-License-Identifier: Apache-2.0
"""Training samples of indexed datasets, through the providers that Megatron Bridge calls."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evo2_megatron.config import UserError
from evo2_megatron.data.indexed_dataset import IndexedDatasetWriter
from evo2_megatron.data.tokenizer import encode, tokenizer_dir

pytestmark = pytest.mark.usefixtures("megatron")
LENGTH = 64
WORKER = Path(__file__).with_name("dataset_worker.py")


@pytest.fixture(scope="module")
def tokenizer(megatron):
    from megatron.bridge.training.tokenizers.config import TokenizerConfig
    from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer

    return build_tokenizer(
        TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer_dir(512)))
    )


def documents(seed, num=40):
    """Random documents of 5 to 150 bases in both cases, each ending with EOD."""
    rng = np.random.default_rng(seed)
    return [bytes(rng.choice(list(b"ACGTacgtN"), rng.integers(5, 150)).astype(np.uint8)) + b"\0" for _ in range(num)]


def write(prefix, texts):
    writer = IndexedDatasetWriter(prefix, "uint8")
    for text in texts:
        writer.write_bytes(text)
        writer.end_document()
    writer.finish()
    writer.publish()


def write_config(folder, entries):
    path = folder / "data.yaml"
    path.write_text(
        "\n".join(
            f"- {{dataset_prefix: {prefix}, dataset_weight: {weight}, dataset_split: {split}}}"
            for prefix, weight, split in entries
        )
    )
    return path


@pytest.fixture
def config_path(tmp_path):
    """One dataset per split."""
    for seed, split in enumerate(("train", "validation", "test")):
        write(tmp_path / split, documents(seed))
    return write_config(tmp_path, [(split, 1, split) for split in ("train", "validation", "test")])


def build(config_path, tokenizer, samples=(50, 20, 10), **settings):
    from megatron.bridge.training.config import DatasetBuildContext

    from evo2_megatron.data.providers import Evo2DatasetProvider

    settings = {"dataset_dir": str(config_path.parent), "seq_length": LENGTH, "random_seed": 7} | settings
    provider = Evo2DatasetProvider(dataset_config_path=str(config_path), **settings)
    return provider.build_datasets(DatasetBuildContext(*samples, tokenizer=tokenizer))


def test_samples_are_windows_of_packed_documents(config_path, tokenizer):
    train, valid, test = build(config_path, tokenizer)
    text = {bytes(document) for document in documents(0)}

    assert (len(train) >= 50, len(valid) >= 20, len(test) >= 10) == (True, True, True)
    whole = 0
    for i in range(50):
        sample = train[i]
        assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
            "tokens": (torch.int64, (LENGTH,)),
            "labels": (torch.int64, (LENGTH,)),
            "loss_mask": (torch.float32, (LENGTH,)),
            "position_ids": (torch.int64, (LENGTH,)),
        }
        labels = bytes(sample["labels"].tolist())
        # inputs are the labels one step later, in upper case; labels keep their case
        assert bytes(sample["tokens"][1:].tolist()) == labels[:-1].upper()
        assert sample["loss_mask"].tolist() == [float(base in b"ACGTacgt") for base in labels]
        inner = labels.split(b"\0")[1:-1]
        whole += len(inner)
        assert all(part + b"\0" in text for part in inner)
    assert whole > 10


def test_order_follows_the_seed(config_path, tokenizer):
    def first(**settings):
        return build(config_path, tokenizer, **settings)[0][0]["labels"].tolist()

    assert first() == first()
    assert first() != first(random_seed=8)


def test_one_epoch_shows_every_token_once(config_path, tokenizer):
    tokens = sum(map(len, documents(0)))
    train, _, _ = build(config_path, tokenizer, samples=((tokens - 1) // LENGTH, 0, 0))
    seen = np.concatenate([train[i]["labels"].numpy() for i in range(len(train))])
    lost = np.bincount(list(b"".join(documents(0))), minlength=128) - np.bincount(seen, minlength=128)

    assert lost.min() >= 0 and lost.sum() == tokens - len(train) * LENGTH <= LENGTH


def test_end_of_document_is_masked_on_request(config_path, tokenizer):
    plain, _, _ = build(config_path, tokenizer)
    masked, _, _ = build(config_path, tokenizer, eod_mask_loss=True)
    differences = 0
    for i in range(50):
        assert torch.equal(plain[i]["labels"], masked[i]["labels"])
        after_eod = plain[i]["tokens"] == 0
        assert torch.equal(masked[i]["loss_mask"], plain[i]["loss_mask"] * ~after_eod)
        differences += int((plain[i]["loss_mask"] - masked[i]["loss_mask"]).sum())
    assert differences > 20


def test_scored_labels_of_the_worked_example():
    from evo2_megatron.data.datasets import scored_labels

    labels = torch.tensor(encode("a@t|d__t<EOD>#at".replace("EOD", "EOS")))

    assert scored_labels(labels).int().tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_padding_sample_is_not_scored(config_path, tokenizer):
    train, _, _ = build(config_path, tokenizer)

    assert train[None]["loss_mask"].sum() == 0
    assert train[None]["tokens"].shape == (LENGTH,)


def test_blend_follows_the_weights(tmp_path, tokenizer):
    write(tmp_path / "a", [b"A" * 99 + b"\0"] * 9)
    write(tmp_path / "c", [b"C" * 99 + b"\0"] * 9)
    path = write_config(tmp_path, [("a", 3, "train"), ("c", 1, "train")])
    train, valid, test = build(path, tokenizer, samples=(100, 0, 0), index_cache_dir=str(tmp_path / "cache"))
    labels = [sorted(set(train[i]["labels"].tolist()) - {0}) for i in range(len(train))]

    assert (len(train), valid, test) == (100, None, None)
    assert (labels.count([65]), labels.count([67])) == (75, 25)
    assert len(list((tmp_path / "cache").iterdir())) == 8


def test_index_is_cached_and_sees_new_data(config_path, tokenizer):
    folder = config_path.parent / "train" / "cache" / "Evo2Dataset_indices"
    first, _, _ = build(config_path, tokenizer)
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again, _, _ = build(config_path, tokenizer)

    assert len(files) == 4
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    assert torch.equal(first[3]["labels"], again[3]["labels"])

    write(config_path.parent / "train", documents(99, num=3))  # fewer documents: the old index would leave the file
    changed, _, _ = build(config_path, tokenizer)
    assert len(list(folder.iterdir())) == 8
    text = b"".join(documents(99, num=3))
    assert all(set(bytes(changed[i]["labels"].tolist())) <= set(text) for i in range(50))


def test_half_an_index_is_built_again(config_path, tokenizer):
    folder = config_path.parent / "train" / "cache" / "Evo2Dataset_indices"
    first, _, _ = build(config_path, tokenizer)
    expected = first[3]["labels"]
    next(folder.glob("*sample_index.npy")).unlink()
    again, _, _ = build(config_path, tokenizer)

    assert torch.equal(again[3]["labels"], expected)
    assert len(list(folder.iterdir())) == 4


def test_read_only_data(config_path, tokenizer, monkeypatch, tmp_path):
    from evo2_megatron.data import providers

    writable = tmp_path / "elsewhere"
    writable.mkdir()
    # root may write everywhere: ask a system where only one folder is writable
    monkeypatch.setattr(providers, "os", SimpleNamespace(W_OK=os.W_OK, access=lambda path, _: path == writable))
    with pytest.raises(UserError, match=r"cannot write the sample index under .*; set index_cache_dir"):
        build(config_path, tokenizer)
    train, _, _ = build(config_path, tokenizer, index_cache_dir=str(writable / "new"))
    assert len(train) >= 50
    assert not (config_path.parent / "train").exists()


def test_missing_split(config_path, tokenizer):
    path = write_config(config_path.parent, [("train", 1, "train")])
    with pytest.raises(UserError, match="no dataset for validation and test"):
        build(path, tokenizer)
    train, valid, test = build(path, tokenizer, samples=(5, 0, 0))
    assert (len(train) >= 5, valid, test) == (True, None, None)


@pytest.mark.slow
def test_two_processes_share_an_index(tmp_path):
    for seed, name in enumerate(("a", "b", "v")):
        write(tmp_path / name, documents(seed))
    path = write_config(
        tmp_path, [(tmp_path / "a", 2, "train"), (tmp_path / "b", 1, "train"), (tmp_path / "v", 1, "validation")]
    )
    for num in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
        subprocess.run(
            [*command, str(WORKER), str(path), str(tmp_path / f"cache{num}"), str(tmp_path / f"out{num}")],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    one, first, second = (torch.load(tmp_path / name) for name in ("out1.0", "out2.0", "out2.1"))
    assert len(one) >= 80
    assert torch.equal(first, one)
    assert torch.equal(second, one)
