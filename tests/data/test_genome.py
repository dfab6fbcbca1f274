# SPDX-License-Identifier: Apache-2.0
"""Bases by contig and position are those that read_fasta finds, at every block border."""

import gzip
import os
import random
import threading

import pytest

from evo2_megatron.data import genome
from evo2_megatron.data.fasta import read_fasta
from evo2_megatron.data.genome import Genome

MESSY = (
    b"\xef\xbb\xbf\n>one  first record\nACGT\nacgt\n\n>empty\n>two\ttab\r\nAC>GT\r\n  NN \r\n\r\n>three x>y\n"
    b"|d__A b;| AC\n \t\n>last\nAC GT  \n\n  TT"
)


@pytest.mark.parametrize("block", [*range(1, 12), 50, 1 << 17])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_any_slice_at_every_block_border(tmp_path, monkeypatch, block, compress):
    monkeypatch.setattr(genome, "BLOCK_BYTES", block)
    path = tmp_path / "a.fa"
    path.write_bytes(compress(MESSY))
    expected = {record.id.encode(): record.sequence for record in read_fasta(path)}

    with Genome(path) as found:
        assert found.lengths == {name: len(bases) for name, bases in expected.items()}
        slices = [(n, a, b) for n, bases in expected.items() for b in range(1, len(bases) + 1) for a in range(b)]
        random.Random(1).shuffle(slices)
        for name, start, end in slices:
            assert found.bases(name, start, end) == expected[name][start:end]


def test_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b">one\nACGT\nAC\n",))
    writer.start()
    with Genome(path) as found:
        assert found.bases(b"one", 3, 5) == b"TA"
    writer.join()
