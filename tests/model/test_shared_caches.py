# SPDX-License-Identifier: Apache-2.0
"""What sequences that come and go leave in the caches is what each leaves in its own."""

import random

import pytest
import torch

from evo2_megatron.model.inference_state import FirState, HyenaState
from evo2_megatron.model.shared_caches import SharedCaches
from helpers import random_tokens, tiny_model

KINDS = "SDH*"


@pytest.fixture(scope="module")
def model(one_process):
    torch.manual_seed(0)
    return tiny_model("evo2_tiny")


def tensors_of(layer, row, num_seen):
    """What a layer remembers of one sequence."""
    if not isinstance(layer, HyenaState):
        return [layer.keys_BNSC[row, :, :num_seen], layer.values_BNSC[row, :, :num_seen]]
    operator = layer.operator
    return [
        layer.input_conv.inputs_BDP[row],
        operator.inputs_BDP[row] if isinstance(operator, FirState) else operator.modes_BDM[row],
    ]


def assert_equal_states(model, caches, sequences):
    """Of every kind of layer, compared with one pass over each sequence."""
    assert caches.num_present == len(sequences) == caches.state.batch_size
    assert caches.state.num_tokens_seen == max(map(len, sequences))
    for row, tokens in enumerate(sequences):
        alone = model.new_inference_state(1, len(tokens))
        model(torch.tensor([tokens]), inference_context=alone)
        for number, kind in enumerate(KINDS, start=1):
            got, want = (
                tensors_of(state.layers[number], place, len(tokens))
                for state, place in ((caches.state, row), (alone, 0))
            )
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, kind=kind: f"layer {kind}: {m}")


def read(model, caches, prompts, *, most=0):
    caches.reserve(len(prompts), max([most, *map(len, prompts)]))
    for number, prompt in enumerate(prompts):
        model(torch.tensor([prompt]), inference_context=caches.behind(number, 1))
    caches.arrive([len(prompt) for prompt in prompts])


def step(model, caches, sequences, chance):
    new = [chance.randrange(65, 91) for _ in sequences]
    model(torch.tensor(new)[:, None], inference_context=caches.state)
    for tokens, token in zip(sequences, new):
        tokens.append(token)


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(3))
def test_sequences_that_come_and_go(model, seed):
    chance = random.Random(seed)
    caches, sequences = SharedCaches(model), []
    for turn in range(12):
        count = chance.choice((0, 1, 1, 3)) if sequences else 2
        prompts = [random_tokens(chance.choice((1, 2, 7, 127, 128, 129))) for _ in range(count)]
        if prompts:
            read(model, caches, prompts, most=100 + 10 * turn)
            sequences += prompts
        for _ in range(chance.choice((0, 1, 5))):
            longest = max(map(len, sequences))
            if longest == caches.max_tokens:
                caches.resize(caches.num_rows, longest + 20)
            step(model, caches, sequences, chance)
        if len(sequences) > 1 and chance.random() < 0.6:
            leaving = chance.sample(range(len(sequences)), chance.randrange(1, len(sequences)))
            order = caches.leave(leaving)
            assert sorted(order) == sorted(set(range(len(sequences))) - set(leaving))
            sequences = [sequences[number] for number in order]
        if chance.random() < 0.3:
            caches.resize(len(sequences), max(map(len, sequences)) + 1)
        assert_equal_states(model, caches, sequences)


@torch.inference_mode()
def test_who_joins_has_the_state_of_who_was_there_from_the_start(model):
    prompts = [random_tokens(length, seed=length) for length in (128, 5, 1)]
    together, joined = SharedCaches(model), SharedCaches(model)
    read(model, together, [list(prompt) for prompt in prompts])
    for prompt in prompts:
        read(model, joined, [list(prompt)])
    for layer in KINDS:
        number = KINDS.index(layer) + 1
        for row, prompt in enumerate(prompts):
            for a, b in zip(*(tensors_of(c.state.layers[number], row, len(prompt)) for c in (together, joined))):
                assert torch.equal(a, b), layer
    assert torch.equal(together.state.seen_B, joined.state.seen_B)


@torch.inference_mode()
@pytest.mark.parametrize("lengths", [(1, 128), (129, 7), (130, 131)])
def test_caches_that_become_one(model, lengths):
    """At any moment, and from a room of another length."""
    chance = random.Random(0)
    first, second = SharedCaches(model), SharedCaches(model)
    sequences = [[random_tokens(lengths[0]), random_tokens(3)], [random_tokens(lengths[1]), random_tokens(2)]]
    for caches, prompts, most in zip((first, second), sequences, (300, 160)):
        read(model, caches, prompts, most=most)
        for _ in range(chance.randrange(1, 9)):
            step(model, caches, prompts, chance)
    first.reserve(2, 160)
    first.take(second)
    assert_equal_states(model, second, sequences[1])
    second.clear()
    together = sequences[0] + sequences[1]
    assert_equal_states(model, first, together)
    for _ in range(3):
        step(model, first, together, chance)
    assert_equal_states(model, first, together)


@torch.inference_mode()
def test_room_is_kept_and_only_the_last_moves(model):
    """Nothing else is copied when one leaves and another comes."""
    caches = SharedCaches(model)
    read(model, caches, [[65] * 9, [66] * 8, [67] * 7], most=20)
    keys = caches.state.layers[4].keys_BNSC
    assert caches.leave([0]) == [2, 1]
    read(model, caches, [[68] * 20])
    assert caches.state.layers[4].keys_BNSC.data_ptr() == keys.data_ptr() and caches.num_rows == 3
    read(model, caches, [[69]])
    assert (caches.num_rows, caches.max_tokens) == (4, 20)


@torch.inference_mode()
def test_growing_has_one_layer_twice(model, monkeypatch):
    """The old caches of a layer are gone before those of the next are made."""
    import weakref

    from evo2_megatron.model.inference_state import KeyValueState

    old = {}

    def watched(self, method, *arguments):
        assert [reference() for reference in old.values()] == [None] * len(old), "a former layer is still there"
        tensor = self.input_conv.inputs_BDP if isinstance(self, HyenaState) else self.keys_BNSC
        old[id(self)] = weakref.ref(tensor)
        return method(self, *arguments)

    caches = SharedCaches(model)
    read(model, caches, [[65] * 9])
    for kind in (HyenaState, KeyValueState):
        resized = kind.resized
        monkeypatch.setattr(kind, "resized", lambda self, *a, method=resized: watched(self, method, *a))
    caches.resize(2, 30)
    assert len(old) == len(KINDS)
