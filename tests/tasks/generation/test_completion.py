# SPDX-License-Identifier: Apache-2.0
import random

import pytest

from evo2_megatron.tasks.generation.completion import Completion


def fill(text, **settings):
    """Add characters until it ends; the pieces that were released, and it."""
    completion = Completion(**({"max_new_tokens": 1000} | settings))
    pieces = []
    for number, character in enumerate(text):
        completion.add(ord(character), -float(number))
        ids, log_probs = completion.release()
        assert log_probs == [-float(n) for n in range(sum(map(len, pieces)), sum(map(len, pieces)) + len(ids))]
        pieces.append("".join(map(chr, ids)))
        if completion.finish_reason:
            break
    return pieces, completion


def test_length():
    pieces, completion = fill("ACGT", max_new_tokens=3)
    assert pieces == ["A", "C", "G"]
    assert completion.generation(log_probs=True) == ([65, 67, 71], "length", [0.0, -1.0, -2.0], None)
    assert completion.generation(log_probs=False).log_probs is None


def test_stop_token():
    _, completion = fill("AC\0", stop_ids=(0,))
    assert completion.generation(log_probs=True)[:3] == ([65, 67], "stop", [0.0, -1.0])


def test_stop_string_is_held_back():
    pieces, completion = fill("ATATAGC", stop_strings=("TAG",))
    #         A    T   A   T     A   G
    assert pieces == ["A", "", "", "TA", "", ""]
    assert completion.generation(log_probs=True) == (list(b"ATA"), "stop", [0.0, -1.0, -2.0], "TAG")


def test_stop_string_is_kept():
    pieces, completion = fill("ATAGC", stop_strings=("TAG",), include_stop_string=True)
    assert pieces == ["A", "T", "A", "G"] and completion.stop_string == "TAG"


def test_what_was_held_back_comes_with_the_end():
    pieces, completion = fill("ATA", stop_strings=("TAG",), max_new_tokens=3)
    assert pieces == ["A", "", "TA"] and completion.finish_reason == "length"
    pieces, completion = fill("AT\0", stop_strings=("TAG",), stop_ids=(0,))
    assert pieces == ["A", "", "T"] and completion.stop_string is None


def test_the_stop_string_wins_over_the_length():
    assert fill("TAG", stop_strings=("TAG",), max_new_tokens=3)[1].finish_reason == "stop"


def test_a_stop_string_that_is_longer_than_what_may_come_holds_nothing_back():
    pieces, completion = fill("TAG", stop_strings=("TAGA", "GG"), max_new_tokens=3)
    assert pieces == ["T", "A", "G"] and completion.finish_reason == "length"


def test_of_two_stop_strings_the_longer_began_first():
    assert fill("CTAG", stop_strings=("AG", "TAG"))[1].generation(log_probs=False).text == "C"


@pytest.mark.parametrize("include", [False, True])
def test_pieces_make_the_text_up_to_the_first_stop(include):
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(generator.choices("AC", k=30))
        stops = ["".join(generator.choices("AC", k=generator.randint(1, 6))) for _ in range(generator.randint(1, 3))]
        ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
        want, reason = text, None
        if ends:
            end, minus_length = min(ends)
            want, reason = text[: end if include else end + minus_length], "stop"
        pieces, completion = fill(text, stop_strings=stops, include_stop_string=include)
        assert completion.finish_reason == reason
        before = generator.randrange(min(ends)[0] if ends else len(text))
        later = Completion(max_new_tokens=1000, stop_strings=stops, include_stop_string=include)
        later.go_on_from(list(map(ord, text[:before])), [0.0] * before)
        for character in text[before : min(ends)[0] if ends else None]:
            later.add(ord(character), 0.0)
        assert (later.token_ids, later.stop_string) == (completion.token_ids, completion.stop_string)
        if reason:
            assert "".join(pieces) == completion.generation(log_probs=False).text == want
        else:
            assert text.startswith("".join(pieces))
