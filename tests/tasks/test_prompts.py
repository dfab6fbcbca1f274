# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.tasks.prompts import Prompt, RecordFile, read_prompts


def test_read_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"id": "a b", "prompt": "ACGT", "more": 1}\n\n{"prompt": "|d__B|"}\r\n{"id": 7, "prompt": "N"}\n  \n'
    )
    assert read_prompts(path) == [Prompt("a b", "ACGT"), Prompt("2", "|d__B|"), Prompt("7", "N")]


def test_read_prompts_keeps_line_separators_inside_a_string(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('\ufeff{"prompt": "A\u2028C"}\n{"prompt": "G"}', encoding="utf-8")
    assert [p.text for p in read_prompts(path)] == ["A\u2028C", "G"]


def test_read_prompts_of_an_empty_file(tmp_path):
    (tmp_path / "empty").write_text("")
    assert read_prompts(tmp_path / "empty") == []


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"prompt": "A"}\n\n{"id": 1}\n', "line 3: missing required 'prompt' field"),
        (b'{"prompt": "A"}\nACGT\n', "line 2 is not JSON"),
        (b'["ACGT"]', "line 1 is not a JSON object"),
        (b'{"prompt": 5}', "line 1: 'prompt' is 5"),
        (b'{"prompt": null}', "line 1: 'prompt' is None"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_prompt_files(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_prompt_file(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"cannot be read.*--prompt-file"):
            read_prompts(path)


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


def test_record_file_without_a_record_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), RecordFile(tmp_path / "out.jsonl"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_record_file_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a folder"):
        RecordFile(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        RecordFile(tmp_path / "file" / "out.jsonl")
