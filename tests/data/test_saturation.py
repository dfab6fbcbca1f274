# SPDX-License-Identifier: Apache-2.0
"""All substitutions in intervals: each base once, in the genome's order, with the three others."""

import random

from evo2_megatron.data import saturation
from evo2_megatron.data.bed import Interval
from evo2_megatron.data.genome import Genome
from evo2_megatron.data.saturation import joined, substitutions


def test_intervals_are_joined():
    intervals = [("b", 5, 9), ("a", 7, 9), ("a", 1, 4), ("a", 3, 6), ("a", 6, 7), ("b", 1, 4), ("b", 2, 3)]
    found = joined((Interval(*i, name="x", strand="-") for i in intervals), ["b", "c", "a"])
    assert found == [Interval("b", 1, 4), Interval("b", 5, 9), Interval("a", 1, 9)]
    assert joined([], ["a"]) == []


def test_each_base_once(tmp_path, monkeypatch):
    monkeypatch.setattr(saturation, "_BASES_AT_A_TIME", 7)
    bases = "".join(random.Random(1).choices("ACGTacgtNR", k=60))
    (tmp_path / "g.fa").write_text(f">a\n{bases}\n>b\nACGT\n")
    with Genome(tmp_path / "g.fa") as genome:
        found = list(substitutions([Interval("a", 3, 50), Interval("b", 0, 4)], genome))
    expected = [(b"a", at + 1, bases[at].upper()) for at in range(3, 50) if bases[at].upper() in "ACGT"]
    expected += [(b"b", at + 1, "ACGT"[at]) for at in range(4)]
    assert [(r.contig, r.position, r.ref.decode()) for r in found] == expected
    assert [r.line for r in found] == list(range(1, len(found) + 1))
    assert all(sorted((r.ref, *r.alts)) == [b"A", b"C", b"G", b"T"] for r in found)
