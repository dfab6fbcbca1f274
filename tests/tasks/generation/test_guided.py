# SPDX-License-Identifier: Apache-2.0
import dataclasses
import gc
import logging
import re
from itertools import pairwise
from statistics import mean

import pytest
import torch

from evo2_megatron.config import UserError
from evo2_megatron.model.inference_state import InferenceState
from evo2_megatron.tasks.generation.generate import GenerationSettings, generate
from evo2_megatron.tasks.generation.guided import Search, SearchSettings
from evo2_megatron.tasks.generation.sampling import Sampling
from helpers import tiny_model

PROMPT = "ACGTTGCATCGA"
SETTINGS = GenerationSettings(
    max_new_tokens=48, alphabet="ACGT", stop_at_eod=False, max_batch_size=64, return_log_probs=True
)


@pytest.fixture(scope="module")
def model(one_process):
    torch.manual_seed(0)
    model = tiny_model("evo2_tiny")
    with torch.no_grad():
        # the medium filter starts so small that losing its history would not show
        model.decoder.layers[1].mixer.mixer.filter.h *= 1000
    return model


def gc_content(sequences):
    return [sum(map(text.count, "GC")) / len(text) for text in sequences]


def motif_count(sequences):
    return [len(re.findall("(?=GATC)", text)) for text in sequences]


def ids(text):
    return [ord(c) for c in text]


def search(model, score, *, settings=SETTINGS, seed=1, prompt=PROMPT, **width):
    width = SearchSettings(**({"chunk": 6, "score_of": "completion"} | width))
    return Search(model, settings, width, score, seed=seed).run(ids(prompt))


def plain(model, seeds, settings=SETTINGS):
    return generate(model, [ids(PROMPT)] * len(seeds), settings, seeds=seeds)


def test_gc_content_reaches_its_target(model):
    without = [gc_content([g.text])[0] for g in plain(model, range(8))]
    assert 0.4 < mean(without) < 0.6 and max(without) < 0.75
    best = search(model, gc_content, beams=2, samples=16, chunk=4)[0]
    assert best.score >= 0.9
    assert best.score == gc_content([best.generation.text])[0] and len(best.generation.text) == 48


def test_motifs_appear(model):
    without = mean(motif_count([g.text for g in plain(model, range(8))]))
    best = search(model, motif_count, beams=4, samples=16)[0]
    assert without < 0.8 and best.score >= 4
    assert best.score == best.generation.text.count("GATC")


def test_more_compute_gives_better_scores(model):
    """Mean over 5 seeds of the GC content with 1, 2, 4 and 8 samples; a chunk of 6 has a deviation of 0.2."""
    scores = [
        mean(search(model, gc_content, beams=1, samples=k, seed=s)[0].score for s in range(5)) for k in (1, 2, 4, 8)
    ]
    gains = [after - before for before, after in pairwise(scores)]
    assert min(gains) > 0.03, scores
    assert scores[-1] > scores[0] + 0.2


@pytest.mark.parametrize("chunk", [1, 7, 48, 100])
def test_one_sample_of_one_beam_is_plain_generation(model, chunk):
    (want,) = plain(model, [1])
    (got,) = search(model, gc_content, beams=1, samples=1, chunk=chunk)
    assert got.generation.token_ids == want.token_ids and got.generation.finish_reason == "length"
    torch.testing.assert_close(
        torch.tensor(got.generation.log_probs), torch.tensor(want.log_probs), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 48])
def test_a_stop_string_may_begin_in_an_earlier_chunk(model, chunk, include):
    stop = plain(model, [1])[0].text[12:18]
    settings = dataclasses.replace(SETTINGS, stop_strings=(stop,), include_stop_string=include)
    (want,) = plain(model, [1], settings)
    assert want.stop_string == stop
    (got,) = search(model, lambda texts: [0] * len(texts), settings=settings, beams=1, samples=1, chunk=chunk)
    assert got.generation._replace(log_probs=None) == want._replace(log_probs=None)
    assert len(got.generation.log_probs) == len(want.token_ids)


def test_a_scorer_that_says_nothing_changes_nothing(model):
    (got,) = search(model, lambda texts: [0] * len(texts), beams=1, samples=4)
    assert got.generation.token_ids == plain(model, [1])[0].token_ids


@pytest.mark.parametrize("size", [1, 5])
def test_the_batch_size_changes_nothing(model, size):
    want = search(model, gc_content, beams=3, samples=3)
    got = search(model, gc_content, beams=3, samples=3, settings=dataclasses.replace(SETTINGS, max_batch_size=size))
    assert [(g.generation.token_ids, g.score) for g in got] == [(g.generation.token_ids, g.score) for g in want]
    assert want == search(model, gc_content, beams=3, samples=3), "a seed gives the same again"
    other = search(model, gc_content, beams=3, samples=3, seed=2)
    assert [g.generation.token_ids for g in other] != [g.generation.token_ids for g in want]


@torch.inference_mode()
def test_each_beam_goes_on_from_its_own_caches(model):
    """The log-probabilities of a search with many changes of parents are those of one pass over the result."""
    found = search(model, motif_count, beams=3, samples=4, chunk=5)
    assert len({tuple(g.generation.token_ids) for g in found}) == 3
    assert [g.score for g in found] == sorted((g.score for g in found), reverse=True)
    for guided in found:
        tokens = torch.tensor([ids(PROMPT) + guided.generation.token_ids])
        log_prob_T = model(tokens)[0].log_softmax(-1)[:-1].gather(1, tokens[0, 1:, None]).squeeze(1)
        got_T = torch.tensor(guided.generation.log_probs)
        torch.testing.assert_close(got_T, log_prob_T[len(PROMPT) - 1 :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score_of, before", [("sequence", PROMPT), ("completion", "")])
def test_what_the_scorer_gets(model, score_of, before):
    rounds = []

    def score(texts):
        rounds.append(texts)
        return motif_count(texts)

    best = search(model, score, beams=2, samples=3, chunk=20, score_of=score_of)[0]
    assert [{len(text) for text in texts} for texts in rounds] == [{len(before) + n} for n in (20, 40, 48)]
    assert all(len(texts) == 6 for texts in rounds), "the first round, too, has all continuations"
    assert all(text.startswith(before) for texts in rounds for text in texts)
    assert before + best.generation.text in rounds[-1]


def test_sequences_that_ended_keep_their_score_and_are_not_scored_again(model):
    """A is the end of the document here, and short is good: two ended sequences fill the beams, and that is all."""
    settings = dataclasses.replace(SETTINGS, alphabet="CGT", stop_ids=(ord("A"),))
    asked = []

    def shorter(texts):
        asked.append(texts)
        return [-len(text) for text in texts]

    found = search(model, shorter, settings=settings, beams=2, samples=8, chunk=8)
    assert [g.generation.finish_reason for g in found] == ["stop", "stop"] and len(asked) == 1
    assert found[0].score == max(-len(text) for text in asked[0])
    longer = search(model, lambda texts: [len(text) for text in texts], settings=settings, beams=2, samples=8, chunk=8)
    assert longer[0].score > 16


def test_of_equal_scores_those_that_go_on_come_first(model):
    """Every fourth token ends a sequence; as long as enough have not ended, they fill the beams."""
    settings = dataclasses.replace(SETTINGS, alphabet="CGT", stop_ids=(ord("A"),), max_new_tokens=8)
    asked = []

    def same(texts):
        asked.append(texts)
        return [1] * len(texts)

    found = search(model, same, settings=settings, beams=4, samples=8, chunk=2)
    assert len(asked) == 4 and any(len(text) < 2 for text in asked[0])
    assert all(len(g.generation.text) >= 6 for g in found)


def test_greedy_candidates_are_one(model):
    settings = dataclasses.replace(SETTINGS, sampling=Sampling(temperature=0.0))
    found = search(model, gc_content, settings=settings, beams=3, samples=2)
    assert [g.generation.token_ids for g in found] == [plain(model, [1], settings)[0].token_ids]


def test_the_prompt_is_computed_once_and_caches_are_dropped(model):
    shapes, states = [], []

    def score(texts):
        states.append(sum(isinstance(thing, InferenceState) for thing in gc.get_objects()))
        return gc_content(texts)

    gc.collect()  # what other tests left
    hook = model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        search(model, score, beams=2, samples=4, chunk=16)
    finally:
        hook.remove()
    chunk = [(8, 1)] * 15
    assert shapes == [(1, len(PROMPT)), *chunk, (2, 16), *chunk, (2, 16), *chunk]
    assert states == [1] * 3, "while the scorer works, only the beams' caches are there"
    gc.collect()
    assert not any(isinstance(thing, InferenceState) for thing in gc.get_objects())


def test_each_round_is_logged(model, caplog):
    with caplog.at_level(logging.INFO, "evo2_megatron"):
        best = search(model, gc_content, beams=2, samples=2, chunk=20)[0]
    lines = [record.getMessage() for record in caplog.records if "[GUIDE]" in record.getMessage()]
    assert len(lines) == 3 and "round 3 of 3, 48 bases, 4 continuations" in lines[2]
    assert f"score best {best.score:.6g}, mean " in lines[2]


@pytest.mark.parametrize(
    "scores, message",
    [
        ([0.5], "the scorer gave 1 scores for 4 sequences; it must give one for each"),
        ([0.5, float("nan"), 1, 1], "the scorer gave nan for sequence 1; a score must be a finite number"),
        ([0.5, "1", 1, 1], "the scorer gave '1' for sequence 1"),
        (None, "the scorer gave None for 4 sequences; it must give a list of numbers"),
    ],
)
def test_wrong_scores(model, scores, message):
    with pytest.raises(UserError, match=re.escape(message)):
        search(model, lambda texts: scores, beams=2, samples=2)


def test_bad_settings(model):
    for name in ("beams", "samples", "chunk"):
        with pytest.raises(UserError, match=f"{name} is 0; it must be 1 or more"):
            SearchSettings(**{name: 0})
    with pytest.raises(UserError, match="a prompt is empty"):
        search(model, gc_content, prompt="")
    with pytest.raises(UserError, match="records no CUDA graphs; leave them out"):
        search(model, gc_content, settings=dataclasses.replace(SETTINGS, cuda_graphs=True))
