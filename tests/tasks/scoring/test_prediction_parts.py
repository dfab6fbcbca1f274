# SPDX-License-Identifier: Apache-2.0
"""Finished batches: whose they are, and what of an earlier attempt stays when a run goes on."""

from pathlib import Path

import pytest
import torch

from evo2_megatron.config import UserError
from evo2_megatron.tasks.scoring import variant_files
from evo2_megatron.tasks.scoring.prediction_files import RESULTS
from evo2_megatron.tasks.scoring.prediction_parts import FOLDER, Parts, begin, identity

BATCHES = [[2], [0, 1]]


def part(value: float, rows: int = 1) -> dict[str, torch.Tensor]:
    return {"x": torch.full((rows,), value)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and FOLDER not in path.parts}


def test_what_is_kept(tmp_path):
    begin(tmp_path, {}, BATCHES)
    parts = Parts(tmp_path, BATCHES)
    assert parts.done() == set()
    parts.add(1, {"x": torch.tensor([10.0, 11.0])})
    again = Parts(tmp_path, BATCHES)
    assert again.done() == {1} and again.sequence(1)["x"] == 11
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_parts_of_another_plan_do_not_count(tmp_path):
    """A run that still writes when another one has begun in its folder."""
    begin(tmp_path, {"precision": "fp32"}, BATCHES)
    former = Parts(tmp_path, BATCHES)
    begin(tmp_path, {"precision": "bf16"}, BATCHES)
    parts = Parts(tmp_path, BATCHES)
    former.add(0, part(1.0))
    former.add(1, part(1.0, rows=2))
    assert parts.done() == set()
    parts.add(0, part(2.0))
    assert parts.done() == {0} and parts.batch(0)["x"] == 2
    with pytest.raises(FileNotFoundError):
        parts.batch(1)


def test_a_process_that_sees_another_folder(tmp_path):
    begin(tmp_path / "one", {}, BATCHES)
    with pytest.raises(UserError, match="is not the same folder for all processes; use a shared disk"):
        Parts(tmp_path / "two", BATCHES)


@pytest.mark.parametrize("batch_by_batch", [False, True])
def test_going_on_removes_what_is_written_again(tmp_path, batch_by_batch):
    """Such as the file of a rank that does not take part any more, or a table in a format that is not asked for."""
    begin(tmp_path, {}, BATCHES)
    Parts(tmp_path, BATCHES).add(0, part(1.0))
    results = {"predictions__rank_1__dp_rank_1.pt", "scores.tsv"}
    partial = {f".{name}.4711.partial" for name in results} | {".log_prob.bigwig.4711.bw"}
    for name in results | partial | {"notes.tsv", ".notes.tsv.4711.partial"}:
        (tmp_path / name).touch()
    begin(tmp_path, {}, BATCHES, batch_by_batch=batch_by_batch)
    assert names(tmp_path) == {"notes.tsv", ".notes.tsv.4711.partial"} | (results if batch_by_batch else set())
    assert Parts(tmp_path, BATCHES).done() == {0}


def test_going_on_with_variants(tmp_path):
    begin(tmp_path, {}, BATCHES, names=variant_files.RESULTS)
    ours = {"variants.vcf.gz", "skipped.tsv", ".variants.tsv.4711.partial", "manifest.json"}
    for name in ours | {"scores.tsv", "variants.txt"}:
        (tmp_path / name).touch()
    begin(tmp_path, {}, BATCHES, names=variant_files.RESULTS)
    assert names(tmp_path) == {"scores.tsv", "variants.txt"}


def test_half_written_files_go_when_a_run_begins(tmp_path):
    (tmp_path / "subdir_1").mkdir()
    half = tmp_path / "subdir_1" / ".predictions__rank_0__dp_rank_0__batch_3.pt.4711.partial"
    half.touch()
    begin(tmp_path, {}, BATCHES, names=RESULTS)
    assert not half.parent.exists()


def test_a_checkpoint_is_the_same_in_every_process(tmp_path):
    """Adapters and their base: in a set, these would be in another order in every process."""
    folders = [tmp_path / name for name in "badce"]
    for size, folder in enumerate(folders):
        (folder / "below").mkdir(parents=True)
        (folder / "below" / "file").write_bytes(bytes(size))
    found = identity(*folders, folders[0])
    assert [size for ((_, size, _),) in found] == [0, 1, 2, 3, 4]
    (folders[2] / "below" / "file").write_bytes(bytes(9))
    changed = identity(*folders)
    assert [one == other for one, other in zip(found, changed)] == [True, True, False, True, True]
