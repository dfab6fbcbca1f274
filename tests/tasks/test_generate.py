# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from evo2_megatron.config import UserError
from evo2_megatron.tasks.generate import Decoder, GenerationSettings, generate, plan_batches
from evo2_megatron.tasks.sampling import Sampling
from helpers import tiny_model

VOCAB = 512
LONGEST = 300
GREEDY = Sampling(temperature=0.0)


TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""A cache that forgets anything moves the logits of these models by 5e-4 or more; rounding moves them by 4e-7."""


def sensitive_model(model_size):
    torch.manual_seed(0)
    model = tiny_model(model_size)
    with torch.no_grad():
        # the medium filter starts so small that losing its history would not show
        model.decoder.layers[1].mixer.mixer.filter.h *= 1000
    return model


@pytest.fixture(scope="module", params=["evo2_tiny", "striped_hyena_tiny_nv"])
def model(one_process, request):
    return sensitive_model(request.param)


def run(model, prompts, **settings):
    return generate(model, prompts, GenerationSettings(**settings))


def random_tokens(length, seed=0):
    return torch.randint(65, 91, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def last_logits(model, state, tokens):
    return model(torch.tensor([tokens]), inference_context=state)[0, -1]


@torch.inference_mode()
def test_every_prompt_length_decodes_as_the_uncached_forward(model):
    num_steps = 3
    tokens = random_tokens(LONGEST + num_steps)
    want_TV = model(torch.tensor([tokens]))[0]
    got = []
    for length in range(1, LONGEST + 1):
        state = model.new_inference_state(1, length + num_steps, last_token_logits_only=True)
        got.append(last_logits(model, state, tokens[:length]))
        got += [last_logits(model, state, tokens[i : i + 1]) for i in range(length, length + num_steps)]
    want = torch.cat([want_TV[length - 1 : length + num_steps] for length in range(1, LONGEST + 1)])
    torch.testing.assert_close(torch.stack(got), want, **TOLERANCE)


@torch.inference_mode()
def test_a_long_decode_does_not_drift(model):
    tokens = random_tokens(LONGEST)
    want_TV = model(torch.tensor([tokens]))[0]
    state = model.new_inference_state(1, LONGEST)
    got_TV = torch.stack([last_logits(model, state, [token]) for token in tokens])
    torch.testing.assert_close(got_TV, want_TV, **TOLERANCE)


@pytest.mark.parametrize(
    "chunks",
    [[299, 1], [1, 299], [7] * 42, [64] * 4 + [44], [127, 128, 45], [128, 129, 1, 2, 40], [2, 1, 3, 5, 7, 282]],
)
@torch.inference_mode()
def test_chunked_prefill_equals_the_whole(model, chunks):
    tokens = random_tokens(sum(chunks) + 1)
    want_TV = model(torch.tensor([tokens]))[0]
    state = model.new_inference_state(1, len(tokens))
    parts = torch.tensor([tokens]).split([*chunks, 1], dim=1)
    got_TV = torch.cat([model(part, inference_context=state)[0] for part in parts])
    torch.testing.assert_close(got_TV, want_TV, **TOLERANCE)


@torch.inference_mode()
def uncached_greedy(model, prompt, num_new):
    """Slow reference: the whole sequence through the model for every token."""
    tokens, log_probs = list(prompt), []
    for _ in range(num_new):
        logits_V = model(torch.tensor([tokens]))[0, -1]
        allowed_V = logits_V.clone()
        allowed_V[1:5] = -torch.inf
        tokens.append(allowed_V.argmax().item())
        log_probs.append(logits_V.log_softmax(-1)[tokens[-1]].item())
    return tokens[len(prompt) :], log_probs


@pytest.mark.parametrize("length", [1, 2, 6, 127, 128, 129])
def test_greedy_is_the_argmax_of_the_uncached_forward(model, length):
    prompt = random_tokens(length)
    want, want_log_probs = uncached_greedy(model, prompt, 12)
    (got,) = run(model, [prompt], max_new_tokens=12, sampling=GREEDY, return_log_probs=True, stop_ids=())
    assert got.token_ids == want and got.finish_reason == "length"
    torch.testing.assert_close(torch.tensor(got.log_probs), torch.tensor(want_log_probs), **TOLERANCE)


PROMPTS = [random_tokens(length, seed=length) for length in (9, 1, 14, 5, 9, 40)]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=4), Sampling(top_p=0.9)], ids=str)
def test_a_prompt_does_not_depend_on_its_batch(model, sampling):
    settings = {"max_new_tokens": 10, "sampling": sampling, "return_log_probs": True}
    alone = run(model, PROMPTS, **settings, max_batch_size=1)
    for max_batch_size in (2, 6):
        together = run(model, PROMPTS, **settings, max_batch_size=max_batch_size)
        assert [g.token_ids for g in together] == [g.token_ids for g in alone]
        for a, b in zip(together, alone):
            torch.testing.assert_close(torch.tensor(a.log_probs), torch.tensor(b.log_probs), **TOLERANCE)


def test_prefill_chunk_does_not_change_the_result(model):
    settings = {"max_new_tokens": 10, "sampling": Sampling(temperature=0.1), "max_batch_size": 6}
    whole = run(model, PROMPTS, **settings, prefill_chunk=0)
    for prefill_chunk in (1, 4, 8192):
        assert run(model, PROMPTS, **settings, prefill_chunk=prefill_chunk) == whole


def test_seed(model):
    def sample(seed):
        sampling = Sampling(seed=seed, temperature=0.1)
        return [g.token_ids for g in run(model, [PROMPTS[0]] * 2, max_new_tokens=20, sampling=sampling)]

    first = sample(0)
    assert first == sample(0)
    assert first[0] != first[1], "equal prompts of one run are drawn independently"
    assert not {tuple(ids) for ids in first} & {tuple(ids) for ids in sample(1)}


def test_stop_token_ends_a_sequence_and_is_not_part_of_it(model):
    (free,) = run(model, [PROMPTS[0]], max_new_tokens=10, sampling=GREEDY, stop_ids=(), return_log_probs=True)
    stop = free.token_ids[6]
    end = free.token_ids.index(stop)
    settings = {"max_new_tokens": 10, "sampling": GREEDY, "stop_ids": (stop,), "return_log_probs": True}
    (stopped,) = run(model, [PROMPTS[0]], **settings)
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[:end], "stop")
    assert stopped.log_probs == free.log_probs[:end]
    # the others of the batch go on
    both = run(model, [PROMPTS[0], PROMPTS[4]], **settings, max_batch_size=2)
    assert both[0].token_ids == stopped.token_ids
    assert both[1].token_ids == run(model, [PROMPTS[4]], **settings)[0].token_ids


def test_special_tokens_and_padding_entries_are_never_drawn(model):
    sampling = Sampling(temperature=1e6)
    drawn = run(model, [[65]], max_new_tokens=250, sampling=sampling, stop_ids=(), vocab_size=12)[0].token_ids
    assert set(drawn) == {0, *range(5, 12)}


def test_a_batch_counts_its_work(model):
    decoder = Decoder(model, GenerationSettings(max_new_tokens=4, sampling=GREEDY, stop_ids=()))
    done = decoder.run([[65] * 5, [66] * 7], sequence_numbers=[0, 1])
    # 2 x 5 prompt tokens at once; then 2 of the longer prompt and 3 of its 4 new ones go in one by one
    assert (done.num_prefill_tokens, done.num_steps) == (10, 5)
    assert done.prefill_seconds > 0 and done.decode_seconds > 0


def test_output_that_is_not_finite_is_an_error(one_process):
    broken = tiny_model("evo2_tiny")
    with torch.no_grad():
        broken.decoder.layers[0].mlp.linear_fc1.weight[0, 0] = torch.nan
    for sampling in (GREEDY, Sampling()):
        with pytest.raises(UserError, match="not finite"):
            run(broken, [[65, 66]], max_new_tokens=2, sampling=sampling)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"prefill_chunk": -1}, "prefill_chunk is -1"),
        ({"sampling": Sampling(top_k=512)}, "top_k is 512"),
        ({"prompts": [[65], []]}, "empty"),
    ],
)
def test_bad_settings(model, settings, message):
    with pytest.raises(UserError, match=message):
        run(model, **({"prompts": [[65]]} | settings))


@pytest.mark.parametrize(
    "lengths, max_new_tokens, max_batch_size, batches",
    [
        ([], 10, 4, []),
        ([5, 3, 4], 10, 1, [[1], [2], [0]]),
        ([5, 3, 4], 10, 2, [[1, 2], [0]]),
        ([5, 3, 5, 3], 10, 8, [[1, 3, 0, 2]]),
        # the longest would cost 95 single steps in the batch of the others, and 10 on its own
        ([100, 5, 6], 10, 8, [[1, 2], [0]]),
    ],
)
def test_plan_batches(lengths, max_new_tokens, max_batch_size, batches):
    settings = GenerationSettings(max_new_tokens=max_new_tokens, max_batch_size=max_batch_size)
    assert plan_batches(lengths, settings) == batches
