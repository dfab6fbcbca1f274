# SPDX-License-Identifier: Apache-2.0
import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from evo2_megatron.cli import generation_groups
from evo2_megatron.config import UserError
from evo2_megatron.data.fasta import read_fasta
from evo2_megatron.tasks.generation.completion import Generation
from evo2_megatron.tasks.generation.prompts import FASTA_SUFFIXES, Prompt, read_prompts
from evo2_megatron.tasks.generation.records import (
    FORMATS,
    RecordFile,
    check_format,
    format_of,
    make_record,
    sequence_name,
    write_as,
)


def record(name="x", completion="ACGT", *, log_probs=None, sample=None, stop_string=None, prompt="GG", seed=5):
    generation = Generation([ord(c) for c in completion], "stop" if stop_string else "length", log_probs, stop_string)
    return make_record(Prompt(name, prompt), generation, num_prompt_tokens=len(prompt), seed=seed, sample=sample)


def test_make_record():
    assert record() == {
        "id": "x",
        "prompt": "GG",
        "completion": "ACGT",
        "finish_reason": "length",
        "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6},
        "seed": 5,
    }
    more = record(log_probs=[-1.0] * 4, sample=3, stop_string="TAA")
    assert (more["sample"], more["stop_string"], more["finish_reason"]) == (3, "TAA", "stop")
    assert more["logprobs"] == {"completion_logprobs": [-1.0] * 4}


def test_json_lines():
    records = [record(), record(log_probs=[-0.5] * 4)]
    assert [json.loads(line) for line in write_as("jsonl", records).splitlines()] == records


def test_fasta(tmp_path):
    long = "ACGT" * 35
    records = [record("a b", long, sample=1), record(completion="ACG", log_probs=[-1.0, -0.25, -1.0]), record("e", "")]
    text = write_as("fasta", records)
    assert text.splitlines() == [
        ">a_b.1 seed=5 finish_reason=length prompt_tokens=2 completion_tokens=140 total_tokens=142",
        *(long[:60], long[60:120], long[120:]),
        (
            ">x seed=5 finish_reason=length prompt_tokens=2 completion_tokens=3 total_tokens=5 log_prob_sum=-2.25"
            " log_prob_mean=-0.75"
        ),
        "ACG",
        ">e seed=5 finish_reason=length prompt_tokens=2 completion_tokens=0 total_tokens=2",
    ]
    (tmp_path / "out.fa").write_text(text)
    assert [(r.id, r.sequence.decode()) for r in read_fasta(tmp_path / "out.fa")] == [
        ("a_b.1", long),
        ("x", "ACG"),
        ("e", ""),
    ]


def test_table():
    rows = [line.split("\t") for line in write_as("text", [record("a b"), record("c", sample=0)]).splitlines()]
    assert rows == [
        ["id", "seed", "finish_reason", "sequence"],
        ["a_b", "5", "length", "ACGT"],
        ["c.0", "5", "length", "ACGT"],
    ]
    heading, row = write_as("text", [record(log_probs=[-1.0, -2.5, -1e-9, -3.0])]).splitlines()
    assert heading.split("\t")[-1] == "log_probs"
    assert [float(x) for x in row.split("\t")[-1].split(",")] == [-1.0, -2.5, -1e-9, -3.0]
    assert len(write_as("text", [record()], heading=False).splitlines()) == 1


@pytest.mark.parametrize("format_name", ["fasta", "text"])
def test_prompt_before_completion(format_name):
    last = write_as(format_name, [record()], include_prompt=True).splitlines()[-1]
    assert last.split("\t")[-1] == "GGACGT"


def test_fasta_with_prompts_can_be_continued(tmp_path):
    (tmp_path / "out.fa").write_text(write_as("fasta", [record("a"), record("b", "T")], include_prompt=True))
    assert read_prompts(tmp_path / "out.fa") == [Prompt("a", "GGACGT"), Prompt("b", "GGT")]


@pytest.mark.parametrize("bad", ["A>C", "A C", "A\tC", "A\nC", "A\u00e9", "\x7f"])
def test_what_fasta_cannot_hold(bad):
    with pytest.raises(UserError, match="'x' has .*--alphabet ACGT, or write .jsonl"):
        write_as("fasta", [record(completion=bad)])
    assert json.loads(write_as("jsonl", [record(completion=bad)]))["completion"] == bad
    if bad in ("A>C", "A C"):
        assert bad in write_as("text", [record(completion=bad)])
    else:
        with pytest.raises(UserError, match="cannot hold"):
            write_as("text", [record(completion=bad)])


def test_format_of(tmp_path):
    for name, want in (("x.txt", "text"), ("x.TSV", "text"), ("x.jsonl", "jsonl"), ("x", "jsonl"), ("x.out", "jsonl")):
        assert format_of(tmp_path / name) == format_of(tmp_path / f"{name}.gz") == want
    assert {format_of(tmp_path / f"x{suffix}") for suffix in FASTA_SUFFIXES} == {"fasta"}


def test_formats_of_the_commands():
    """They list them without loading this."""
    assert generation_groups.FORMATS == FORMATS


def test_check_format():
    names = [sequence_name(name, sample) for name, sample in (("a b", None), ("a b", 0), ("a_b", 1))]
    assert names == ["a_b", "a_b.0", "a_b.1"]
    check_format("fasta", names, include_prompt=True)
    check_format("jsonl", ["x", "x"], include_prompt=False)
    check_format("text", ["x", "x", ""], include_prompt=True)
    with pytest.raises(UserError, match="two FASTA records would be named 'x'"):
        check_format("fasta", ["x", "y", "x"], include_prompt=False)
    with pytest.raises(UserError, match="empty id"):
        check_format("fasta", [sequence_name(" ", None)], include_prompt=False)
    with pytest.raises(UserError, match="leave out --include-prompt"):
        check_format("jsonl", ["x"], include_prompt=True)


def test_record_file(tmp_path):
    path, part = tmp_path / "new" / "out.jsonl", tmp_path / "new" / "out.jsonl.part"
    first, second = {"id": "1"}, {"id": "2"}
    with RecordFile(path) as file:
        file.add([second])
        # what is finished is already there for others to see
        assert not path.exists() and part.read_text() == '{"id": "2"}\n'
        file.add([first])
        file.finish([first, second])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [first, second]
    assert list(path.parent.iterdir()) == [path]


def test_record_file_of_an_interrupted_run(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("of the last run\n")
    with pytest.raises(KeyboardInterrupt), RecordFile(path) as file:
        file.add([{"id": "1"}])
        raise KeyboardInterrupt
    assert path.read_text() == "of the last run\n"
    assert (tmp_path / "out.jsonl.part").read_text() == '{"id": "1"}\n'


def test_what_an_earlier_run_left_is_kept(tmp_path, caplog):
    path, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    part.write_text('{"id": "1"}\n')
    (tmp_path / "out.jsonl.part.1").write_text("of a still earlier one\n")
    with RecordFile(path) as file:
        file.finish([{"id": "2"}])
    assert (tmp_path / "out.jsonl.part.2").read_text() == '{"id": "1"}\n' and "out.jsonl.part.2" in caplog.text
    assert path.read_text() == '{"id": "2"}\n' and not part.exists()


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with RecordFile(path) as file:
        file.add([{"id": "1"}])
        with pytest.raises(UserError, match="another run is writing to .*out.jsonl; wait for its end"):
            RecordFile(path)
        file.finish([{"id": "1"}])
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_record_file_behind_a_link(tmp_path):
    target, link = tmp_path / "data" / "real.fa", tmp_path / "out.fa"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    with RecordFile(link) as file:
        file.finish([record("a")])
    assert link.is_symlink() and target.read_text() == write_as("fasta", [record("a")])


def test_record_file_without_a_record_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), RecordFile(tmp_path / "out.jsonl"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_record_file_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a folder"):
        RecordFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    read_end, write_end = os.pipe()  # a name that leads to nothing that has one, like /dev/stdout of a pipeline
    for path in (tmp_path / "pipe", Path("/dev/null"), Path(f"/dev/fd/{write_end}")):
        with pytest.raises(UserError, match="is a device or a pipe"):
            RecordFile(path)
    os.close(read_end)
    os.close(write_end)
    with pytest.raises(UserError, match="cannot be written"):
        RecordFile(tmp_path / "file" / "out.jsonl")


def test_record_file_in_other_formats(tmp_path):
    records = [record("a"), record("b")]
    for name, format_name, want in (("x.fa", None, "fasta"), ("y.jsonl", "text", "text"), ("z.fa.gz", None, "fasta")):
        with RecordFile(tmp_path / name, format_name=format_name, include_prompt=True) as file:
            file.add(records)
            # whatever the format, what is finished is whole
            assert (tmp_path / f"{name}.part").read_text() == write_as("jsonl", records)
            file.finish(records)
        content = (tmp_path / name).read_bytes()
        text = gzip.decompress(content) if name.endswith("gz") else content
        assert text.decode() == write_as(want, records, include_prompt=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.fa", "y.jsonl", "z.fa.gz"]


def test_record_that_does_not_fit_is_kept(tmp_path):
    path = tmp_path / "x.fa"
    with pytest.raises(UserError, match=f"'x' has '>'.*kept as JSON Lines in {path}.part"), RecordFile(path) as file:
        file.add([record(completion="A>")])
        file.finish([record(completion="A>")])
    assert [p.name for p in tmp_path.iterdir()] == ["x.fa.part"]
    assert json.loads((tmp_path / "x.fa.part").read_text())["completion"] == "A>"


def test_full_disk(tmp_path, monkeypatch):
    def full(self, content):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(UserError, match=r"No space left on device; make room"), RecordFile(tmp_path / "x.fa") as file:
        file.add([record()])
        file.finish([record()])
    assert [p.name for p in tmp_path.iterdir()] == ["x.fa.part"]
