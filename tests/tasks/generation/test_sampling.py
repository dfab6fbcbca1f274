# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from evo2_megatron.config import UserError
from evo2_megatron.tasks.generation.sampling import (
    NOT_FINITE,
    BatchSampling,
    Sampling,
    derive_seed,
    log_probability,
    uniforms,
)

NONE_BLOCKED = torch.zeros(6, dtype=torch.bool)
LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.4, -0.3])
ALMOST_1 = torch.tensor([1 - 2**-53], dtype=torch.float64)
NUM_DRAWS = 20_000


def alike(sampling, blocked_V=NONE_BLOCKED):
    """All sequences of a batch drawn in one way."""
    return BatchSampling([sampling], blocked_V[None])


def limit(logits_BV, sampling):
    return alike(sampling, torch.zeros(logits_BV.shape[-1], dtype=torch.bool)).limit(logits_BV.double())


def draw_many(sampling, blocked_V=NONE_BLOCKED):
    """Tokens drawn from the same logits with one sequence's random numbers."""
    return alike(sampling, blocked_V).draw(LOGITS.expand(NUM_DRAWS, -1), uniforms(sampling.seed, 0, NUM_DRAWS))


def assert_follows(token_N, probability_V):
    """Same support, and a chi-square test on a fixed seed."""
    count_V = torch.bincount(token_N, minlength=len(probability_V)).double()
    assert (count_V[probability_V == 0] == 0).all()
    expected_V = probability_V.double() / probability_V.double().sum() * len(token_N)
    kept = probability_V > 0
    assert kept.sum() == 1 or chisquare(count_V[kept], expected_V[kept]).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature(temperature):
    token_N = draw_many(Sampling(temperature=temperature))
    assert_follows(token_N, (LOGITS.double() / temperature).softmax(-1))


@pytest.mark.parametrize("top_k, kept", [(2, [1, 3]), (3, [1, 3, 4]), (5, [0, 1, 3, 4, 5])])
def test_top_k(top_k, kept):
    probability_V = torch.zeros(6).index_fill(0, torch.tensor(kept), 1.0) * LOGITS.softmax(-1)
    assert_follows(draw_many(Sampling(top_k=top_k)), probability_V)


def smallest_nucleus(probability_V, top_p):
    """Slow reference: take the most probable tokens until their mass reaches top_p."""
    kept, mass = [], 0.0
    for token in probability_V.argsort(descending=True).tolist():
        kept.append(token)
        mass += probability_V[token].item()
        if mass >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_p", [0.01, 0.4, 0.5, 0.75, 0.9, 0.99, 1.0])
def test_top_p(top_p):
    probability_V = LOGITS.double().softmax(-1)
    kept = torch.zeros(6, dtype=torch.float64).index_fill(0, torch.tensor(smallest_nucleus(probability_V, top_p)), 1.0)
    assert_follows(draw_many(Sampling(top_p=top_p)), kept * probability_V)


def test_top_p_keeps_the_token_that_crosses():
    logits_1V = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, most in ((0.4, 0), (0.6, 1), (0.9, 2)):
        token_1 = alike(Sampling(top_p=top_p), NONE_BLOCKED[:3]).draw(logits_1V, ALMOST_1)
        assert token_1.item() == most


# in 16 bits equal logits are common
COARSE = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).mul(3).round().div(2)
TIED = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0], [3.0] * 6, [0.0, -torch.inf, 1.0, 1.0, -torch.inf, 0.0]])
HALVES = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625, 0.0]]).log()


@pytest.mark.parametrize(
    "logits_BV", [LOGITS[None], COARSE, COARSE.mul(1.7).sin(), TIED, HALVES], ids=lambda x: x.shape
)
@pytest.mark.parametrize("top_k", [0, 2, 3, 5, 511])
@pytest.mark.parametrize("top_p", [0, 1e-9, 0.25, 0.5, 0.75, 0.9, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 1.5])
def test_limits_are_those_of_transformers(logits_BV, top_k, top_p, temperature):
    want_BV = TemperatureLogitsWarper(temperature)(None, logits_BV.double())
    if top_k:
        want_BV = TopKLogitsWarper(top_k)(None, want_BV)
    if top_p:
        want_BV = TopPLogitsWarper(top_p)(None, want_BV)
    got_BV = limit(logits_BV, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(got_BV.softmax(-1), want_BV.softmax(-1), rtol=1e-12, atol=0)
    for seed in range(3):
        uniform_B = uniforms(seed, 0, len(logits_BV))
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        token_B = alike(sampling, torch.zeros(logits_BV.shape[-1], dtype=torch.bool)).draw(logits_BV, uniform_B)
        mass_BV = want_BV.softmax(-1).cumsum(-1)
        assert (want_BV.gather(-1, token_B[:, None]) > -torch.inf).all()
        assert token_B.tolist() == [
            int(torch.searchsorted(mass_V, u, right=True)) for mass_V, u in zip(mass_BV, uniform_B)
        ]


def test_ties_at_the_limit():
    # the two lower of three equal tokens stay with the first two: nobody is preferred for its id
    assert limit(TIED, Sampling(top_k=2)).isfinite()[0].tolist() == [False, True, True, False, True, False]
    assert limit(TIED, Sampling(top_k=5)).isfinite()[1].all()
    # of 1/2, 1/4, ... exactly half is one token
    assert limit(HALVES, Sampling(top_p=0.5)).isfinite().sum() == 1
    assert limit(HALVES, Sampling(top_p=0.75)).isfinite().sum() == 2


def test_top_p_comes_after_top_k():
    # the best two of 1/2, 1/4, 1/8, ... are 2/3 and 1/3
    assert limit(HALVES, Sampling(top_k=2, top_p=0.6)).isfinite().sum() == 1
    assert limit(HALVES, Sampling(top_p=0.6)).isfinite().sum() == 2


def test_blocked_tokens_are_never_drawn():
    blocked_V = torch.tensor([False, True, False, False, True, False])
    assert_follows(draw_many(Sampling(), blocked_V), LOGITS.softmax(-1).masked_fill(blocked_V, 0.0))
    for greedy in (Sampling(temperature=0.0), Sampling(top_k=1)):
        assert draw_many(greedy, blocked_V).unique().tolist() == [3]


def test_extreme_random_numbers_stay_inside_the_vocabulary():
    uniform_B = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    logits_BV = torch.full((2, 6), -torch.inf)
    logits_BV[:, 2:4] = 0.0
    assert alike(Sampling()).draw(logits_BV, uniform_B).tolist() == [2, 3]


def test_tiny_temperature_is_greedy():
    assert draw_many(Sampling(temperature=1e-300)).unique().tolist() == [1]


def test_tiny_top_p_is_greedy():
    """Also where 1 less top_p is 1: one token stays."""
    assert draw_many(Sampling(top_p=1e-300)).unique().tolist() == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(top_k=2), Sampling(top_p=0.5)])
def test_logits_that_are_not_finite(bad, sampling):
    logits_BV = torch.stack([LOGITS, LOGITS])
    logits_BV[1, 4] = bad
    token_B = alike(sampling).draw(logits_BV, torch.tensor([0.5, 0.5]))
    assert token_B[0] != NOT_FINITE and token_B[1] == NOT_FINITE


def test_what_one_draws_does_not_depend_on_how_others_do():
    """Bit for bit, whatever temperature, limits and blocked tokens share a batch."""
    samplings = [
        Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (0.0, 0.3, 1.0, 1.7)
        for top_k in (0, 1, 2, 40, 511)
        for top_p in (0.0, 0.5, 0.9, 1.0)
    ]
    generator = torch.Generator().manual_seed(1)
    num = len(samplings)
    logits_BV = COARSE.repeat(2, 1)[:num] + torch.randn(num, 512, generator=generator).mul(0.1).round()
    blocked_BV = torch.rand(num, 512, generator=generator) < torch.rand(num, 1, generator=generator) * 0.9
    logits_BV[7, 3], blocked_BV[7, 3] = torch.nan, False
    uniform_B = uniforms(5, 0, num)
    together = BatchSampling(samplings, blocked_BV)
    token_B, limited_BV = together.draw(logits_BV, uniform_B), together.limit(logits_BV.double())
    for row, sampling in enumerate(samplings):
        alone = alike(sampling, blocked_BV[row])
        assert alone.draw(logits_BV[row : row + 1], uniform_B[row : row + 1]).item() == token_B[row]
        got_V, want_V = limited_BV[row], alone.limit(logits_BV[row : row + 1].double())[0]
        assert torch.equal(got_V, want_V) or row == 7
    assert [row for row in range(num) if token_B[row] == NOT_FINITE] == [7] and len(token_B.unique()) > num // 2


def test_uniforms_belong_to_places():
    whole = uniforms(7, 0, 50)
    assert whole.dtype == torch.float64 and whole.min() >= 0 and whole.max() < 1 and len(whole.unique()) == 50
    for start, count in ((0, 50), (0, 4), (13, 37), (49, 1), (20, 0)):
        assert torch.equal(uniforms(7, start, count), whole[start : start + count])
    assert not set(uniforms(8, 0, 50).tolist()) & set(whole.tolist())


def test_derived_seeds():
    assert derive_seed(5) == 5, "the seed of a record gives the same sequence alone"
    seeds = {derive_seed(seed, prompt=p, sample=s) for seed in range(4) for p in range(20) for s in range(20)}
    assert len(seeds) == 4 * 20 * 20 and all(0 <= seed < 2**53 for seed in seeds)
    assert derive_seed(5, prompt=1) == derive_seed(5, prompt=1) != derive_seed(5, sample=1)
    # sequences written today must come out of next year's numpy
    assert derive_seed(1234, prompt=1) == 7946623549924538 and uniforms(1234, 3, 1).item() == 0.2616924238635442


def test_log_probability_ignores_nothing_of_the_distribution():
    got = log_probability(LOGITS.expand(2, -1).bfloat16(), torch.tensor([1, 5]))
    torch.testing.assert_close(got, LOGITS.bfloat16().float().log_softmax(-1)[[1, 5]])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)


def test_top_k_must_be_below_the_vocabulary():
    Sampling(top_k=511).check_vocabulary(512)
    with pytest.raises(UserError, match="top_k is 512"):
        Sampling(top_k=512).check_vocabulary(512)
