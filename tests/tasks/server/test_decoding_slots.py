# SPDX-License-Identifier: Apache-2.0
"""Which generations of evo2_serve run together, and what room they take."""

import asyncio

from evo2_megatron.tasks.generation.generate import GenerationSettings
from evo2_megatron.tasks.generation.sampling import Sampling
from evo2_megatron.tasks.server.decoding_slots import RunningBatch, assign, make_room
from evo2_megatron.tasks.server.generations import Generations
from evo2_megatron.tasks.server.jobs import GenerateJob
from helpers import tiny_model


def job(length, num_new, temperature=1.0, prefill_chunk=2048):
    settings = GenerationSettings(
        sampling=Sampling(temperature=temperature),
        max_new_tokens=num_new,
        stop_at_eod=False,
        prefill_chunk=prefill_chunk,
    )
    return GenerateJob(ids=[65] * length, seed=1, settings=settings)


def most_tokens(joining):
    return [[job.most_tokens for job in jobs] for jobs in joining.values()]


def test_who_joins_which_batch(one_process):
    """Caches hold no more than twice what their sequences need, and a job goes where they grow least."""
    model = tiny_model("evo2_tiny")

    def new_batch():
        return RunningBatch(model)

    async def batches():
        jobs = [job(5, 5), job(400, 100), job(7, 13, temperature=0.5), job(1, 449), job(6, 10)]
        first = assign(jobs, [], new_batch, negligible=0)
        for batch, new in first.items():
            batch.join(new)
        later = [job(8, 20), job(8, 4), job(1000, 1), job(300, 100), job(30, 70)]
        plans = [first, assign(jobs, [], new_batch, negligible=5 * 500)]
        plans += [assign(later, list(first), new_batch, negligible=most) for most in (599, 600)]
        return [most_tokens(plan) for plan in plans]

    first, small_beside_the_weights, later, a_little_more = asyncio.run(batches())
    assert first == [[10, 16, 20], [450, 500]]
    assert small_beside_the_weights == [[10, 16, 20, 450, 500]]
    # 6 x 100 tokens are more than twice 10 + 16 + 20 + 12 + 28 + 100; beside 450 and 500 there is room
    assert later == [[12, 28], [100, 400], [1001]]
    assert a_little_more == [[12, 28, 100], [400, 1001]]


def test_caches_are_for_as_many_sequences_as_may_run(one_process):
    model = tiny_model("evo2_tiny")

    async def num_rows():
        long, short = RunningBatch(model), RunningBatch(model)
        long.join([job(9, 50), job(9, 1), job(9, 50), job(9, 1), job(9, 50)])
        assert long.advance() == 2 and (long.num_sequences, long.num_cache_rows) == (3, 5)
        make_room({long: [], short: [job(5, 5)] * 3}, 8)
        before = long.num_cache_rows
        make_room({long: [job(9, 9)], short: [job(5, 5)] * 4}, 8)
        return before, long.num_cache_rows

    # the places of the two that have ended are given back when others need them
    assert asyncio.run(num_rows()) == (5, 4)


def test_who_comes_when_another_batch_has_just_gone_into_a_third(one_process):
    """What that batch leaves behind is nothing to join."""
    running = Generations(tiny_model("evo2_tiny"), 16)
    running._negligible = 0

    async def batches():
        running.admit([job(40, 1000), job(25, 20)])
        running.admit([job(60, 940, prefill_chunk=50), job(60, 5, prefill_chunk=50)])
        while any(batch.is_reading for batch in running._batches):
            running.advance()
        running.admit([job(5, 5)])
        before = [batch.most_tokens() for batch in running._batches]
        running.advance()
        return before, [batch.most_tokens() for batch in running._batches]

    before, after = asyncio.run(batches())
    assert before == [[45, 1040], [65, 1000], [10]]
    assert after == [[45, 1040, 65, 1000], [10]]


def test_who_goes_while_prompts_are_read_takes_no_place(one_process):
    """Others may come at the very moment when all is read."""

    async def sizes():
        running, jobs = Generations(tiny_model("evo2_tiny"), 3), [job(60, 5, prefill_chunk=50) for _ in range(2)]
        running._negligible = 0
        running.admit([job(5, 9)])
        running.admit(jobs)
        jobs[0].dropped = True
        while any(batch.is_reading for batch in running._batches):
            running.advance()
        running.admit([job(5, 9)])
        return [(batch.num_sequences, batch.num_cache_rows) for batch in running._batches]

    assert asyncio.run(sizes()) == [(2, 2), (1, 1)]
