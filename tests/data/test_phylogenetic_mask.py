# SPDX-License-Identifier: Apache-2.0
"""Mask of lineage tags: worked examples, and a literal reference on random texts."""

import random

import numpy as np
import pytest

from evo2_megatron.data.phylogenetic_mask import phylogenetic_tag_mask

# text ("0" stands for the end of a document), mask, and the longest tag if it is not 2048
EXAMPLES = [
    ("A|d0|A", "100101"),
    ("ATG|R__tag|TCGA", "111000000001111"),
    ("tag;_|ATG", "000000111"),
    ("ATG|r_", "111000"),
    ("ATG|D", "11100"),
    ("ATG|;", "11100"),
    ("ATG|A", "00001"),
    ("|d__tag|", "00000000"),
    ("|ATG", "0111"),
    ("t|AAAT", "001111"),
    ("AAAT|d", "111100"),
    ("cat|AC", "000011"),
    ("cat|d", "11100"),
    ("cat|d_", "111000"),
    ("|d|", "010"),
    ("A|B|C", "00100"),
    ("A|B|C|D", "0010001"),
    ("ACG|ACG|d__x|ACG", "0000111000000111"),
    ("ACGT|", "11110"),
    ("xyz|", "0000"),
    ("ACGTX", "00000"),
    ("AE", "00"),
    ("x", "1"),
    ("E", "1"),
    ("_", "0"),
    ("|", "0"),
    ("cacata|acagataaaataTACAGGGAATA|d__", "0" * 7 + "1" * 23 + "0" * 4),
    ("GAATA0cacata|acagataaaataTACAGGGAATA|d__", "1" * 6 + "0" * 7 + "1" * 23 + "0" * 4),
    ("A" * 10 + "|" + "C" * 10, "1" * 10 + "0" + "1" * 10, 5),
    ("A" * 10 + "|" + "C" * 10, "0" * 11 + "1" * 10, 100),
    ("AAA|AAA|" + "A" * 10 + "|d__b", "00001110111111111100000", 5),
    ("", ""),
    ("0", "1"),
    ("000", "111"),
    ("A@C#N-", "111111"),
]


def to_ids(text):
    return np.array([0 if c == "0" else ord(c) for c in text], dtype=np.int64)


def to_text(mask):
    return "".join("01"[int(kept)] for kept in mask)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example[0] or "empty")
def test_worked_examples(example):
    text, mask, *longest = example

    assert to_text(phylogenetic_tag_mask(to_ids(text), max_tag_length=longest[0] if longest else 2048)) == mask


def reference(text, longest):
    """The rules, one after the other, on text."""
    valid = set("-ABCDGHKMNRSTUVWYabcdghkmnrstuvwy@#")
    if len(text) == 1:
        return "0" if text in "|_; " else "1"
    masks = []
    for segment in text.split("0"):
        good = all(c in valid for c in segment)
        if "|" not in segment:
            keep = [good or len(segment) >= longest] * len(segment)
        else:
            first = segment.index("|")
            rest = segment[first + 1 :]
            if not rest:
                keep = [first >= longest or all(c in valid for c in segment[:first])] * first + [False]
            else:
                tag = rest[0] not in "DdRr;" if len(rest) == 1 else not (rest[1] == "_" or rest[0] == ";")
                keep = []
                for region in segment.split("|"):
                    if tag and len(region) >= longest:
                        tag = False
                        keep += [True] * len(region)
                    else:
                        keep += [not tag] * len(region)
                    tag = not tag
                    keep.append(False)
                keep.pop()
        masks.append("".join("01"[k and c in valid] for k, c in zip(keep, segment, strict=True)))
    return "1".join(masks)


def test_random_texts_equal_the_reference():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("ACgtN|0dR_;xE@", weights=[9, 9, 9, 9, 1, 3, 2, 1, 1, 1, 1, 1, 1, 1],
                                   k=rng.randrange(1, 30)))  # fmt: skip
        longest = rng.choice([1, 2, 4, 8, 2048])
        got = to_text(phylogenetic_tag_mask(to_ids(text), max_tag_length=longest))
        assert got == reference(text, longest), (text, longest)


def test_rows_are_judged_one_by_one():
    rows = ["A|d0|A", "tag;_|", "ACGTAC"]
    mask = phylogenetic_tag_mask(np.stack([to_ids(row) for row in rows]))

    assert mask.dtype == bool
    assert [to_text(row) for row in mask] == [to_text(phylogenetic_tag_mask(to_ids(row))) for row in rows]


def test_another_end_of_document():
    tokens = to_ids("A|d0|A")

    assert to_text(phylogenetic_tag_mask(np.where(tokens == 0, 7, tokens), eod=7)) == "100101"
