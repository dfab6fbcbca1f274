# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch

from evo2_megatron.config import UserError
from evo2_megatron.tasks.generation.generate import GenerationSettings, generate
from evo2_megatron.tasks.generation.sampling import Sampling
from evo2_megatron.tasks.generation.session import Session
from helpers import tiny_model


@pytest.fixture(scope="module")
def model(one_process):
    torch.manual_seed(0)
    return tiny_model("evo2_tiny")


SETTINGS = GenerationSettings(
    max_new_tokens=20, sampling=Sampling(temperature=0.5, seed=3), return_log_probs=True, stop_at_eod=False
)
PROMPT = "ACGTT"


def one_call(model, text=PROMPT, settings=SETTINGS, seed=3):
    return generate(model, [[ord(c) for c in text]], settings, seeds=[seed])[0]


@pytest.mark.parametrize("cuts", [[20], [1] * 20, [7, 13], [19, 1]])
def test_calls_add_up_to_one(model, cuts):
    session = Session(model, SETTINGS, max_tokens=25)
    session.feed(PROMPT)
    parts = [session.generate(n) for n in cuts]
    want = one_call(model)
    assert [token for part in parts for token in part.token_ids] == want.token_ids
    got = torch.tensor([x for part in parts for x in part.log_probs])
    torch.testing.assert_close(got, torch.tensor(want.log_probs), rtol=1e-4, atol=1e-5)
    assert len(session) == 25 and parts[-1].finish_reason == "length"


def test_text_can_be_fed_in_parts_and_in_between(model):
    session = Session(model, SETTINGS, max_tokens=60, seed=8)
    for part in ("AC", "G", "TT"):
        session.feed(part)
    first = session.generate(6)
    session.feed("GATTACA")
    second = session.generate()
    want = one_call(model, PROMPT + first.text + "GATTACA", seed=8)
    assert second.token_ids == want.token_ids


def test_stream_is_generate_in_pieces(model):
    want = one_call(model)
    session = Session(model, SETTINGS, max_tokens=60)
    session.feed(PROMPT)
    pieces = list(session.stream())
    assert len(pieces) == 20 and "".join(p.text for p in pieces) == want.text
    assert [p.finish_reason for p in pieces] == [None] * 19 + ["length"]


def test_a_closed_stream_leaves_a_session_that_goes_on(model):
    session = Session(model, SETTINGS, max_tokens=60)
    session.feed(PROMPT)
    pieces = session.stream()
    begin = next(pieces).text + next(pieces).text
    pieces.close()
    assert not torch.is_inference_mode_enabled()
    assert begin + session.generate(18).text == one_call(model).text


def test_the_end_of_the_document_stays_the_end_until_more_is_fed(model):
    whole = one_call(model)
    end = whole.token_ids[4]
    at = whole.token_ids.index(end)
    settings = dataclasses.replace(SETTINGS, stop_ids=(end,))
    session = Session(model, settings, max_tokens=60)
    session.feed(PROMPT)
    assert session.generate()[:2] == (whole.token_ids[:at], "stop")
    assert session.generate()[:2] == ([], "stop")
    assert len(session) == len(PROMPT) + at
    session.feed("A")
    assert len(session) == len(PROMPT) + at + 1 and session.generate(1)


def test_bad_use(model):
    session = Session(model, SETTINGS, max_tokens=10)
    with pytest.raises(UserError, match="the session is empty"):
        session.generate()
    with pytest.raises(UserError, match="11 tokens exceed the 10"):
        session.feed("A" * 11)
    session.feed("A" * 9)
    with pytest.raises(UserError, match="29 tokens exceed the 10 that the session has room for; raise max_tokens"):
        session.stream()
    with pytest.raises(UserError, match="Prompt 'session' has"):
        session.feed("\u0394")
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        session.generate(0)
    assert session.generate(1).finish_reason == "length"


def test_cuda_graphs_are_refused(model):
    with pytest.raises(UserError, match="records no CUDA graphs; leave them out"):
        Session(model, dataclasses.replace(SETTINGS, cuda_graphs=True), max_tokens=10)
