# SPDX-License-Identifier: Apache-2.0
"""What each route checks, asks of the engine and answers."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from importlib import metadata as package
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from evo2_megatron.data.fasta_dataset import make_sample
from evo2_megatron.data.genome import Genome
from evo2_megatron.data.tokenizer import INVALID, SEQUENCE_TOKENS
from evo2_megatron.tasks.generation.completion import Generation
from evo2_megatron.tasks.generation.generate import GenerationSettings
from evo2_megatron.tasks.generation.prompts import Prompt, encode_prompt
from evo2_megatron.tasks.generation.sampling import Sampling
from evo2_megatron.tasks.scoring.batching import Item
from evo2_megatron.tasks.scoring.prediction_settings import Output
from evo2_megatron.tasks.server import schemas, variants
from evo2_megatron.tasks.server.arrays import MAX_JSON_VALUES, MAX_NPZ_VALUES, check_values, json_in_pieces, npz
from evo2_megatron.tasks.server.engine import Engine, ModelInfo, still_loading
from evo2_megatron.tasks.server.jobs import Generated, GenerateJob, Job, LayersJob, PassJob, Refused, VariantsJob
from evo2_megatron.tasks.server.layer_outputs import megatron_name

_LOOK_SECONDS = 0.25  # how often a waiting request looks whether its client is still there
CLIENT_GONE = 499
"""Status of a request whose client went away; only the log sees it."""

REFUSALS: dict[int | str, dict[str, Any]] = {
    413: {"model": schemas.Problem, "description": "a sequence or the body is too long; the limit is named"},
    422: {"model": schemas.Problem, "description": "a field is wrong; which, and what it may be"},
    500: {"model": schemas.Problem, "description": "the model failed"},
    503: {"model": schemas.Problem, "description": "not ready, queue full or out of memory; see Retry-After"},
}


def max_body_bytes(info: ModelInfo) -> int:
    """Room for a sequence of any allowed length, several times, and for the rest of a request."""
    return 2**20 + 4 * info.max_seq_length


def make_router(engine: Engine, genome: Genome | None) -> APIRouter:
    """All routes of an engine; ``genome``: of the variants that come without a sequence."""
    router = APIRouter()
    _add_ours(router, engine)
    _add_variants(router, engine, genome)
    _add_nim(router, engine)
    _add_status(router, engine, genome)
    return router


def _add_ours(router: APIRouter, engine: Engine) -> None:
    @router.post(
        "/v1/generate",
        response_model=schemas.GenerateResponse,
        responses=REFUSALS | {200: {"content": {"text/event-stream": {}}, "description": "with stream, events"}},
        tags=["Evo 2"],
        summary="Continue a sequence",
    )
    async def generate(body: schemas.GenerateRequest, request: Request) -> Any:
        start, info = time.perf_counter(), _info(engine)
        job = _generate_job(body, info)
        if body.stream:
            engine.submit(job)
            return StreamingResponse(_events(job, start), media_type="text/event-stream")
        return _record(job, await _result(engine, job, request), start)

    @router.post(
        "/v1/score", response_model=schemas.ScoreResponse, responses=REFUSALS, tags=["Evo 2"],
        summary="Log-likelihood of sequences",
    )  # fmt: skip
    async def score(body: schemas.ScoreRequest, request: Request) -> Any:
        start, info = time.perf_counter(), _info(engine)
        how = {"prepend_bos": body.prepend_bos, "mask_tags": body.mask_phylogenetic_tags}
        job = PassJob(items=_items(body.sequences, info, **how), output=Output(log_probs="per_token"))
        if body.per_base:
            check_values(job.num_tokens, MAX_JSON_VALUES, way_out="fewer bases, or without per_base")
        vectors = await _result(engine, job, request)
        scores = [_score(row) for row in vectors.rows]
        if not body.per_base:
            return {"scores": scores, "elapsed_ms": _since(start)}
        log_probs = (row["log_probs_seqs"][row["loss_mask"]] for row in vectors.rows)
        rows = [score | {"log_probs": values} for score, values in zip(scores, log_probs)]
        pieces = json_in_pieces({"elapsed_ms": _since(start)}, "scores", rows)
        return StreamingResponse(pieces, media_type="application/json")

    @router.post(
        "/v1/embed", response_model=schemas.EmbedResponse, responses=REFUSALS, tags=["Evo 2"],
        summary="Hidden states of sequences",
    )  # fmt: skip
    async def embed(body: schemas.EmbedRequest, request: Request) -> Any:
        start, info = time.perf_counter(), _info(engine)
        # a fixed order of layers, so that requests for the same ones go together
        layers = Output(embedding_layers=tuple(body.layers)).layers_of(info.num_layers)
        output = Output(embedding_layers=tuple(layers), pooling=body.pooling)
        job = PassJob(items=_items(body.sequences, info, prepend_bos=body.prepend_bos), output=output)
        num_vectors = len(job.items) if body.pooling else job.num_tokens
        limit, more = (MAX_JSON_VALUES, '"encoding": "npz", ') if body.encoding == "json" else (MAX_NPZ_VALUES, "")
        way_out = f"{more}pooling, fewer layers or fewer bases"
        check_values(num_vectors * len(layers) * info.hidden_size, limit, way_out=way_out)
        vectors = await _result(engine, job, request)
        embeddings = [_by_layer(row, output, skip=_no_base(body)) for row in vectors.rows]
        answer: dict[str, Any] = {"layers": layers, "elapsed_ms": _since(start)}
        if body.encoding == "json":
            pieces = json_in_pieces(answer | {"data": None}, "embeddings", embeddings)
            return StreamingResponse(pieces, media_type="application/json")
        named = {f"{n}.{layer}": values for n, row in enumerate(embeddings) for layer, values in row.items()}
        return JSONResponse(answer | {"embeddings": None, "data": await asyncio.to_thread(npz, named)})


def _add_variants(router: APIRouter, engine: Engine, genome: Genome | None) -> None:
    one_reads = asyncio.Lock()

    @router.post(
        "/v1/variants", response_model=schemas.VariantsResponse, responses=REFUSALS, tags=["Evo 2"],
        summary="Effects of variants",
    )  # fmt: skip
    async def effects(body: schemas.VariantsRequest, request: Request) -> Any:
        start, info = time.perf_counter(), _info(engine)
        given = None if body.sequence is None else _encode(body.sequence, "sequence")
        async with one_reads:  # and not in the loop, where others would wait for the disk
            asked = await asyncio.to_thread(variants.read, body, given, genome, info.max_seq_length)
        rows = []
        if asked.groups:
            rows = (await _result(engine, VariantsJob(groups=asked.groups, items=asked.items), request)).rows
        answer = {"effects": asked.effects(rows), "window_length": asked.window_length}
        return answer | {"elapsed_ms": _since(start)}


def _add_nim(router: APIRouter, engine: Engine) -> None:
    @router.post(
        "/biology/arc/evo2/generate", response_model=schemas.NimGenerateResponse, responses=REFUSALS, tags=["NIM"],
        summary="Continue a sequence, in the shape of NVIDIA's NIM",
    )  # fmt: skip
    async def nim_generate(body: schemas.NimGenerateRequest, request: Request) -> Any:
        start, info = time.perf_counter(), _info(engine)
        given = {name: value for name, value in body if value is not None}
        body = schemas.NimGenerateRequest(**given)
        asked = schemas.GenerateRequest(
            prompt=body.sequence,
            max_new_tokens=body.num_tokens,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            seed=body.random_seed,
            return_log_probs=body.enable_sampled_probs,
        )
        job = _generate_job(asked, info, wants_logits=body.enable_logits)
        if body.enable_logits:
            num_logits = asked.max_new_tokens * info.vocab_size
            check_values(num_logits, MAX_JSON_VALUES, way_out="fewer tokens, or without enable_logits")
        done = await _result(engine, job, request)
        log_probs = done.generation.log_probs
        return {
            "sequence": done.generation.text,
            "logits": done.logits if body.enable_logits else None,
            "sampled_probs": None if log_probs is None else [math.exp(value) for value in log_probs],
            "elapsed_ms": round(_since(start)),
            "elapsed_ms_per_token": [round(ms) for ms in done.step_ms] if body.enable_elapsed_ms_per_token else None,
        }

    @router.post(
        "/biology/arc/evo2/forward", response_model=schemas.NimForwardResponse, responses=REFUSALS, tags=["NIM"],
        summary="Outputs of layers, in the shape of NVIDIA's NIM",
    )  # fmt: skip
    async def nim_forward(body: schemas.NimForwardRequest, request: Request) -> Any:
        start, info = time.perf_counter(), _info(engine)
        modules = {name: megatron_name(name) for name in body.output_layers}
        for name, module in modules.items():
            if module not in info.module_names:
                raise Refused(
                    422,
                    f"output_layers: the model has no layer {name!r}; choose decoder.layers.0 to "
                    f"decoder.layers.{info.num_layers - 1} or another name of GET /v1/metadata",
                )
        (item,) = _items([body.sequence], info)
        vectors = await _result(engine, LayersJob(item=item, modules=sorted(set(modules.values()))), request)
        arrays = {f"{name}.output": vectors.rows[0][module] for name, module in modules.items()}
        return JSONResponse({"data": await asyncio.to_thread(npz, arrays), "elapsed_ms": round(_since(start))})


def _add_status(router: APIRouter, engine: Engine, genome: Genome | None) -> None:
    @router.head("/v1/health/live", include_in_schema=False)
    @router.get("/v1/health/live", response_model=schemas.Health, tags=["status"], summary="Is the server up?")
    async def live() -> Any:
        return {"status": "live"}

    @router.head("/v1/health/ready", include_in_schema=False)
    @router.get(
        "/v1/health/ready", response_model=schemas.Health, responses={503: REFUSALS[503]}, tags=["status"],
        summary="Is the model loaded?",
    )  # fmt: skip
    async def ready() -> Any:
        _info(engine)
        return {"status": "ready"}

    @router.get(
        "/v1/metadata", response_model=schemas.Metadata, responses={503: REFUSALS[503]}, tags=["status"],
        summary="Which model, and which limits",
    )  # fmt: skip
    async def metadata() -> Any:
        info, settings = _info(engine), engine.settings
        known = info._asdict()
        names = known.pop("module_names")
        limits = {
            "max_seq_length": known.pop("max_seq_length"),
            "max_batch_size": settings.max_batch_size,
            "max_queue": settings.max_queue,
            "max_sequences": schemas.MAX_SEQUENCES,
            "max_window_bases": variants.MAX_TOKENS,
            "max_body_bytes": max_body_bytes(info),
            "max_json_values": MAX_JSON_VALUES,
            "max_npz_values": MAX_NPZ_VALUES,
        }
        load = {"waiting": engine.num_waiting, "generating": engine.num_generating}
        about = {"version": package.version("evo2-megatron"), "checkpoint": str(known.pop("checkpoint"))}
        about["fasta"] = None if genome is None else str(genome.path)
        return about | known | {"limits": limits, "load": load, "modules": sorted(names)}


def _info(engine: Engine) -> ModelInfo:
    if engine.info is None:
        raise still_loading()
    return engine.info


async def _result(engine: Engine, job: Job, request: Request) -> Any:
    """What the engine gives; drops the job when its client goes."""
    engine.submit(job)
    waiting = asyncio.ensure_future(job.reply.get())
    try:
        while not (await asyncio.wait({waiting}, timeout=_LOOK_SECONDS))[0]:
            if await request.is_disconnected():
                raise Refused(CLIENT_GONE, "the client has gone")
        return waiting.result()
    finally:
        waiting.cancel()
        job.reply.cancelled = True  # where it is finished, nobody looks


async def _events(job: GenerateJob, start: float) -> AsyncIterator[str]:
    """A stream of ``piece``, then ``done`` or ``error``; closing it drops the job."""
    try:
        while True:
            event = await job.reply.get()
            if isinstance(event, Generated):
                record = _record(job, event, start)
                del record["completion"], record["log_probs"]  # told in the pieces
                yield _event("done", record)
                return
            yield _event("piece", {"text": event.text, "log_probs": event.log_probs})
    except Refused as refused:
        yield _event("error", {"detail": refused.message})
    finally:
        job.reply.cancelled = True


def _event(kind: str, data: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def _generate_job(body: schemas.GenerateRequest, info: ModelInfo, *, wants_logits: bool = False) -> GenerateJob:
    _encode(body.prompt, "prompt")  # which refuses more than a tokenizer does
    ids = encode_prompt(Prompt("prompt", body.prompt), info.vocab_size, keep_case=body.keep_prompt_case)
    if len(ids) + body.max_new_tokens > info.max_seq_length:
        raise Refused(
            413,
            f"the prompt has {len(ids)} tokens, which with {body.max_new_tokens} new ones exceeds the "
            f"{info.max_seq_length} of this server (--max-seq-length)",
        )
    seed = secrets.randbelow(2**53) if body.seed is None else body.seed
    settings = GenerationSettings(
        max_new_tokens=body.max_new_tokens,
        sampling=Sampling(temperature=body.temperature, top_k=body.top_k, top_p=body.top_p),
        return_log_probs=body.return_log_probs,
        stop_at_eod=body.stop_at_eod,
        alphabet=body.alphabet,
        stop_strings=tuple(body.stop_strings),
        include_stop_string=body.include_stop_string,
        vocab_size=info.vocab_size,
    )
    settings.check_vocabulary(info.vocab_size)
    return GenerateJob(ids=ids, seed=seed, settings=settings, wants_pieces=body.stream, wants_logits=wants_logits)


def _items(sequences: list[str], info: ModelInfo, *, prepend_bos: bool = False, mask_tags: bool = False) -> list[Item]:
    items = []
    for number, sequence in enumerate(sequences):
        name = f"sequence {number}"
        ids = _encode(sequence, name).upper()
        if len(ids) + prepend_bos > info.max_seq_length:
            raise Refused(
                413,
                f"{name} has {len(ids) + prepend_bos} tokens, more than the {info.max_seq_length} of this server "
                "(--max-seq-length)",
            )
        items.append(make_sample(ids, number, prepend_bos=prepend_bos, mask_tags=mask_tags))
    return items


def _encode(sequence: str, name: str) -> bytes:
    text = sequence.encode("utf-8", "surrogatepass")
    tokens = text.translate(SEQUENCE_TOKENS)
    if INVALID in tokens:
        at = tokens.index(INVALID)
        character = text[at:].decode("utf-8", "replace")[0]
        raise Refused(
            422,
            f"{name} has {character!a} at character {len(text[:at].decode()) + 1}; a sequence has printing ASCII "
            "characters only, without < > &",
        )
    return tokens


def _record(job: GenerateJob, done: Generated, start: float) -> dict[str, Any]:
    new: Generation = done.generation
    num_prompt, num_new = len(job.ids), len(new.token_ids)
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}
    return {
        "completion": new.text,
        "finish_reason": new.finish_reason,
        "stop_string": new.stop_string,
        "usage": usage,
        "seed": job.seed,
        "log_probs": new.log_probs,
        "elapsed_ms": _since(start),
    }


def _score(row: Mapping[str, np.ndarray]) -> dict[str, Any]:
    total, count = float(row["log_likelihood"]), int(row["num_scored"])
    return {"log_likelihood": total, "mean_log_likelihood": total / max(count, 1), "num_scored": count}


def _by_layer(row: Mapping[str, np.ndarray], output: Output, *, skip: int) -> dict[str, np.ndarray]:
    return {str(layer): row[output.hidden_name(layer)][skip:] for layer in output.embedding_layers}


def _no_base(body: schemas.EmbedRequest) -> int:
    """Tokens in front that are no bases."""
    return int(body.prepend_bos and body.pooling is None)


def _since(start: float) -> float:
    """Milliseconds."""
    return round((time.perf_counter() - start) * 1000, 3)


def refusal(refused: Refused) -> JSONResponse:
    """The answer to a request that gets no result."""
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    return JSONResponse({"detail": refused.message}, refused.status, headers)
