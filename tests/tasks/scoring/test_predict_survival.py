# SPDX-License-Identifier: Apache-2.0
"""What a run does to its folder when it is cut off, when the disk is full, or when it is not alone there."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import UserError
from evo2_megatron.tasks.scoring import prediction_tables as tables
from evo2_megatron.tasks.scoring import variant_files
from evo2_megatron.tasks.scoring.prediction_files import TensorFiles, write_beside
from evo2_megatron.tasks.scoring.prediction_folder import LOCK
from evo2_megatron.tasks.scoring.prediction_parts import Parts
from evo2_megatron.tasks.scoring.prediction_tracks import write_bedgraph
from helpers import no_file_larger_than

PREDICT = "from evo2_megatron.cli.predict import main; main()"
VARIANTS = "from evo2_megatron.cli.variants import main; main()"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SEQUENCES = {f"s{i}": "".join(random.Random(i).choices("ACGT", k=100 + i)) for i in range(60)}


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def fasta(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fasta") / "x.fa"
    path.write_text("".join(f">{name}\n{bases}\n" for name, bases in SEQUENCES.items()))
    return path


def run(fasta: Path, checkpoint: Path, out: Path, *, log_probs="sum", formats=("tsv",), **settings) -> None:
    from evo2_megatron.tasks.scoring.predict import predict
    from evo2_megatron.tasks.scoring.prediction_settings import Files, Output, Sequences

    files = Files(output_dir=out, formats=formats)
    predict(fasta, checkpoint, output=Output(log_probs=log_probs), files=files, sequences=Sequences(**settings))


def vcf_with(num_lines: int, folder: Path) -> Path:
    path = folder / "in.vcf"
    lines = [f"s0\t{i}\t.\t{base}\t<DEL>\t.\t.\t.\n" for i, base in enumerate("A" * num_lines, 1)]
    path.write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n" + "".join(lines))
    return path


def write_tensors(path: Path) -> None:
    files = TensorFiles(path.parent, rank=0, data_parallel_rank=0, data_parallel_size=1)
    files.write_all([{"x": torch.randn(2, 9000), "y": torch.randn(2, 90), "seq_idx": torch.arange(2)}])


SCORES = [tables.Score(f"name{i}", i, i, i / 3, i / 7) for i in range(9000)]
ARRAY = np.random.default_rng(0).random((90, 300), np.float32)
ARRAYS = [tables.Array(name, ARRAY.shape, lambda: ARRAY) for name in "ab"]
BASES = tables.Bases("a", np.arange(1, 9001), b"A" * 9000, {"log_prob": np.arange(9000, dtype=np.float32)})
ROWS = [variant_files.Row("c", i, ".", "A", "C", i / 3, i / 7, i / 9, i, "scored") for i in range(9000)]
WRITERS = {
    "predictions__rank_0__dp_rank_0.pt": write_tensors,
    "scores.tsv": lambda path: tables.write_rows(path, tables.Score, SCORES),
    "scores.parquet": lambda path: tables.write_rows(path, tables.Score, SCORES),
    "bases.tsv": lambda path: tables.write_bases(path, {"log_prob": None}, [BASES]),
    "bases.parquet": lambda path: tables.write_bases(path, {"log_prob": None}, [BASES]),
    "log_prob.bedgraph": lambda path: write_bedgraph(path, "log_prob", [BASES]),
    "logits.npz": lambda path: tables.write_arrays(path, ARRAYS),
    "logits.safetensors": lambda path: tables.write_arrays(path, ARRAYS),
    "variants.tsv": lambda path: tables.write_rows(path, variant_files.Row, ROWS),
    "variants.parquet": lambda path: tables.write_rows(path, variant_files.Row, ROWS),
}


@pytest.mark.parametrize("limit", [1, 8192, 30_000])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(tmp_path, name, limit):
    with no_file_larger_than(limit), pytest.raises(UserError) as refused:
        WRITERS[name](tmp_path / name)
    assert str(refused.value) == (
        f"{tmp_path / name}: File too large; mend that and run the same command again, which goes on from here"
    )
    assert list(tmp_path.iterdir()) == []
    WRITERS[name](tmp_path / name)
    assert (tmp_path / name).stat().st_size > limit


def test_other_errors_of_torch_are_not_the_disk(tmp_path):
    from evo2_megatron.checkpoint.torch_file import save_tensors

    class Closed:
        def write(self, data: bytes) -> int:
            raise RuntimeError("not the disk")

    with pytest.raises(RuntimeError):
        write_beside(tmp_path / "x.pt", lambda file: save_tensors({"x": torch.zeros(3)}, Closed()))
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_disk_is_full_goes_on(fasta, checkpoint, tmp_path):
    """The first batches fit, the table of all does not."""
    out = tmp_path / "out"
    settings = {"log_probs": "per_token", "max_batch_tokens": 1000}
    with no_file_larger_than(100_000), pytest.raises(UserError, match=f"^{out}/bases.tsv: File too large; mend that"):
        run(fasta, checkpoint, out, **settings)
    assert sorted(path.name for path in out.iterdir()) == [".parts", "scores.tsv"]
    run(fasta, checkpoint, out, **settings)
    run(fasta, checkpoint, tmp_path / "other", **settings)
    for name in ("scores.tsv", "bases.tsv"):
        assert (out / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("code", [PREDICT, VARIANTS])
def test_a_full_disk_is_one_line_and_status_2(fasta, checkpoint, tmp_path, code):
    flags = ["--fasta", fasta, "--ckpt-dir", checkpoint, "--output-dir", tmp_path / "out"]
    if code == VARIANTS:
        flags += ["--vcf", vcf_with(3000, tmp_path)]
    command = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", sys.executable, "-c", code, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "File too large; mend that and run the same command again" in done.stderr.splitlines()[-1]


def started(fasta: Path, checkpoint: Path, out: Path, *, code: str = PREDICT) -> subprocess.Popen:
    """A run with 30 batches that has finished one."""
    flags = ["--output-log-prob-seqs", "--micro-batch-size", "2", "--output-format", "tsv"]
    command = [sys.executable, "-c", code, *flags, "--fasta", fasta, "--ckpt-dir", checkpoint, "--output-dir", out]
    job = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not list((out / ".parts").glob("batch_*.pt")):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.001)
    return job


def test_no_process_has_a_part_when_one_deletes_them(fasta, checkpoint, tmp_path, monkeypatch):
    """NFS would keep the file, and with it the folder, as long as a process of the machine has it mapped."""
    mapped = []
    monkeypatch.setattr(Parts, "remove", lambda _: mapped.append(str(tmp_path) in Path("/proc/self/maps").read_text()))
    run(fasta, checkpoint, tmp_path, formats=("pt", "tsv"))
    assert mapped == [False]


def test_a_folder_that_another_run_writes_to(fasta, checkpoint, tmp_path):
    from evo2_megatron.tasks.scoring.variant_sources import VcfFile
    from evo2_megatron.tasks.scoring.variants import score_variants

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / LOCK).open("w") as lock:
        # locks of two open files exclude each other in one process, too
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"another run is writing to {tmp_path / 'out'}; wait for its end, or"):
            run(fasta, checkpoint, tmp_path / "out")
        with pytest.raises(UserError, match=f"another run is writing to {tmp_path / 'out'}; wait for its end, or"):
            score_variants(VcfFile(vcf_with(3, tmp_path)), fasta, checkpoint, output_dir=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]


@pytest.mark.slow
def test_two_runs_at_once(fasta, checkpoint, tmp_path):
    """The second, of the same settings or others, is refused; the first ends as if it had been alone."""
    out = tmp_path / "out"
    job = started(fasta, checkpoint, out)
    job.send_signal(signal.SIGSTOP)
    for settings in ({"micro_batch_size": 2}, {"micro_batch_size": 2, "prepend_bos": True}):
        with pytest.raises(UserError, match=f"another run is writing to {out}; wait for its end, or choose another"):
            run(fasta, checkpoint, out, **settings)
    job.send_signal(signal.SIGCONT)
    assert job.wait() == 0, job.stderr.read()
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "scores.tsv", "seq_idx_map.json"]
    run(fasta, checkpoint, tmp_path / "alone", micro_batch_size=2)
    assert (out / "scores.tsv").read_bytes() == (tmp_path / "alone" / "scores.tsv").read_bytes()


SLOW_DISK = """
import time
from evo2_megatron.tasks.scoring import prediction_tables

class Slow:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        self.file.write(data)
        self.file.flush()
        time.sleep(60)

write_beside = prediction_tables.write_beside
prediction_tables.write_beside = lambda path, write: write_beside(path, lambda file: write(Slow(file)))
"""


@pytest.mark.slow
def test_a_run_that_is_terminated_leaves_nothing_half_written(fasta, checkpoint, tmp_path):
    out = tmp_path / "out"
    job = started(fasta, checkpoint, out, code=SLOW_DISK + PREDICT)
    while not list(out.glob(".scores.tsv.*.partial")):
        assert job.poll() is None
        time.sleep(0.01)
    job.terminate()
    assert job.wait() == 130
    assert job.stderr.read().splitlines()[-1] == "predict_evo2: interrupted"
    assert [path.name for path in out.iterdir()] == [".parts"]


def test_an_input_among_the_results_stays(fasta, checkpoint, tmp_path):
    from evo2_megatron.tasks.scoring.variant_sources import VcfFile
    from evo2_megatron.tasks.scoring.variants import score_variants

    vcf = vcf_with(3, tmp_path).rename(tmp_path / "variants.vcf")
    text = vcf.read_bytes()
    with pytest.raises(UserError, match="--vcf .* is .*variants.vcf, a name that results have in --output-dir"):
        score_variants(VcfFile(vcf), fasta, checkpoint, output_dir=tmp_path, formats=("vcf",))
    bases = tmp_path / "scores.tsv"
    bases.write_bytes(fasta.read_bytes())
    with pytest.raises(UserError, match="--fasta .*, a name that results have in --output-dir: it would be removed"):
        run(bases, checkpoint, tmp_path)
    assert vcf.read_bytes() == text and bases.read_bytes() == fasta.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.tsv", "variants.vcf"]
