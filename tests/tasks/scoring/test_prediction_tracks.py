# SPDX-License-Identifier: Apache-2.0
"""Files for genome browsers, and what the library that writes them does not say."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pybigtools
import pytest

from evo2_megatron.config import UserError
from evo2_megatron.tasks.scoring.prediction_tables import Bases
from evo2_megatron.tasks.scoring.prediction_tracks import MAX_CONTIGS, check_num_contigs, write_bedgraph, write_bigwig

POSITIONS = np.array([2, 3, 7])
VALUES = np.array([-1.5, np.float32(-0.1), -3e-5], np.float32)
LENGTHS = {"chr1": 10, "chr10": 9, "chr2": 7}


def bases(names=LENGTHS, positions=POSITIONS):
    for name in names:
        yield Bases(name, positions, b"ACG"[: len(positions)], {"x": VALUES[: len(positions)]})


def test_bedgraph(tmp_path):
    write_bedgraph(tmp_path / "x.bedgraph", "x", bases(["b", "a"]))
    assert (tmp_path / "x.bedgraph").read_text().splitlines() == [
        'track type=bedGraph name="x"',
        *(
            f"{name}\t{line}"
            for name in "ba"
            for line in ("1\t2\t-1.5", "2\t3\t-0.100000001", "6\t7\t-2.99999992e-05")
        ),
    ]


def test_bigwig(tmp_path):
    write_bigwig(tmp_path / "x.bigwig", "x", LENGTHS | {"empty": 3}, bases())
    assert [path.name for path in tmp_path.iterdir()] == ["x.bigwig"]
    with pybigtools.open(str(tmp_path / "x.bigwig")) as track:
        assert track.chroms() == LENGTHS  # what has no value is not listed
        for name in LENGTHS:
            starts, ends, values = zip(*track.records(name))
            assert starts == (1, 2, 6) and ends == (2, 3, 7) and np.array_equal(np.float32(values), VALUES)


@pytest.mark.slow
def test_as_many_contigs_as_the_library_can_number(tmp_path):
    names = sorted(f"contig_{number}" for number in range(MAX_CONTIGS))
    one = np.array([1])
    write_bigwig(tmp_path / "x.bigwig", "x", dict.fromkeys(names, 3), bases(names, one))
    with pybigtools.open(str(tmp_path / "x.bigwig")) as track:
        assert list(track.chroms()) == names and list(track.records(names[-1])) == [(0, 1, -1.5)]
    check_num_contigs(MAX_CONTIGS)
    with pytest.raises(UserError, match="at most 65535 sequences, and the file has 65536; use bedgraph"):
        check_num_contigs(MAX_CONTIGS + 1)


def failing():
    yield from bases(["chr1"])
    raise OSError("a part cannot be read")


@pytest.mark.parametrize(
    "values, message",
    [
        (bases([]), "no base has a value, and a bigWig file cannot be empty; use bedgraph"),
        (bases(["chr1"], POSITIONS[::-1]), "x.bigwig could not be written"),
        (bases(["chr1"], POSITIONS + 9), "x.bigwig could not be written"),
        (failing(), "x.bigwig could not be written"),
    ],
    ids=["empty", "positions", "outside", "reading"],
)
def test_what_the_library_only_prints_is_an_error(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        write_bigwig(tmp_path / "x.bigwig", "x", LENGTHS, values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_values, num_bytes", [(3, 100), (3, 400), (30_000, 20_000)])
def test_a_full_disk_is_an_error(tmp_path, num_values, num_bytes):
    """At the end, where the library keeps quiet, and amid the values, where it panics."""
    code = f"""
import resource
from pathlib import Path
import numpy as np
from evo2_megatron.tasks.scoring.prediction_tables import Bases
from evo2_megatron.tasks.scoring.prediction_tracks import write_bigwig
resource.setrlimit(resource.RLIMIT_FSIZE, ({num_bytes}, resource.RLIM_INFINITY))
values = np.random.default_rng(0).random({num_values}, np.float32)
bases = Bases("a", np.arange(1, {num_values} + 1), b"", {{"x": values}})
write_bigwig(Path({str(tmp_path)!r}) / "x.bigwig", "x", {{"a": {num_values}}}, [bases])
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("evo2_megatron.config.UserError") and "could not be written; is the disk full?" in last
    assert list(tmp_path.iterdir()) == []


def test_no_room(tmp_path):
    with pytest.raises(UserError, match="GB free and the result needs 32000000.0 GB"):
        write_bigwig(tmp_path / "x.bigwig", "x", {"chr1": 4 * 10**15}, bases(["chr1"]))
