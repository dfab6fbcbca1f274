# SPDX-License-Identifier: Apache-2.0
"""examples/studies/dependency_map.py on models whose dependencies are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evo2_megatron.config import UserError
from helpers import read_tsv

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def dependency_map(study):
    return study("dependency_map")


def partners(distance: int, strength: float):
    """A model in which the base that pairs with the one ``distance`` before has probability ``strength``."""

    def distributions(sequences):
        results = []
        for sequence in sequences:
            prob = np.full((len(sequence), 4), 0.25)
            for at in range(distance, len(sequence)):
                prob[at] = (1 - strength) / 3
                prob[at, 3 - b"ACGT".index(sequence[at - distance])] = strength
            results.append(np.log(prob).astype(np.float32))
        return results

    return distributions


@pytest.mark.parametrize("context", [3, 40])
def test_pairs_stand_out_in_the_dependency_map(dependency_map, tmp_path, context):
    rng = np.random.default_rng(3)
    contig = rng.choice(np.frombuffer(b"ACGT", np.uint8), 200).tobytes()
    got = dependency_map.dependency_map(partners(7, 0.7), contig, tmp_path, start=50, end=120, context=context)

    # a base that was 0.7 becomes 0.1 and the other way round, whatever it is replaced by; on both strands
    change = math.log2(0.7 / 0.3) - math.log2(0.1 / 0.9)
    pair = np.abs(np.subtract.outer(range(70), range(70))) == 7
    np.testing.assert_allclose(got[pair], change, rtol=1e-5)
    assert np.abs(got[~pair]).max() < 1e-5
    rows = read_tsv(tmp_path / "dependency_map.tsv")
    assert len(rows) == 70 * 69
    shown = {(int(row["position"]), int(row["depends"])): row for row in rows}
    assert float(shown[60, 67]["dependency"]) == pytest.approx(change, rel=1e-4) and shown[60, 67]["strand"] == "+"
    assert shown[67, 60]["strand"] == "-" and shown[60, 67]["base"] == chr(contig[60])
    assert (tmp_path / "dependency_map.png").read_bytes().startswith(PNG)


def test_a_dependency_of_one_direction_is_on_one_side(dependency_map, tmp_path):
    """A model that only knows the letter T of the strand as it is; on the other strand that is A."""

    def after_t(sequences):
        rows = [np.full((len(sequence), 4), 0.25) for sequence in sequences]
        for row, sequence in zip(rows, sequences):
            row[1:][[base == ord("T") for base in sequence[:-1]]] = (0.7, 0.1, 0.1, 0.1)
        return [np.log(row) for row in rows]

    got = dependency_map.dependency_map(after_t, b"CCCCTCCCCC", tmp_path, start=1, end=9, context=1)
    # whatever else there is becomes T once, and the T something else
    np.testing.assert_allclose(np.diag(got, 1), math.log2(0.7 / 0.3) - math.log2(0.25 / 0.75), rtol=1e-6)
    np.testing.assert_allclose(np.diag(got, -1), math.log2(0.7 / 0.3) - math.log2(0.25 / 0.75), rtol=1e-6)
    assert np.abs(np.triu(got, 2)).max() == np.abs(np.tril(got, -2)).max() == 0


def test_odds(dependency_map):
    odds = dependency_map.log2_odds(np.log(np.array([[0.5, 0.25, 0.125, 0.125]])))
    np.testing.assert_allclose(odds, np.log2([[1, 1 / 3, 1 / 7, 1 / 7]]))
    near_one = dependency_map.log2_odds(np.array([[-1e-12, -29.0, -29.0, -29.0]]))
    assert near_one[0, 0] == pytest.approx(-math.log2(3 * math.exp(-29)), rel=1e-6)


@pytest.mark.parametrize(
    "start, end, message", [(0, 1, "two bases or more"), (-1, 5, "two bases"), (3, 13, "two bases"), (5, 9, "has 'N'")]
)
def test_regions_that_are_none(dependency_map, start, end, message):
    with pytest.raises(UserError, match=message):
        dependency_map.check(b"ACGTACNACGTA", start, end)
