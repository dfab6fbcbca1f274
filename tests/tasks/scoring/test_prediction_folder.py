# SPDX-License-Identifier: Apache-2.0
"""The folder of the results: one run at a time, and no input that the run would remove."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import UserError
from evo2_megatron.tasks.scoring import variant_files
from evo2_megatron.tasks.scoring.prediction_files import RESULTS
from evo2_megatron.tasks.scoring.prediction_folder import LOCK, check_inputs, reserved


@contextlib.contextmanager
def another_run(folder: Path) -> Iterator[None]:
    """What another process has of a folder: two open files exclude each other's locks in one process, too."""
    folder.mkdir(exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_one_run_at_a_time(one_process, tmp_path):
    folder = tmp_path / "new" / "out"
    with reserved(folder):
        with pytest.raises(UserError, match=f"another run is writing to {folder}; wait for its end"), reserved(folder):
            pass
        assert [path.name for path in folder.iterdir()] == [LOCK]
        (folder / "scores.tsv").touch()
    assert [path.name for path in folder.iterdir()] == ["scores.tsv"]
    with reserved(folder):
        pass


def test_a_folder_that_nothing_was_written_to_goes_again(one_process, tmp_path):
    (tmp_path / "old").mkdir()
    for folder in (tmp_path / "new" / "out", tmp_path / "old"):
        with pytest.raises(ZeroDivisionError), reserved(folder):
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert list((tmp_path / "old").iterdir()) == []


def test_what_a_killed_run_leaves_is_no_obstacle(one_process, tmp_path):
    code = "import sys; from pathlib import Path; from evo2_megatron.tasks.scoring.prediction_folder import _locked\n"
    code += "with _locked(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match="another run is writing to"), reserved(tmp_path):
            pass
        process.kill()
        process.wait()
    assert (tmp_path / LOCK).exists()
    with reserved(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_run_removes_meanwhile(one_process, tmp_path, monkeypatch):
    """Its name is free by the time this run has the lock: another run could make and lock a new one."""
    flock = fcntl.flock

    def late(file: int, operation: int) -> None:
        monkeypatch.setattr("fcntl.flock", flock)
        (tmp_path / LOCK).unlink()
        flock(file, operation)

    monkeypatch.setattr("fcntl.flock", late)
    with reserved(tmp_path), pytest.raises(UserError, match="another run is writing to"), reserved(tmp_path):
        pass


def test_disks_without_locks(one_process, tmp_path, monkeypatch, caplog):
    def refuse(file: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with reserved(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked (Function not implemented): let one run at a time use it" in caplog.text


def test_without_a_folder():
    with reserved(None):
        pass


@pytest.mark.slow
def test_all_processes_of_a_job_end(megatron, tmp_path):
    """Rank 0 speaks; the other does not wait for it until somebody ends the job."""
    checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "x.fa").write_text(">a\nACGT\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = ["--fasta", tmp_path / "x.fa", "--ckpt-dir", checkpoint, "--output-dir", tmp_path / "out"]
    command = [sys.executable, "-c", "from evo2_megatron.cli.predict import main; main()", *map(str, flags)]
    job = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    with another_run(tmp_path / "out"):
        processes = [
            subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, env=job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(2)
        ]
        errors = [process.communicate(timeout=120)[1].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    expected = f"another run is writing to {tmp_path / 'out'}; wait for its end, or choose another --output-dir"
    assert [lines[-1] for lines in errors] == [
        f"predict_evo2: error: {expected}",
        f"predict_evo2: error on rank 1: {expected}",
    ]
    assert "Traceback" not in str(errors)


@pytest.mark.parametrize(
    "name",
    ["scores.tsv", "predictions__rank_0__dp_rank_0.pt", "subdir_1/bases.tsv", ".parts/x.fa", ".scores.tsv.1.partial",
     LOCK],
)  # fmt: skip
def test_an_input_that_would_be_removed(tmp_path, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text(">a\nACGT\n")
    (tmp_path / "same").symlink_to(out)
    (tmp_path / "link.fa").symlink_to(out / name)
    for folder, fasta in [(out, out / name), (out, tmp_path / "link.fa"), (tmp_path / "same", out / name)]:
        with pytest.raises(UserError, match=f"--fasta {fasta} is {folder / name}, a name that results have in"):
            check_inputs(folder, RESULTS, fasta=fasta)
    assert (out / name).read_text() == ">a\nACGT\n"
    check_inputs(None, RESULTS, fasta=out / name)
    check_inputs(tmp_path / "other", RESULTS, fasta=out / name)


def test_a_result_that_is_a_link_to_the_input(tmp_path):
    (tmp_path / "in.vcf").touch()
    (tmp_path / "variants.vcf").symlink_to(tmp_path / "in.vcf")
    with pytest.raises(UserError, match="--vcf .*in.vcf is .*variants.vcf, a name that results have"):
        check_inputs(tmp_path, variant_files.RESULTS, vcf=tmp_path / "in.vcf", fasta=tmp_path / "x.fa")


def test_inputs_beside_the_results(tmp_path):
    for name in ("x.fa", "subdir/scores.tsv", "in.vcf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        check_inputs(tmp_path, RESULTS, fasta=tmp_path / name)
    (tmp_path / "scores.tsv").touch()
    check_inputs(tmp_path, variant_files.RESULTS, vcf=tmp_path / "in.vcf", fasta=tmp_path / "scores.tsv")


def test_pipes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="--fasta .*/pipe is no regular file, and is read more than once; write what"):
        check_inputs(None, RESULTS, fasta=tmp_path / "pipe")
    check_inputs(None, RESULTS, fasta=tmp_path / "nowhere.fa")
