# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save without their tensors in memory, against torch itself; and files that must be refused."""

import io
import zipfile

import pytest
import torch

from evo2_megatron.checkpoint import tensors
from evo2_megatron.checkpoint.distcp import write_tensors
from evo2_megatron.checkpoint.tensors import StoredTensor, in_memory
from evo2_megatron.checkpoint.torch_file import (
    JoinedFile,
    Span,
    read_torch_file,
    save_tensors,
    whole_files,
    write_torch_file,
)
from evo2_megatron.config import UserError
from helpers import Hostile, no_file_larger_than

_GENERATOR = torch.Generator().manual_seed(0)
BIG = torch.randn(6, 10, generator=_GENERATOR)
SAVED = {
    "bf16": BIG.bfloat16(),
    "shared": BIG,
    "rows": BIG[2:5],
    "columns": BIG[:, 1:4],
    "every_second_row": BIG[::2],
    "transposed": BIG.t(),
    "three_axes": BIG.reshape(3, 2, 10).transpose(0, 1),
    "none": BIG[:0],
    "parameter": torch.nn.Parameter(BIG + 1),
    "nested": {"list": [torch.arange(3), 5], "text": "t"},
    "x._extra_state": io.BytesIO(b"history"),
}


def write_as_checkpoint(stored, path):
    path.mkdir()
    write_tensors(stored, path)


@pytest.mark.parametrize("limit", [1, 4_000, 300_000])
@pytest.mark.parametrize("write", [write_torch_file, write_as_checkpoint])
def test_a_full_disk(tmp_path, write, limit):
    """The operating system's error, and not that of torch's writer, which finds its file too short."""
    stored = {name: in_memory(torch.zeros(50_000)) for name in "ab"}
    with no_file_larger_than(limit), pytest.raises(OSError, match="File too large"):
        write(stored, tmp_path / "full")
    write(stored, tmp_path / "room")


def test_ctrl_c_while_torch_writes():
    class Interrupted(io.BytesIO):
        def write(self, data):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_tensors({"x": BIG}, Interrupted())


@pytest.fixture
def file(tmp_path):
    torch.save(SAVED, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def read(*paths):
    return read_torch_file(whole_files(paths), "model.pt")


def check(loaded):
    for name, expected in SAVED.items():
        if isinstance(expected, torch.Tensor):
            assert loaded[name].shape == tuple(expected.shape) and loaded[name].dtype is expected.dtype
            assert torch.equal(loaded[name].read(), expected), name
            for start in range(len(expected)):
                assert torch.equal(loaded[name].read_rows(start, start + 1), expected[start : start + 1]), name
    assert isinstance(loaded["nested"]["list"][0], StoredTensor) and loaded["nested"]["list"][1] == 5
    assert loaded["x._extra_state"].getvalue() == b"history"


def test_values_and_views(file):
    check(read(file))


@pytest.mark.parametrize("num_parts", [2, 3, 40])
def test_parts_of_a_file(file, num_parts):
    data = file.read_bytes()
    step = -(-len(data) // num_parts)
    parts = [file.with_name(f"part{i}") for i in range(num_parts)]
    for i, part in enumerate(parts):
        part.write_bytes(data[i * step : (i + 1) * step])
    file.unlink()
    check(read(*parts))


def test_joined_file_reads_like_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(50)))
    (tmp_path / "b").write_bytes(bytes(range(100, 130)))
    joined = JoinedFile([Span(tmp_path / "a", 10, 5), Span(tmp_path / "b", 0, 30), Span(tmp_path / "a", 49, 1)])
    expected = bytes(range(10, 15)) + bytes(range(100, 130)) + bytes([49])
    assert joined.read() == expected and joined.tell() == 36
    for start in range(0, 37, 3):
        for length in (0, 1, 4, 31, 100):
            assert joined.seek(start) == start
            assert joined.read(length) == expected[start : start + length]
    assert joined.seek(-2, io.SEEK_END) == 34 and joined.read() == expected[34:]


@pytest.mark.parametrize("piece_bytes", [1, 100, 10**6])
def test_writing(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(tensors, "PIECE_BYTES", piece_bytes)
    shared, done = in_memory(BIG), []
    stored = {"a": shared, "b": shared, "c": in_memory(BIG.bfloat16().t()), "d": in_memory(torch.arange(5))}

    write_torch_file(stored, tmp_path / "new.pt", on_bytes=done.append)

    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "new.pt", weights_only=True, **options)
        assert list(loaded) == list(stored)
        for name, tensor in stored.items():
            assert torch.equal(loaded[name], tensor.read()) and loaded[name].dtype is tensor.dtype
        assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert sum(done) == sum(stored[name].nbytes for name in "acd")


@pytest.mark.parametrize("where", ["value", "extra_state"])
def test_hostile_file(tmp_path, where):
    hostile, trap = Hostile(tmp_path / "trap"), tmp_path / "hostile.pt"
    torch.save({"w": torch.zeros(3), "x": hostile if where == "value" else {"x._extra_state": hostile}}, trap)
    with pytest.raises(UserError, match="nothing of it was run or loaded") as error:
        read(trap)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trap").exists()
    torch.load(trap, weights_only=False)
    assert (tmp_path / "trap").exists()  # the trap works


@pytest.mark.parametrize("kept", [0, 1, 60, 2000, -1])
def test_incomplete_file(file, kept):
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    with pytest.raises(UserError, match="not a file of torch.save|damaged or incomplete"):
        read(file)


@pytest.mark.parametrize(
    "part, damaged", [(b"nested", b"\xd7ested"), (b"_rebuild_tensor_v2", b"_rebuild_tensor_v2"[::-1])]
)
def test_damaged_file(file, part, damaged):
    file.write_bytes(file.read_bytes().replace(part, damaged))
    with pytest.raises(UserError, match="damaged or incomplete|nothing of it was run or loaded"):
        read(file)


def test_a_pickle_that_ends_too_early(file):
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(file.with_name("short.pt"), "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data[:2] if name.endswith("/data.pkl") else data)
    with pytest.raises(UserError, match=r"damaged or incomplete \(it ends too early\)"):
        read(file.with_name("short.pt"))


def test_old_and_foreign_formats(tmp_path, file):
    torch.save(SAVED["bf16"], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="load and save it again"):
        read(tmp_path / "old.pt")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match="compressed"):
        read(tmp_path / "small.pt")
    with zipfile.ZipFile(tmp_path / "text.pt", "w") as archive:
        archive.writestr("a/notes.txt", "no tensors")
    with pytest.raises(UserError, match="damaged or incomplete"):
        read(tmp_path / "text.pt")
