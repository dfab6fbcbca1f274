# SPDX-License-Identifier: Apache-2.0
"""Windows of variants against sequences that are edited by hand, wherever the variant is on the contig."""

import random

import pytest

from evo2_megatron.data.genome import Genome
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.tasks.scoring.variant_windows import (
    Comparison,
    Edit,
    WindowSettings,
    edit_of,
    group_of,
    make_groups,
    plan_groups,
    why_no_window,
)

CONTIG = "".join(random.Random(1).choices("ACGTacgt", k=300))


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    path = tmp_path_factory.mktemp("genome") / "g.fa"
    path.write_text(f">c\n{CONTIG}\n>repeat\nGCACACACACATTTTTG\n>a\n{'A' * 3000}C\n")
    with Genome(path) as opened:
        yield opened


def by_hand(edit, settings, reverse):
    """Reference and alternative as they are read: the whole contig is edited, then both are cut."""
    whole = CONTIG.upper().encode()
    edited = whole[: edit.start] + edit.bases + whole[edit.end :]
    length = min(settings.length, len(whole), len(edited))
    first = (edit.start - settings.length // 2) // settings.step * settings.step
    first = min(max(first, 0), max(len(whole) - settings.length, 0))
    lost = max(len(whole) - len(edited), 0)
    if reverse:
        end = min(max(first + min(settings.length, len(whole)), length + lost), len(whole))
        whole, edited = whole[:end], edited[: end + len(edited) - len(whole)]
        return reverse_complement(whole)[:length], reverse_complement(edited)[:length]
    first = max(min(first, len(whole) - length - lost), 0)
    return whole[first:][:length], edited[first:][:length]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length, step", [(64, 1), (64, 16), (299, 1), (300, 7), (1000, 1)])
def test_both_sequences(genome, length, step, reverse):
    settings = WindowSettings(length, step)
    for start in range(len(CONTIG) + 1):
        for removed, added in ((1, b"A"), (0, b"ACGTT"), (9, b""), (2, b"GG"), (3, b"TACCA"), (20, b"C")):
            edit = Edit(start, start + removed, added)
            if edit.end > len(CONTIG) or why_no_window(edit, len(CONTIG), settings):
                continue
            group = group_of(b"c", len(CONTIG), edit, settings, reverse=reverse)
            group.edits.append(edit)
            reference, (alternative,) = group.reference(genome), group.alternatives(genome)
            assert (reference, alternative) == by_hand(edit, settings, reverse)
            assert len(reference) == len(alternative) == min(length, len(CONTIG) - max(edit.num_lost, 0))
            if group.num_shared:  # the base after them is predicted from them, so it must be the same, too
                shared = slice(0, group.num_shared + 1)
                assert reference[shared] == alternative[shared]
            if length < 200 and 100 < start < 150:
                assert group.num_shared > length // 2 - step - 25 - removed
                assert len(reference) == length


@pytest.mark.parametrize(
    "edit, length, reason",
    [
        (Edit(0, 1, b"A"), 300, None),
        (Edit(299, 300, b"A"), 300, None),
        (Edit(0, 0, b"A"), 300, "contig_end"),
        (Edit(300, 300, b"A"), 300, "contig_end"),
        (Edit(290, 300, b""), 300, "contig_end"),
        (Edit(100, 131, b""), 300, None),
        (Edit(100, 132, b""), 300, "too_long"),
        (Edit(100, 100, b"A" * 32), 300, "too_long"),
        (Edit(0, 1, b"C"), 1, "contig_too_short"),
        (Edit(1, 2, b""), 3, None),
    ],
)
def test_what_has_no_window(edit, length, reason):
    assert why_no_window(edit, length, WindowSettings(64, 1)) == reason


@pytest.mark.parametrize(
    "contig, position, ref, alt, edit",
    [
        (b"c", 10, b"X", b"Y", Edit(10, 11, b"Y")),
        (b"c", 10, b"XYZ", b"XWZ", Edit(11, 12, b"W")),
        (b"c", 10, b"XYZ", b"WYV", Edit(10, 13, b"WYV")),
        (b"repeat", 8, b"ACA", b"A", Edit(1, 3, b"")),  # any CA or AC of the repeat
        (b"repeat", 1, b"CAC", b"C", Edit(1, 3, b"")),
        (b"repeat", 0, b"GCA", b"G", Edit(1, 3, b"")),
        (b"repeat", 10, b"A", b"ACA", Edit(1, 1, b"CA")),
        (b"repeat", 15, b"T", b"TT", Edit(11, 11, b"T")),
        (b"repeat", 15, b"TG", b"G", Edit(11, 12, b"")),
        (b"repeat", 0, b"GC", b"GTC", Edit(1, 1, b"T")),
        (b"a", 2999, b"AC", b"C", Edit(0, 1, b"")),  # over several blocks
        (b"a", 2998, b"AA", b"AAAAA", Edit(0, 0, b"AAA")),
    ],
)
def test_one_variant_has_one_place(genome, contig, position, ref, alt, edit):
    assert edit_of(genome, contig, position, ref, alt) == edit


def test_groups_and_batches():
    settings = WindowSettings(64, 16)
    edits = [Edit(p, p + 1, b"A") for p in (100, 101, 101, 112, 5, 100)]
    groups = make_groups([Comparison(b"c", edit, False) for edit in edits], {b"c": 300}, settings)
    assert [(group.start, group.num_shared, group.jobs) for group in groups] == [
        (64, 32, [0, 1, 2, 5]),
        (80, 16, [3]),
        (0, 0, [4]),
    ]
    both = [Comparison(b"c", edits[0], reverse) for reverse in (False, True)]
    assert [group.jobs for group in make_groups(both, {b"c": 300}, settings)] == [[0], [1]]

    batches = plan_groups(groups * 3, max_tokens=330)
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    for batch in batches:
        assert len({(groups[i % 3].length, groups[i % 3].num_shared) for i in batch}) == 1
    assert batches[:2] == [[0, 3], [6]]
