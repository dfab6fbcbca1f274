# SPDX-License-Identifier: Apache-2.0
"""The writer against Megatron's own."""

import numpy as np
import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data.indexed_dataset import DTYPES, IndexedDatasetWriter, check_indexed_dataset

DOCUMENTS = [b"ACGTN" * 5, b"\0", b"", b"acgt\0\1\1"]


def write(prefix, dtype, documents=DOCUMENTS):
    writer = IndexedDatasetWriter(prefix, dtype)
    for document in documents:
        writer.write_bytes(document[:3])
        writer.write_ids(list(document[3:]))
        writer.end_document()
    writer.finish()
    writer.publish()
    return writer


@pytest.mark.parametrize("chunk", [1, 3, 1 << 14])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_equal_megatrons(tmp_path, monkeypatch, dtype, chunk):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr("evo2_megatron.data.indexed_dataset._CHUNK", chunk)
    writer = write(tmp_path / "ours", dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(list(document), dtype=torch.int64), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))

    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()
    assert (writer.num_documents, writer.num_tokens) == (4, 33)
    check_indexed_dataset(tmp_path / "ours")


def test_megatron_reads_it(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write(tmp_path / "a", "uint16")
    dataset = IndexedDataset(str(tmp_path / "a"))

    assert [bytes(dataset[i].astype(np.uint8)) for i in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_nothing_has_its_name_before_publish(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "a", "uint8")
    writer.write_bytes(b"ACGT")
    writer.end_document()
    writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin.tmp", "a.idx.tmp"]

    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_id_that_does_not_fit(tmp_path):
    for dtype in ("uint8", "int8"):
        writer = IndexedDatasetWriter(tmp_path / dtype, dtype)
        with pytest.raises(UserError, match=f"{dtype} cannot hold token id 300"):
            writer.write_ids([65, 300])
        writer.discard()
    writer = IndexedDatasetWriter(tmp_path / "wide", "uint16")
    writer.write_ids([65, 300])
    writer.end_document()
    writer.finish()
    writer.publish()
    assert (tmp_path / "wide.bin").read_bytes() == b"A\0\x2c\x01"


def test_document_beyond_the_format(tmp_path):
    writer = IndexedDatasetWriter(tmp_path / "a", "uint8")
    writer.document_length = 2**31
    with pytest.raises(UserError, match=r"2147483648 tokens exceeds .* split_window_length"):
        writer.end_document()
    writer.discard()


def test_check_of_an_index_cut_off(tmp_path):
    write(tmp_path / "a", "uint8")
    index = tmp_path / "a.idx"
    index.write_bytes(index.read_bytes()[:60])

    with pytest.raises(UserError, match="copy or make both again"):
        check_indexed_dataset(tmp_path / "a")
