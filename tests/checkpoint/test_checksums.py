# SPDX-License-Identifier: Apache-2.0
"""``SHA256SUMS``: coreutils reads it, and one wrong bit of the weights is found wherever they are looked at."""

from __future__ import annotations

import logging
import shutil
import subprocess

import pytest

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.checkpoint import checksums
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.tasks import self_test

ONE = ParallelConfig()


@pytest.fixture(scope="module")
def written(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / written.name)


@pytest.fixture
def flipped(copy):
    """With the last bit of one value in the middle of the weights flipped."""
    (file,) = copy.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return copy


def test_as_sha256sum_has_it(written, copy):
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=written, check=True)
    assert checksums.read(written).keys() == {".metadata", "__0_0.distcp"}
    (copy / "run_config.yaml").write_text("# one may edit it\n" + (copy / "run_config.yaml").read_text())
    assert checksums.verify(copy)
    subprocess.run("sha256sum --binary .metadata > SHA256SUMS", shell=True, cwd=copy, check=True)
    assert checksums.verify(copy) and checksums.read(copy).keys() == {".metadata"}


def test_one_wrong_bit(flipped):
    with pytest.raises(UserError, match="__0_0.distcp is not the file that was written: .* copy it again"):
        checksums.verify(flipped)
    (flipped / "SHA256SUMS").unlink()
    assert not checksums.verify(flipped)


def test_a_file_that_is_missing_or_damaged(copy):
    (copy / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match="iter_0000001 lacks __0_0.distcp; copy it again"):
        checksums.verify(copy)
    (copy / "SHA256SUMS").write_bytes(b"\xff\n")
    with pytest.raises(UserError, match="SHA256SUMS is damaged; copy it again, or remove it"):
        checksums.verify(copy)


def test_scores_of_other_weights_are_not_written(flipped, tmp_path):
    from evo2_megatron.tasks.scoring.predict import predict
    from evo2_megatron.tasks.scoring.prediction_settings import Files, Output

    (tmp_path / "x.fa").write_text(">a\nACGT\n>b\nGATTACA\n")
    files = Files(output_dir=tmp_path / "out", formats=("tsv",))
    with pytest.raises(UserError, match="__0_0.distcp is not the file that was written"):
        predict(tmp_path / "x.fa", flipped, output=Output(log_probs="sum"), files=files)
    assert not {path.name for path in files.output_dir.iterdir()} & {"scores.tsv", "manifest.json"}
    (flipped / "SHA256SUMS").unlink()  # as of somebody who knows what was changed
    predict(tmp_path / "x.fa", flipped, output=Output(log_probs="sum"), files=files)
    assert (files.output_dir / "scores.tsv").exists()


def test_the_self_test_looks_first(flipped, copy, caplog):
    with pytest.raises(UserError, match="__0_0.distcp is not the file that was written"):
        self_test.run(flipped.parent, parallel=ONE)
    checksums.write(copy)
    caplog.set_level(logging.INFO)
    with pytest.raises(UserError, match="self_test.json"):  # which this checkpoint has not
        self_test.run(copy, parallel=ONE)
    assert "are those that were written, by its SHA256SUMS" in caplog.text
