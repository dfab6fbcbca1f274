# SPDX-License-Identifier: Apache-2.0
"""Lineage tags."""

import random

import pytest

from evo2_megatron.config import UserError
from evo2_megatron.data.lineage import Lineage

COLI = Lineage(
    domain="Bacteria", phylum="Pseudomonadota", clazz="Gammaproteobacteria", order="Enterobacterales",
    family="Enterobacteriaceae", genus="Escherichia", species="Escherichia coli",
)  # fmt: skip


def test_tag():
    assert COLI.tag() == (
        "|d__Bacteria;p__Pseudomonadota;c__Gammaproteobacteria;o__Enterobacterales;f__Enterobacteriaceae;"
        "g__Escherichia;s__Escherichia coli|"
    )
    assert Lineage(genus="Homo").tag() == "|d__None;p__None;c__None;o__None;f__None;g__Homo;s__None|"


def test_dropout_of_each_rank():
    assert COLI.tag(1.0, random.Random(0)) == Lineage().tag()
    tags = [COLI.tag(0.25, random.Random(seed)) for seed in range(400)]
    assert 0.2 < sum(tag.count("None") for tag in tags) / (7 * 400) < 0.3
    assert len(set(tags)) > 50


@pytest.mark.parametrize("name", ["Bact|x", "Bact\nx", "\0"])
def test_a_name_that_would_end_its_tag(name):
    with pytest.raises(UserError, match="the lineage for 'a' has the name .*; a name has no '|'"):
        Lineage(species=name).check_fits(1000, key="a")
    Lineage(species="Escherichia coli; K-12 (x) \u00e4").check_fits(1000, key="a")


def test_check_fits_counts_what_dropout_may_lengthen():
    short = Lineage(domain="X")
    assert len(Lineage().tag()) == 57

    short.check_fits(58, key="a")
    with pytest.raises(UserError, match="prompt_spacer_length is 57"):
        short.check_fits(57, key="a")
