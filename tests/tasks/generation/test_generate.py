# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch

from evo2_megatron.config import UserError
from evo2_megatron.tasks.generation.generate import GenerationSettings, generate, plan_batches
from evo2_megatron.tasks.generation.sampling import Sampling
from helpers import TOLERANCE, random_tokens, sensitive_model, tiny_model

VOCAB = 512
LONGEST = 300
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module", params=["evo2_tiny", "striped_hyena_tiny_nv"])
def model(one_process, request):
    return sensitive_model(request.param)


def run(model, prompts, **settings):
    return generate(model, prompts, GenerationSettings(**settings))


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


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.5), Sampling(top_k=4, top_p=0.9)], ids=str)
def test_two_calls_equal_one(model, sampling):
    """From a prompt of 1, from one below the filters' lengths, and over the longest filter's 128 tokens."""
    settings = GenerationSettings(sampling=sampling, return_log_probs=True, stop_ids=())
    for prompt, cut, total in ((PROMPTS[1], 1, 12), (PROMPTS[0], 6, 20), (PROMPTS[5], 70, 100)):
        first, second, both = (dataclasses.replace(settings, max_new_tokens=n) for n in (cut, total - cut, total))
        (whole,) = generate(model, [prompt], both, seeds=[7])
        (begin,) = generate(model, [prompt], first, seeds=[7])
        (rest,) = generate(model, [prompt + begin.token_ids], second, seeds=[7])
        assert begin.token_ids + rest.token_ids == whole.token_ids
        torch.testing.assert_close(
            torch.tensor(begin.log_probs + rest.log_probs), torch.tensor(whole.log_probs), **TOLERANCE
        )


def test_a_seed_gives_the_same_sequence_in_every_company(model):
    settings = GenerationSettings(max_new_tokens=12, sampling=Sampling(temperature=0.5), max_batch_size=6)
    seeds = [11, 3, 11, 5, 8, 2**52]
    together = generate(model, PROMPTS, settings, seeds=seeds)
    assert together[::-1] == generate(model, PROMPTS[::-1], settings, seeds=seeds[::-1])
    for prompt, seed, want in zip(PROMPTS, seeds, together):
        assert generate(model, [prompt], settings, seeds=[seed]) == [want]


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


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=2.0), Sampling(top_k=6)], ids=str)
def test_only_letters_of_the_alphabet_are_drawn(model, sampling):
    settings = {"max_new_tokens": 60, "sampling": sampling, "return_log_probs": True, "stop_at_eod": False}
    (got,) = run(model, [PROMPTS[0]], **settings, alphabet="ACGT")
    assert set(got.text) <= set("ACGT") and len(got.text) == 60
    assert sampling == GREEDY or len(set(got.text)) > 1
    # what an unrestricted pass over the same sequence says of these letters
    with torch.inference_mode():
        log_prob_TV = model(torch.tensor([PROMPTS[0] + got.token_ids]))[0].log_softmax(-1)
    want = log_prob_TV[len(PROMPTS[0]) - 1 : -1].gather(1, torch.tensor(got.token_ids)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(got.log_probs), want, **TOLERANCE)
    assert want.exp().max() < 0.5, "the model itself would have drawn others"
    if sampling == GREEDY:
        letters = torch.tensor([ord(c) for c in "ACGT"])
        assert got.token_ids[0] == letters[log_prob_TV[len(PROMPTS[0]) - 1, letters].argmax()]


def test_the_end_of_the_document_may_be_drawn_beside_the_alphabet(model):
    settings = {"max_new_tokens": 400, "sampling": Sampling(temperature=1e6), "alphabet": "AC"}
    (ended,) = run(model, [[65]], **settings)
    assert ended.finish_reason == "stop" and set(ended.text) <= set("AC")
    (endless,) = run(model, [[65]], **settings, stop_at_eod=False)
    assert endless.finish_reason == "length" and len(endless.text) == 400
    (endless,) = run(model, [[65]], max_new_tokens=400, sampling=Sampling(temperature=1e6), stop_at_eod=False)
    assert min(endless.token_ids) > 4 and endless.finish_reason == "length"


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(model, include):
    settings = {"max_new_tokens": 30, "return_log_probs": True, "alphabet": "ACGT", "stop_at_eod": False}
    free, other = run(model, [PROMPTS[0], PROMPTS[5]], **settings)
    stop = free.text[7:10]
    at = free.text.index(stop)
    stopped, other_stopped = run(
        model,
        [PROMPTS[0], PROMPTS[5]],
        **settings,
        stop_strings=("A" * 25, stop),
        include_stop_string=include,
        max_batch_size=2,
    )
    end = at + 3 if include else at
    assert (stopped.text, stopped.finish_reason, stopped.stop_string) == (free.text[:end], "stop", stop)
    torch.testing.assert_close(torch.tensor(stopped.log_probs), torch.tensor(free.log_probs[:end]), **TOLERANCE)
    # the other of the batch ends by its own text
    want = other.text.partition(stop)[0]
    assert other_stopped.text == (want + stop if include and stop in other.text else want)


def test_a_stop_string_in_the_prompt_does_not_count(model):
    (got,) = run(model, [[65] * 4], max_new_tokens=4, alphabet="A", stop_strings=("AAAAA",), stop_at_eod=False)
    assert (got.text, got.finish_reason) == ("AAAA", "length")


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
        ({"stop_strings": ("TAA", "")}, "stop string is empty"),
        ({"stop_strings": ("TAN",), "alphabet": "ACGT"}, "'TAN' has 'N', which is not in the alphabet 'ACGT'"),
        ({"stop_strings": ("\u0394",)}, "stop string '\u0394' has '\u0394', which is not among the tokenizer's 512"),
        ({"alphabet": "AC\x00"}, "alphabet .* is not among the tokenizer's 512 tokens"),
        ({"vocab_size": 256, "alphabet": "A\u0101"}, "not among the tokenizer's 256 tokens"),
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
        # 3 x 110 tokens of caches for sequences of 15, 16 and 110
        ([100, 5, 6], 10, 8, [[1, 2], [0]]),
        ([100, 5, 6], 100, 8, [[1, 2, 0]]),
    ],
)
def test_plan_batches(lengths, max_new_tokens, max_batch_size, batches):
    settings = GenerationSettings(max_new_tokens=max_new_tokens, max_batch_size=max_batch_size)
    assert plan_batches(lengths, settings) == batches


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"sampling": GREEDY}, {"sampling": Sampling(top_k=4), "return_log_probs": True}])
def test_cuda_graphs_change_nothing(one_process, settings):
    model = sensitive_model("evo2_tiny").cuda().eval()
    prompts = [random_tokens(length, seed=length) for length in (1, 20, 20, 150)]
    plain, graphed = (
        run(model, prompts, max_new_tokens=50, max_batch_size=4, cuda_graphs=graphs, **settings)
        for graphs in (False, True)
    )
    assert [g.token_ids for g in plain] == [g.token_ids for g in graphed]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what a machine without a GPU says")
def test_cuda_graphs_need_a_gpu(model):
    with pytest.raises(UserError, match="--cuda-graphs needs a CUDA GPU; leave it out"):
        run(model, [[65, 67]], max_new_tokens=2, cuda_graphs=True)


def test_cuda_graphs_need_one_process_a_model(megatron, monkeypatch):
    from evo2_megatron.config import ParallelConfig
    from evo2_megatron.tasks.generation.decoding_step import check_cuda_graphs

    monkeypatch.setattr("evo2_megatron.runtime.megatron.on_cuda", lambda: True)
    check_cuda_graphs(ParallelConfig())
    with pytest.raises(UserError, match="use tensor and pipeline size 1"):
        check_cuda_graphs(ParallelConfig(tensor=2))
