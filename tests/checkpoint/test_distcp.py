# SPDX-License-Identifier: Apache-2.0
"""Folders of torch.distributed.checkpoint, written and read without it, against torch itself."""

import json
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from evo2_megatron.checkpoint import distcp, tensors
from evo2_megatron.checkpoint.tensors import in_memory
from evo2_megatron.config import UserError
from helpers import Hostile

_GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "one.weight": torch.randn(7, 5, generator=_GENERATOR),
    "two.weight": torch.randn(4, 3, 2, generator=_GENERATOR).bfloat16(),
    "optimizer.state": torch.randn(6, generator=_GENERATOR),
}


def write(folder, values=TENSORS):
    folder.mkdir()
    distcp.write_tensors({name: in_memory(value) for name, value in values.items()}, folder)
    return folder


def load_with_torch(folder):
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    values = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(values, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return values


def read(folder):
    index = distcp.read_index(folder)
    return distcp.stored_tensors(folder, index, {name: name for name in distcp.tensor_entries(index)})


def assert_equal(values, expected):
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        assert values[name].dtype is value.dtype and torch.equal(values[name], value), name


def edit_index(folder, change):
    index = distcp.read_index(folder)
    change(index)
    (folder / ".metadata").unlink()
    distcp.write_index(folder, index)


@pytest.mark.parametrize("piece_bytes", [1, 50, 10**6])
def test_torch_reads_what_we_write(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(tensors, "PIECE_BYTES", piece_bytes)
    folder = write(tmp_path / "new")
    assert_equal(load_with_torch(folder), TENSORS)
    assert_equal({name: tensor.read() for name, tensor in read(folder).items()}, TENSORS)
    first = read(folder)["one.weight"]
    assert torch.equal(first.read_rows(2, 5), TENSORS["one.weight"][2:5])


def test_pieces_of_a_tensor_in_memory_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE_BYTES", 10**5)
    large = torch.arange(250_000.0).reshape(2500, 100)
    (tmp_path / "new").mkdir()
    distcp.write_tensors({"large": tensors.in_memory(large)}, tmp_path / "new")
    size = sum(path.stat().st_size for path in (tmp_path / "new").glob("*.distcp"))
    assert large.nbytes < size < 1.1 * large.nbytes
    assert_equal(load_with_torch(tmp_path / "new"), {"large": large})


def test_we_read_what_torch_writes(tmp_path):
    dcp.save(dict(TENSORS, text="bytes"), checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp/metadata.json").write_text(json.dumps(distcp.FORMAT))
    assert_equal({name: tensor.read() for name, tensor in read(tmp_path / "dcp").items()}, TENSORS)


def test_tensors_that_processes_split(tmp_path):
    """By columns, and by rows and columns, in several files, as tensor parallelism leaves them."""
    whole, storage, chunks = torch.arange(24.0).reshape(4, 6), {}, []
    for i, (rows, columns) in enumerate([((0, 4), (0, 2)), ((0, 1), (2, 6)), ((1, 4), (2, 6))]):
        offsets = torch.Size((rows[0], columns[0]))
        part = whole[slice(*rows), slice(*columns)].clone()
        torch.save(part, tmp_path / f"__{i}_0.distcp")
        size = (tmp_path / f"__{i}_0.distcp").stat().st_size
        storage[MetadataIndex("w", offsets)] = _StorageInfo(f"__{i}_0.distcp", 0, size)
        chunks.append(ChunkStorageMetadata(offsets, part.shape))
    properties = distcp.TensorProperties(dtype=torch.float32)
    entry = distcp.TensorStorageMetadata(properties, whole.shape, chunks)
    distcp.write_index(tmp_path, Metadata({"w": entry}, {"w": ("w",)}, storage))

    assert_equal(load_with_torch(tmp_path), {"w": whole})
    for start in range(4):
        for stop in range(start + 1, 5):
            assert torch.equal(read(tmp_path)["w"].read_rows(start, stop), whole[start:stop])
    (tmp_path / "copy").mkdir()
    distcp.copy_tensors(tmp_path, distcp.read_index(tmp_path), {"w": "renamed"}, tmp_path / "copy")
    assert_equal(load_with_torch(tmp_path / "copy"), {"renamed": whole})


@pytest.mark.parametrize("piece_bytes", [20, 10**6])
def test_copy_some_under_other_names(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(tensors, "PIECE_BYTES", piece_bytes)
    source, done = write(tmp_path / "source"), []
    target = tmp_path / "target"
    target.mkdir()
    index = distcp.read_index(source)
    distcp.copy_tensors(source, index, {"one.weight": "a", "two.weight": "b"}, target, on_bytes=done.append)
    assert_equal(load_with_torch(target), {"a": TENSORS["one.weight"], "b": TENSORS["two.weight"]})
    assert sum(done) == distcp.entry_bytes(index, "one.weight") + distcp.entry_bytes(index, "two.weight")
    assert (target / "__0_0.distcp").stat().st_size == sum(done)


def test_copy_of_more_files_than_may_be_open(tmp_path):
    """Each process of a run writes its own, and a large one has more than the usual limit of 1,024."""
    values = {f"{i}.weight": torch.full((2,), float(i)) for i in range(60)}
    (tmp_path / "run").mkdir()
    storage = {}
    for i, (name, value) in enumerate(values.items()):
        part = write(tmp_path / "part", {name: value})
        for place, info in distcp.read_index(part).storage_data.items():
            storage[place] = _StorageInfo(f"__{i}_0.distcp", info.offset, info.length)
        (part / "__0_0.distcp").rename(tmp_path / "run" / f"__{i}_0.distcp")
        shutil.rmtree(part)
    entries = {
        name: TensorStorageMetadata(
            TensorProperties(torch.float32), torch.Size([2]), [ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))]
        )
        for name in values
    }
    distcp.write_index(tmp_path / "run", Metadata(entries, {}, storage))
    (tmp_path / "copy").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 20, limits[1]))
    try:
        names = {name: name for name in values}
        distcp.copy_tensors(tmp_path / "run", distcp.read_index(tmp_path / "run"), names, tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert_equal(load_with_torch(tmp_path / "copy"), values)


def test_hostile_index(tmp_path):
    folder = write(tmp_path / "new")
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "trap")))
    with pytest.raises(UserError, match="tampered"):
        distcp.read_index(folder)
    assert not (tmp_path / "trap").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert (tmp_path / "trap").exists()  # the trap works


def test_hostile_tensor(tmp_path):
    folder = write(tmp_path / "new", {"w": torch.zeros(3)})
    torch.save(Hostile(tmp_path / "trap"), folder / "__0_0.distcp")
    size = (folder / "__0_0.distcp").stat().st_size
    edit_index(
        folder,
        lambda index: index.storage_data.update(
            {MetadataIndex("w", torch.Size((0,))): _StorageInfo("__0_0.distcp", 0, size)}
        ),
    )
    with pytest.raises(UserError, match="nothing of it was run"):
        read(folder)["w"].read()
    assert not (tmp_path / "trap").exists()


def test_damage(tmp_path):
    folder = write(tmp_path / "new")
    outside = tmp_path / "__0_0.distcp"
    (folder / "__0_0.distcp").rename(outside)
    with pytest.raises(UserError, match="lacks the file"):
        read(folder)

    def point_outside(index):
        for info in index.storage_data.values():
            info.relative_path = "../__0_0.distcp"

    edit_index(folder, point_outside)
    with pytest.raises(UserError, match="lacks the file"):
        read(folder)

    folder = write(tmp_path / "short")
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[:-10])
    with pytest.raises(UserError, match="ends before"):
        read(folder)

    folder = write(tmp_path / "parts")
    edit_index(folder, lambda index: index.state_dict_metadata["one.weight"].chunks.clear())
    with pytest.raises(UserError, match="parts of one.weight are missing"):
        read(folder)

    folder = write(tmp_path / "other")
    edit_index(folder, lambda index: setattr(index.state_dict_metadata["one.weight"].properties, "dtype", torch.half))
    with pytest.raises(UserError, match="not what the checkpoint's index says"):
        read(folder)["one.weight"].read()

    whole = (folder / ".metadata").read_bytes()
    for part, damaged in ((b"ChunkStorageMetadata", b"ChunkStorageMetadat4"), (b"one.weight", b"one.weigh\xd7")):
        (folder / ".metadata").write_bytes(whole.replace(part, damaged))
        with pytest.raises(UserError, match="metadata cannot be read .*; copy the checkpoint again"):
            distcp.read_index(folder)
    for content, message in ((b"", "cannot be read"), (pickle.dumps({"a": 1}), "not an index")):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match=message):
            distcp.read_index(folder)
    (folder / "metadata.json").unlink()
    with pytest.raises(UserError, match="has no metadata.json"):
        distcp.read_index(folder)


@pytest.mark.parametrize(
    "content, message",
    [("{", "metadata.json is not JSON"), ('{"sharded_backend": "zarr"}', "in the format 'zarr'; only")],
)
def test_another_format(tmp_path, content, message):
    folder = write(tmp_path / "new")
    (folder / "metadata.json").write_text(content)
    with pytest.raises(UserError, match=message):
        distcp.read_index(folder)
