# SPDX-License-Identifier: Apache-2.0
"""Where a Savanna checkpoint's files are: on disk in every form, and on a hub, downloaded by the real client."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.hub_server import COMMIT, HubServer
from evo2_megatron.checkpoint.savanna_files import SavannaFiles, find_savanna_files
from evo2_megatron.config import UserError


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def names(files):
    return [[path.name for path in parts] for parts in files.ranks]


def test_one_file(tmp_path):
    touch(tmp_path, "model.pt", "model.pt.part0")
    assert find_savanna_files(str(tmp_path / "model.pt")) == SavannaFiles(((tmp_path / "model.pt",),), None)
    assert find_savanna_files(str(tmp_path)).ranks == ((tmp_path / "model.pt",),)  # the joined file wins


def test_parts(tmp_path, monkeypatch):
    parts = [f"model.pt.part{i}" for i in range(12)]
    touch(tmp_path, *parts, "model.pt.part0.sha256", "notes.txt")
    for source in (tmp_path / "model.pt", tmp_path / "model.pt.part0", tmp_path / "model.pt.part7", tmp_path):
        assert names(find_savanna_files(str(source))) == [parts]  # part10 after part9
    monkeypatch.chdir(tmp_path)
    assert names(find_savanna_files("model.pt")) == [parts]
    (tmp_path / "model.pt.part3").unlink()
    with pytest.raises(UserError, match=r"model\.pt\.part3 is missing among 11 parts"):
        find_savanna_files(str(tmp_path / "model.pt"))


def test_parts_of_files_with_similar_names(tmp_path):
    touch(tmp_path, *(f"{name}.pt.part{i}" for name in ("model", "model_base", "model.pt.old") for i in range(2)))
    for source in ("model.pt", "model.pt.part1"):
        assert names(find_savanna_files(str(tmp_path / source))) == [["model.pt.part0", "model.pt.part1"]]
    with pytest.raises(UserError, match="model does not exist"):  # parts of both were taken for one file
        find_savanna_files(str(tmp_path / "model"))


def test_ranks(tmp_path):
    ranks = [f"mp_rank_{i:02d}_model_states.pt" for i in range(3)]
    step = touch(tmp_path / "global_step5", *ranks, "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "latest").write_text("global_step5\n")
    for source in (step, tmp_path):
        assert find_savanna_files(str(source)).ranks == tuple((step / name,) for name in ranks)
    (step / ranks[1]).unlink()
    with pytest.raises(UserError, match="lacks mp_rank_01_model_states.pt"):
        find_savanna_files(str(step))


@pytest.mark.parametrize(
    "there, message",
    [((), "found: none"), (("a.pt", "b.pt"), "found: a.pt, b.pt"), (("a.pt", "b.pt.part0"), "found: a.pt, b.pt")],
)
def test_a_folder_must_be_clear(tmp_path, there, message):
    with pytest.raises(UserError, match=message):
        find_savanna_files(str(touch(tmp_path / "folder", *there)))


@pytest.mark.parametrize("source", ["model.pt", "./owner/name", "/nowhere/model", "owner/name/model.pt", "a/b.pt", ""])
def test_a_path_is_never_looked_for_on_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(touch(tmp_path / "empty"))
    with pytest.raises(UserError, match="does not exist|must hold one"):
        find_savanna_files(source)


def test_a_revision_is_of_a_repository(tmp_path):
    with pytest.raises(UserError, match="--revision is for Hugging Face"):
        find_savanna_files(str(touch(tmp_path, "model.pt") / "model.pt"), revision="main")


ASK = """
import json, logging, sys
from evo2_megatron.checkpoint.savanna_files import find_savanna_files
from evo2_megatron.config import UserError
logging.basicConfig(level=logging.INFO)
for source, revision in json.loads(sys.argv[1]):
    try:
        files = find_savanna_files(source, revision=revision)
        print(json.dumps([[[str(p) for p in parts] for parts in files.ranks], files.revision]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def ask(url, cache, *questions, offline=False):
    """Answers of a new process: the client reads its environment when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, "-c", ASK, json.dumps(questions)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_hub(tmp_path):
    repositories = {
        "lab/whole": {"whole.pt": b"all of it", "README.md": b"text"},
        "lab/parts": {f"parts.pt.part{i}": bytes([i]) for i in range(11)},
        "lab/gap": {"gap.pt.part0": b"0", "gap.pt.part2": b"2"},
        "lab/other": {"model.safetensors": b"x"},
        "lab/gated": {"gated.pt": b"x"},
    }
    questions = [["lab/whole", None], ["lab/whole", COMMIT], ["lab/parts", None]]
    refused = [["lab/gap", None], ["lab/other", None], ["lab/gated", None], ["lab/none", None], ["lab/whole", "v9"]]
    cache = tmp_path / "cache"
    with HubServer(repositories) as hub:
        (whole, pinned, parts, *errors), log = ask(hub.url, cache, *questions, *refused)
        assert hub.downloads.count("whole.pt") == 1

    assert whole == pinned and whole[1] == parts[1] == COMMIT
    assert [Path(path).read_bytes() for path in whole[0][0]] == [b"all of it"]
    assert [Path(path).read_bytes() for path in parts[0][0]] == [bytes([i]) for i in range(11)]
    assert "name it with --revision to repeat this" in log
    expected = ("gap.pt.part1 is missing", "no file other.pt", "granted access", "neither a local path", "no commit")
    for error, message in zip(errors, expected, strict=True):
        assert message in error and "\n" not in error, error

    # the server is gone
    assert ask(hub.url, cache, *questions, offline=True)[0] == [whole, pinned, parts]
    (never,), _ = ask(hub.url, cache, ["lab/other", None], offline=True)
    assert "HF_HUB_OFFLINE=1 only the local cache is looked at" in never
    (unreachable,), _ = ask(hub.url, tmp_path / "empty", ["lab/whole", None])
    assert "could not be downloaded" in unreachable and "check the network" in unreachable
