# SPDX-License-Identifier: Apache-2.0
"""Sequences that start together, come later, end early or are cancelled: each gives what it gives alone."""

import contextlib
import gc
import random

import pytest
import torch

from evo2_megatron.model.inference_state import InferenceState, KeyValueState
from evo2_megatron.tasks.generation.decoding import Decoding, Row
from evo2_megatron.tasks.generation.generate import GenerationSettings, generate
from evo2_megatron.tasks.generation.sampling import Sampling
from helpers import TOLERANCE, random_tokens, sensitive_model


@pytest.fixture(scope="module", params=["evo2_tiny", pytest.param("striped_hyena_tiny_nv", marks=pytest.mark.slow)])
def model(one_process, request):
    return sensitive_model(request.param)


PROMPT = random_tokens(40)


def count_states():
    gc.collect()
    return sum(isinstance(o, InferenceState) for o in gc.get_objects())


def test_closing_the_steps_frees_the_caches(model):
    before = count_states()
    decoding = Decoding.alike(model, GenerationSettings(max_new_tokens=9), [[65]], seeds=[0])
    steps = decoding.steps()
    next(steps)
    assert count_states() > before and not torch.is_inference_mode_enabled()
    steps.close()
    assert count_states() == before and list(steps) == []
    assert len(decoding.rows[0].completion.token_ids) == 1, "what was drawn is still known"


def test_samples_of_a_prompt_share_its_prefill(model):
    settings = GenerationSettings(max_new_tokens=30, sampling=Sampling(temperature=0.5), return_log_probs=True)
    prompts = [PROMPT, random_tokens(45), PROMPT, [*PROMPT, 65], PROMPT]
    decoding = Decoding.alike(model, settings, prompts, seeds=[1, 2, 3, 4, 5])
    together = decoding.run()
    assert together.num_prefill_tokens == sum(map(len, {tuple(prompt) for prompt in prompts}))
    for prompt, seed, got in zip(prompts, (1, 2, 3, 4, 5), together.generations):
        (alone,) = generate(model, [prompt], settings, seeds=[seed])
        assert got.token_ids == alone.token_ids
        torch.testing.assert_close(torch.tensor(got.log_probs), torch.tensor(alone.log_probs), **TOLERANCE)


def test_a_batch_counts_its_work(model):
    settings = GenerationSettings(max_new_tokens=4, sampling=Sampling(temperature=0.0), stop_ids=())
    done = Decoding.alike(model, settings, [[65] * 5, [66] * 7], seeds=[0, 1]).run()
    # the first of the 4 new tokens is drawn from what the prompts give
    assert (done.num_prefill_tokens, done.num_steps) == (5 + 7, 3)
    assert done.prefill_seconds > 0 and done.decode_seconds > 0


@contextlib.contextmanager
def computed_rows(model):
    """Collects [sequences, tokens] of each forward pass."""
    shapes = []
    hook = model.embedding.register_forward_hook(
        lambda _module, _arguments, given, _output: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


def rows_of(prompts, lengths, **settings):
    """Each with its own number of new tokens, and its number as seed."""
    each = [GenerationSettings(max_new_tokens=length, **settings) for length in lengths]
    return [Row(prompt=p, seed=n, settings=s) for n, (p, s) in enumerate(zip(prompts, each, strict=True))]


def assert_as_alone(model, row):
    alone = Decoding(model, [Row(prompt=row.prompt, seed=row.seed, settings=row.settings)])
    (want,) = alone.run().generations
    got = row.completion.generation(log_probs=row.settings.return_log_probs)
    assert got._replace(log_probs=None) == want._replace(log_probs=None)
    if want.log_probs is not None:
        torch.testing.assert_close(torch.tensor(got.log_probs), torch.tensor(want.log_probs), **TOLERANCE)


def test_sequences_that_have_ended_are_not_computed(model):
    """From the next step on; what the others give does not change."""
    lengths, prompts = (1, 12, 1, 3, 1, 12, 5, 1), [random_tokens(5 + n % 3, seed=n) for n in range(8)]
    decoding = Decoding(model, rows_of(prompts, lengths, return_log_probs=True, stop_at_eod=False))
    with computed_rows(model) as shapes:
        num_rows = [decoding.num_cache_rows for _ in decoding.steps()]
    assert [size for size, tokens in shapes if tokens == 1] == 2 * [4] + 2 * [3] + 7 * [2]
    # what is half empty is copied into smaller caches
    assert num_rows == 4 * [4] + 7 * [2] + [0]
    assert decoding.result().num_decoded_tokens == sum(length - 1 for length in lengths)
    for row in decoding.rows:
        assert_as_alone(model, row)


def random_row(chance):
    """A request as a server gets them, of any kind."""
    temperature, top_k, top_p = (chance.choice(values) for values in ((0.0, 0.4, 1.0), (0, 0, 4), (0.0, 0.0, 0.8)))
    settings = GenerationSettings(
        max_new_tokens=chance.randint(1, 40),
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
        return_log_probs=chance.random() < 0.5,
        alphabet=chance.choice(("", "ACGT")),
        stop_strings=chance.choice(((), ("AC", "GGT"))),
        stop_at_eod=chance.random() < 0.5,
        prefill_chunk=chance.choice((0, 50)),
    )
    length = chance.choice((1, 2, 3, 20, 127, 128, 129, 150))
    return Row(prompt=random_tokens(length, seed=chance.randrange(9)), seed=chance.randrange(2**53), settings=settings)


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["", "as on a GPU"])
@pytest.mark.parametrize("seed", range(4))
def test_who_joins_gets_what_it_gets_alone(model, seed, runs_ahead):
    """At whatever moment it comes, beside whomever."""
    chance = random.Random(seed)
    rows = [random_row(chance) for _ in range(16)]
    arrival = sorted(chance.choice((0, 0, *range(60))) for _ in rows)
    cancelled = {rows[3]: arrival[3] + 2, rows[11]: arrival[11] + 5}
    decoding, step, most = Decoding(model), 0, 0
    decoding._runs_ahead = runs_ahead
    while step <= max(arrival) or decoding.present:
        coming = [row for row, at in zip(rows, arrival) if at == step]
        if coming:
            decoding.join(coming)
            # as the server does before others come
            decoding.shrink_caches(len(decoding.present) + chance.randrange(2))
        for row, at in cancelled.items():
            row.cancelled |= at == step
        decoding.advance()
        most, step = max(most, len(decoding.present)), step + 1
    assert most > 2 and decoding.num_cache_rows == 0
    for row in rows:
        if row.completion.finish_reason is None:
            certain, _ = row.completion.release()
            (alone,) = generate(model, [row.prompt], row.settings, seeds=[row.seed])
            assert row in cancelled and alone.token_ids[: len(certain)] == certain
        else:
            assert_as_alone(model, row)


@pytest.mark.parametrize("seed", range(4))
def test_batches_that_become_one(model, seed):
    """At whatever moment, while prompts are read beside the batch, a piece at a time."""
    chance = random.Random(seed)
    rows = [random_row(chance) for _ in range(12)]
    decoding, aside = Decoding(model), []
    decoding.join(rows[:2])
    coming = [rows[start : start + 2] for start in range(2, 12, 2)]
    while coming or aside or decoding.present:
        if coming and chance.random() < 0.3:
            new = Decoding(model)
            aside.append((new, new.joining(coming.pop()), chance.randrange(4)))
        for other, reading, steps_alone in list(aside):
            if next(reading, "read") == "read":
                for _ in range(steps_alone):
                    other.advance()
                decoding.absorb(other)
                assert not other.present and other.num_cache_rows == 0
                aside.remove((other, reading, steps_alone))
        decoding.advance()
    for row in rows:
        assert_as_alone(model, row)


def test_one_pass_serves_all_who_have_come(model):
    """Also those who draw in another way."""
    num_rows, num_new = 8, 10
    rows = rows_of([random_tokens(5 + n) for n in range(num_rows)], [num_new] * num_rows, stop_at_eod=False)
    rows[2::3] = rows_of([row.prompt for row in rows[2::3]], [num_new] * 2, alphabet="ACGT", stop_at_eod=False)
    decoding = Decoding(model)
    with computed_rows(model) as shapes:
        for row in rows:
            decoding.join([row])
            decoding.advance()
        while decoding.advance():
            pass
    assert sorted(tokens for _, tokens in shapes if tokens > 1) == [len(row.prompt) for row in rows]
    sizes = [size for size, tokens in shapes if tokens == 1]
    # the last comes seven steps after the first, and is given nine more tokens; by itself, each would take nine passes
    assert len(sizes) == num_rows - 1 + num_new - 1 < num_rows * (num_new - 1)
    assert sum(sizes) == sum(len(row.completion.token_ids) - 1 for row in rows) == decoding.num_decoded_tokens


def test_who_fails_leaves_nothing_behind(one_process):
    """Its place is taken by a shorter one, beside a longer one: attention looks past the end of the shorter one."""
    model = sensitive_model("evo2_tiny")
    model.embedding.register_forward_hook(
        lambda _module, _arguments, given, output: output.masked_fill(
            (given["input_ids"] == ord("Z")).T[..., None], torch.nan
        ),
        with_kwargs=True,
    )
    prompts = [[65] * 60, [66] * 61, [*[67] * 69, ord("Z")], [68] * 3]
    long, longer, broken, short = rows_of(prompts, [9] * 4, alphabet="ACGT", stop_at_eod=False)
    decoding = Decoding(model)
    decoding.join([broken, long, longer])
    decoding.advance()
    assert broken.failed and decoding.present == [long, longer] and decoding.num_cache_rows == 3
    decoding.join([short])
    assert decoding.num_cache_rows == 3
    while decoding.advance():
        pass
    assert decoding.num_cache_rows == 0 and not short.failed
    for row in (long, longer, short):
        assert_as_alone(model, row)


def test_where_memory_does_not_suffice_nobody_else_suffers(one_process, monkeypatch):
    """The first layer has grown by then, the attention layer has not."""

    def no_memory(*_arguments):
        raise MemoryError

    model = sensitive_model("evo2_tiny")
    first, second, third = rows_of([random_tokens(9), random_tokens(130), random_tokens(4)], [12, 12, 12])
    decoding = Decoding(model)
    decoding.join([first])
    decoding.advance()
    with monkeypatch.context() as patch:
        patch.setattr(KeyValueState, "resized", no_memory)
        with pytest.raises(MemoryError):
            decoding.join([second])
    assert decoding.present == [first] and decoding.num_cache_rows == 1
    decoding.advance()
    decoding.join([third])
    while decoding.advance():
        pass
    assert_as_alone(model, first)
    assert_as_alone(model, third)
    assert not second.completion.token_ids
