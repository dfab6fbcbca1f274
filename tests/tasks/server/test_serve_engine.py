# SPDX-License-Identifier: Apache-2.0
"""The engine of evo2_serve without a process: what happens before, beside and after its work."""

import asyncio
import concurrent.futures
import contextlib
import socket
import threading

import pytest
import requests
import torch
import uvicorn

from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.data.fasta_dataset import make_sample
from evo2_megatron.model.inference_state import KeyValueState
from evo2_megatron.model.shared_caches import SharedCaches
from evo2_megatron.tasks.generation.completion import Generation
from evo2_megatron.tasks.generation.generate import GenerationSettings
from evo2_megatron.tasks.generation.sampling import Sampling
from evo2_megatron.tasks.scoring.prediction_settings import Output
from evo2_megatron.tasks.server import engine as engine_module
from evo2_megatron.tasks.server import generations
from evo2_megatron.tasks.server.app import make_app
from evo2_megatron.tasks.server.attempt import NO_MEMORY
from evo2_megatron.tasks.server.engine import Engine, ModelInfo, ModelSettings
from evo2_megatron.tasks.server.jobs import GenerateJob, PassJob, Refused, Reply, Vectors
from processes import until


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("loaded", [False, True], ids=["loading", "full"])
def test_who_comes_too_early_or_too_late_may_come_again(checkpoint, loaded):
    async def fill():
        engine.submit(GenerateJob(ids=[65], seed=1, settings=GenerationSettings()))

    engine = Engine(ModelSettings(ckpt_dir=checkpoint, max_queue=1))
    if loaded:  # and nobody works
        engine.info = ModelInfo(checkpoint, 4, 8, 9, "SDH*", 512, "fp32", False, "CPU", 100, frozenset(), 1)
        asyncio.run(fill())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        http = uvicorn.Server(uvicorn.Config(make_app(engine), log_config=None, lifespan="off"))
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        response = requests.post(f"{url}/v1/score", json={"sequences": ["ACGT"]}, timeout=60)
        statuses = [requests.get(f"{url}/v1/health/{what}", timeout=60).status_code for what in ("live", "ready")]
        http.should_exit = True
        thread.join()
    assert response.status_code == 503 and 1 <= int(response.headers["Retry-After"]) <= 60
    assert ("as many as --max-queue allows" if loaded else "being loaded") in response.json()["detail"]
    assert statuses == [200, 200 if loaded else 503]


@pytest.mark.parametrize("when", ["waiting", "taken"])
def test_who_waits_is_told_when_the_engine_fails(megatron, checkpoint, monkeypatch, when):
    """And the failure comes out of the thread, so that the process ends with it."""

    async def ask():
        engine.submit(job := GenerateJob(ids=[65], seed=1, settings=GenerationSettings()))
        return await asyncio.wait_for(job.reply.get(), 60)

    def wait_and_fail(self, _turns):
        until(lambda: self.num_waiting == 1)
        raise RuntimeError("a kernel failed")

    def fail(self, _jobs):
        raise RuntimeError("a kernel failed")

    if when == "waiting":
        monkeypatch.setattr(Engine, "_next", wait_and_fail)
    else:
        monkeypatch.setattr(generations.Generations, "admit", fail)
    ready = threading.Event()
    engine = Engine(ModelSettings(ckpt_dir=checkpoint), on_ready=lambda _: ready.set())
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        work = threads.submit(engine.run)
        assert ready.wait(120)
        with pytest.raises(Refused, match="the server has stopped"):
            asyncio.run(ask())
        with pytest.raises(RuntimeError, match="a kernel failed"):
            work.result()
    assert engine.is_idle, "the server does not wait for it when it ends"


@contextlib.contextmanager
def running(checkpoint, **settings):
    """An engine that has loaded its model, in a thread of its own."""
    ready = threading.Event()
    engine = Engine(ModelSettings(ckpt_dir=checkpoint, **settings), on_ready=lambda _: ready.set())
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        work = threads.submit(engine.run)
        assert ready.wait(120)
        try:
            yield engine
        finally:
            engine.stop()
        work.result()


def generate(text, **more):
    settings = GenerationSettings(max_new_tokens=12, alphabet="ACGT", stop_at_eod=False)
    return GenerateJob(ids=list(text.encode()), seed=5, settings=settings, **more)


def score(text):
    return PassJob(items=[make_sample(text.encode(), 0)], output=Output(log_probs="sum"))


async def text_of(job):
    """What a generation gives, from its pieces if it streams; or the number of a refusal and why."""
    text = ""
    try:
        while isinstance(event := await asyncio.wait_for(job.reply.get(), 60), Generation):
            text += event.text
    except Refused as refused:
        return refused.status, refused.message
    return "scored" if isinstance(event, Vectors) else text or event.generation.text


def test_who_gives_no_finite_numbers_fails_alone(checkpoint, monkeypatch):
    """Of sequences that share a batch; who streams gets no base twice."""
    load = engine_module._Model.load

    def broken(*arguments):
        def hook(_module, _arguments, given, output):
            output[:, (given["input_ids"] == ord("Z")).any(dim=1)] = float("nan")

        model = load(*arguments)
        model.decoder.embedding.register_forward_hook(hook, with_kwargs=True)
        return model

    async def answers():
        engine.submit(alone := generate("ACGT"))
        want = await text_of(alone)
        # Z comes after the others have new bases
        jobs = [generate("ACGT"), generate("ACGT", wants_pieces=True), generate("GGGGGGGZ"), score("ACG"), score("AZ")]
        with engine._condition:  # together
            for job in jobs:
                engine.submit(job)
        return want, [await text_of(job) for job in jobs]

    monkeypatch.setattr(engine_module._Model, "load", broken)
    with running(checkpoint) as engine:
        want, got = asyncio.run(answers())
    refused = (500, "the model's output is not finite; check the weights, or try --mixed-precision-recipe fp32")
    assert got == [want, want, refused, "scored", refused] and len(want) == 12


def test_who_comes_later_takes_the_place_of_who_has_ended(checkpoint):
    """And does not wait for the end of the batch."""

    async def order():
        def job(num_new):
            return GenerateJob(
                ids=[65], seed=1, settings=GenerationSettings(max_new_tokens=num_new, stop_at_eod=False)
            )

        long, short, later = job(250), job(1), job(1)
        with engine._condition:  # together; there is room for two
            for each in (long, short, later):
                engine.submit(each)
        waiting = {asyncio.ensure_future(each.reply.get()): name for each, name in ((long, "long"), (later, "later"))}
        done, others = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait(others)
        return [waiting[task] for task in (*done, *others)]

    with running(checkpoint, max_batch_size=2) as engine:
        assert asyncio.run(order()) == ["later", "long"]


def test_who_comes_later_joins_the_passes_that_run(checkpoint, monkeypatch):
    """However it is drawn, and gets what it gets alone; who goes away meanwhile leaves the others as they are."""
    load, sizes = engine_module._Model.load, []

    def watched(*arguments):
        model = load(*arguments)
        model.decoder.embedding.register_forward_hook(
            lambda _module, _arguments, given, _output: sizes.append(given["input_ids"].shape), with_kwargs=True
        )
        return model

    def job(number, num_new):
        sampling = Sampling(temperature=(1.0, 0.5, 0.0)[number % 3], top_k=(0, 5)[number % 2])
        settings = GenerationSettings(sampling=sampling, max_new_tokens=num_new, stop_at_eod=False, alphabet="ACGT")
        return GenerateJob(ids=[65, 67, *[71] * number], seed=number, settings=settings, wants_pieces=True)

    async def answers():
        engine.submit(long := job(0, 400))
        await long.reply.get()
        later = [job(number, 20 + 10 * number) for number in range(1, 6)]
        engine.submit(gone := job(7, 300))
        await gone.reply.get()
        for each in later[:3]:
            engine.submit(each)
        await later[0].reply.get()
        gone.reply.cancelled = True
        for each in later[3:]:
            engine.submit(each)
        texts = [await whole(each) for each in (long, *later)]
        passes = list(sizes)
        for each in (long, *later):
            each.reply = Reply()
            engine.submit(each)
            texts.append(await whole(each))
        return texts, passes

    async def whole(job):
        while isinstance(event := await asyncio.wait_for(job.reply.get(), 60), Generation):
            pass
        return event.generation.text

    monkeypatch.setattr(engine_module._Model, "load", watched)
    with running(checkpoint) as engine:
        texts, passes = asyncio.run(answers())
    assert texts[:6] == texts[6:] and [len(text) for text in texts[:6]] == [400, 30, 40, 50, 60, 70]
    # as many passes as the longest needs by itself
    assert sum(tokens == 1 for _, tokens in passes) == 399 and max(size for size, _ in passes) >= 4


def test_who_comes_when_memory_has_run_out_may_come_again(checkpoint, monkeypatch):
    """And who is there goes on."""
    reserve = SharedCaches.reserve

    def limited(self, num_more, max_tokens):
        if max_tokens > 200:
            raise torch.OutOfMemoryError("no memory for the caches")
        reserve(self, num_more, max_tokens)

    async def answers():
        settings = GenerationSettings(max_new_tokens=150, alphabet="ACGT", stop_at_eod=False)
        engine.submit(there := GenerateJob(ids=[65], seed=1, settings=settings, wants_pieces=True))
        begin = (await there.reply.get()).text
        engine.submit(large := GenerateJob(ids=[65] * 100, seed=1, settings=settings))
        with pytest.raises(Refused, match="not enough memory for this request") as refused:
            await asyncio.wait_for(large.reply.get(), 60)
        assert (refused.value.status, refused.value.retry_after) == (503, engine_module.RETRY_SECONDS)
        engine.submit(again := GenerateJob(ids=[65], seed=1, settings=settings))
        return begin + await text_of(there), await text_of(again)

    monkeypatch.setattr(SharedCaches, "reserve", limited)
    with running(checkpoint) as engine:
        there, again = asyncio.run(answers())
    assert there == again and len(there) == 150


def test_who_was_there_when_a_step_failed_is_told_so(checkpoint, monkeypatch):
    """The caches of some layers have that step and those of others have not: going on would give other bases."""
    append, assign, failing = KeyValueState.append, generations.assign, threading.Event()

    def limited(self, *arguments):
        if failing.is_set():
            failing.clear()
            raise torch.OutOfMemoryError("no memory for a step")
        return append(self, *arguments)

    def before_they_join(jobs, running, *arguments, **more):
        if running:
            failing.set()
        return assign(jobs, running, *arguments, **more)

    async def answers():
        settings = GenerationSettings(max_new_tokens=200, alphabet="ACGT", stop_at_eod=False)
        engine.submit(there := GenerateJob(ids=[65], seed=1, settings=settings, wants_pieces=True))
        await there.reply.get()
        engine.submit(new := GenerateJob(ids=[65, 65], seed=1, settings=settings))
        texts = [await text_of(there), await text_of(new)]
        engine.submit(again := GenerateJob(ids=[65], seed=1, settings=settings))
        return texts, await text_of(again)

    monkeypatch.setattr(KeyValueState, "append", limited)
    monkeypatch.setattr(generations, "assign", before_they_join)
    with running(checkpoint) as engine:
        (there, _), again = asyncio.run(answers())
    assert there == (503, NO_MEMORY) and len(again) == 200


def test_bases_come_between_the_batches_of_a_large_request(checkpoint, monkeypatch):
    monkeypatch.setattr(engine_module, "batch_tokens", lambda: 60)

    async def count():
        settings = GenerationSettings(max_new_tokens=400, alphabet="ACGT", stop_at_eod=False)
        engine.submit(stream := GenerateJob(ids=[65], seed=1, settings=settings, wants_pieces=True))
        await stream.reply.get()
        items = [make_sample(b"ACGT" * 15, number) for number in range(20)]
        engine.submit(large := PassJob(items=items, output=Output(log_probs="sum")))
        scored, pieces = asyncio.ensure_future(large.reply.get()), 0
        while not scored.done():
            await asyncio.wait_for(stream.reply.get(), 60)
            pieces += 1
        stream.reply.cancelled = True
        return pieces, len(scored.result().rows)

    with running(checkpoint) as engine:
        pieces, scored = asyncio.run(count())
    assert scored == 20 and 19 <= pieces < 60


def long_job(**more):
    """A prompt of fifty pieces."""
    settings = GenerationSettings(max_new_tokens=30, alphabet="ACGT", stop_at_eod=False, prefill_chunk=4)
    return GenerateJob(ids=list(b"ACGGT" * 40), seed=3, settings=settings, **more)


def test_bases_come_while_a_long_prompt_is_read(checkpoint):
    """And it gets what it gets alone; two of them are read one after the other."""

    async def count():
        text = await text_of_submitted(long_job())
        settings = GenerationSettings(max_new_tokens=400, alphabet="ACGT", stop_at_eod=False)
        engine.submit(stream := GenerateJob(ids=[65], seed=1, settings=settings, wants_pieces=True))
        await stream.reply.get()
        both = [asyncio.ensure_future(text_of_submitted(long_job()))]
        while engine.num_generating < 2:
            await asyncio.sleep(0.001)
        both.append(asyncio.ensure_future(text_of_submitted(long_job())))
        pieces = 0
        while not both[0].done():
            await asyncio.wait_for(stream.reply.get(), 60)
            pieces += 1
        num_after = 0
        while not both[1].done():
            await asyncio.wait_for(stream.reply.get(), 60)
            num_after += 1
        late = await text_of_submitted(generate("ACGT"))
        stream.reply.cancelled = True
        return text, [each.result() for each in both], pieces, num_after, late

    async def text_of_submitted(job):
        engine.submit(job)
        return await text_of(job)

    with running(checkpoint) as engine:
        alone, both, pieces, num_after, late = asyncio.run(count())
        assert len(alone) == 30 and both == [alone, alone] and len(late) == 12
    assert 75 <= pieces < 100 and 45 <= num_after < 60


def test_who_goes_while_its_prompt_is_read_leaves_nothing(checkpoint):
    async def go():
        engine.submit(job := long_job())
        while not engine.num_generating:
            await asyncio.sleep(0.001)
        job.reply.cancelled = True
        while engine.num_generating:
            await asyncio.sleep(0.001)
        engine.submit(again := generate("ACGT"))
        return await text_of(again)

    with running(checkpoint) as engine:
        assert len(asyncio.run(go())) == 12


def test_bases_come_between_the_pieces_of_a_long_sequence(checkpoint, monkeypatch):
    monkeypatch.setattr("evo2_megatron.model.pieces.CHUNK_LENGTH_CPU", 5)

    async def count():
        settings = GenerationSettings(max_new_tokens=400, alphabet="ACGT", stop_at_eod=False)
        engine.submit(stream := GenerateJob(ids=[65], seed=1, settings=settings, wants_pieces=True))
        await stream.reply.get()
        engine.submit(long := PassJob(items=[make_sample(b"ACGGT" * 40, 0)], output=Output(log_probs="sum")))
        scored, pieces = asyncio.ensure_future(long.reply.get()), 0
        while not scored.done():
            await asyncio.wait_for(stream.reply.get(), 60)
            pieces += 1
        engine.submit(gone := PassJob(items=[make_sample(b"ACGGT" * 40, 0)], output=Output(log_probs="sum")))
        await asyncio.wait_for(stream.reply.get(), 60)
        gone.reply.cancelled = True
        while engine._answering:
            await asyncio.sleep(0.001)
        stream.reply.cancelled = True
        return pieces, float(scored.result().rows[0]["log_likelihood"])

    with running(checkpoint) as engine:
        pieces, in_pieces = asyncio.run(count())
    monkeypatch.undo()
    with running(checkpoint) as engine:

        async def whole():
            engine.submit(job := PassJob(items=[make_sample(b"ACGGT" * 40, 0)], output=Output(log_probs="sum")))
            return float((await job.reply.get()).rows[0]["log_likelihood"])

        assert in_pieces == pytest.approx(asyncio.run(whole()), rel=1e-5)
    assert 39 <= pieces < 60
