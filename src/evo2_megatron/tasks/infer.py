# SPDX-License-Identifier: Apache-2.0
"""Continue prompts with a trained model: from a checkpoint and prompts to records."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from evo2_megatron.checkpoint.adapter import base_checkpoint
from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
from evo2_megatron.checkpoint.load import find_tokenizer, load_model
from evo2_megatron.checkpoint.run_config import read_run_config
from evo2_megatron.config import Fp8Choice, ParallelConfig, UserError
from evo2_megatron.data import tokenizer
from evo2_megatron.runtime import distributed, megatron
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.generate import Decoder, GeneratedBatch, Generation, GenerationSettings, plan_batches
from evo2_megatron.tasks.prompts import Prompt, Record, RecordFile

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.8
"""Part of the free memory that the caches may fill; the rest is for the activations of a chunk of prompt."""

_GIB = 2**30

OnRecord = Callable[[Record], None]


class _Work(NamedTuple):
    prompts: Sequence[Prompt]
    token_ids: Sequence[list[int]]
    settings: GenerationSettings

    def check_lengths(self, limit: int, whose: str) -> None:
        num_new = self.settings.max_new_tokens
        for prompt, ids in zip(self.prompts, self.token_ids):
            if len(ids) + num_new > limit:
                raise UserError(
                    f"Prompt {prompt.id!r} has {len(ids)} tokens, which with {num_new} new ones exceeds the {limit} "
                    f"{whose}; shorten it, lower --max-new-tokens or raise --max-seq-length"
                )


def infer(
    prompts: Sequence[Prompt],
    ckpt_dir: Path,
    settings: GenerationSettings,
    *,
    max_seq_length: int | None = None,
    parallel: ParallelConfig = ParallelConfig(),
    precision: str | None = None,
    provider_overrides: Mapping[str, Any] | None = None,
    base_ckpt_dir: Path | None = None,
    fp8: Fp8Choice = "as_asked",
    with_self_test: bool = False,
    output_file: Path | None = None,
    on_record: OnRecord | None = None,
) -> list[Record]:
    """Continue prompts with the model of a checkpoint; every process of the job calls this.

    Args:
        prompts: What to continue.
        ckpt_dir: A Megatron Bridge checkpoint, or a folder of iterations.
        settings: What to generate; the tokenizer's size is filled in.
        max_seq_length: Longest prompt with its new tokens. None: what the checkpoint was trained for and the caches of
            a batch have memory for.
        parallel: Tensor and pipeline sizes.
        precision: As for ``checkpoint.load.load_model``, like ``provider_overrides``, ``base_ckpt_dir`` and
            ``fp8``.
        with_self_test: Compare the model with the numbers stored in its checkpoint before it generates.
        output_file: JSON Lines file for the records.
        on_record: Called on rank 0 with each record as it finishes.

    Returns:
        One record for each prompt in their order on rank 0, and nothing on the other ranks: ``id``, ``prompt``,
        ``completion``, ``finish_reason``, ``usage`` and, if asked for, ``logprobs``.

    Raises:
        UserError: Something about the checkpoint, the prompts or the settings is wrong; no output file is written.
    """
    _check_layout(parallel)
    checkpoint = resolve_checkpoint_path(ckpt_dir)
    run_config = read_run_config(checkpoint)
    base = base_checkpoint(checkpoint, run_config, base_ckpt_dir)
    vocab_size = tokenizer.read_vocab_size(find_tokenizer(checkpoint, base))
    settings = dataclasses.replace(settings, vocab_size=vocab_size)
    settings.sampling.check_vocabulary(vocab_size)
    work = _Work(prompts, [_encode(prompt, vocab_size) for prompt in prompts], settings)
    if max_seq_length is None:
        work.check_lengths(run_config.seq_length, "that the checkpoint was trained for")
    else:
        work.check_lengths(max_seq_length, "of --max-seq-length")
    writes = output_file is not None and distributed.rank() == 0
    with RecordFile(output_file) if writes else nullcontext() as file, distributed.process_groups(parallel):
        model = _load(checkpoint, base, parallel, precision, provider_overrides, fp8, with_self_test)
        _log_memory("After model setup")
        if max_seq_length is None:
            work.check_lengths(memory_limit(model, settings.max_batch_size), "that a batch's caches have memory for")
        records = _run(Decoder(model, settings), work, file, on_record)
        _log_memory("After generation")
    return records


def _check_layout(parallel: ParallelConfig) -> None:
    if parallel.context > 1:
        raise UserError("generation does not split a sequence over processes; use --context-parallel-size 1")
    if parallel.sequence_parallel:
        raise UserError("generation goes token by token, which cannot be split; leave out --sequence-parallel")
    parallel.check_world_size(distributed.world_size())


def _load(
    checkpoint: Path,
    base: Path,
    parallel: ParallelConfig,
    precision: str | None,
    overrides: Mapping[str, Any] | None,
    fp8: Fp8Choice,
    with_self_test: bool,
) -> StripedHyenaModel:
    # one token cannot be split over processes
    parallel = dataclasses.replace(parallel, sequence_parallel=False)
    loaded = load_model(
        checkpoint,
        parallel=parallel,
        precision=precision,
        provider_overrides=overrides,
        base_ckpt_dir=None if base == checkpoint else base,
        fp8=fp8,
    )
    if with_self_test:
        self_test.check(loaded)
    from megatron.core.utils import unwrap_model

    # of the wrapper for 16 bits, which only casts what goes in and comes out
    model = unwrap_model(loaded.model)
    if model.config.fp8:
        from megatron.core.fp8_utils import prepare_model_for_fp8_inference

        # 8-bit matrix products want multiples of 8 or 16 rows, and a decoding step has one: pads them
        prepare_model_for_fp8_inference(model)
    return model


def _run(decoder: Decoder, work: _Work, file: RecordFile | None, on_record: OnRecord | None) -> list[Record]:
    """Give each copy of the model every n-th batch; collect on all what they finish."""
    start = time.perf_counter()
    lengths = [len(ids) for ids in work.token_ids]
    batches = plan_batches(lengths, work.settings)
    num_copies, copy = distributed.data_parallel_size(), distributed.data_parallel_rank()
    records: dict[int, Record] = {}
    for first in range(0, len(batches), num_copies):
        finished = []
        if first + copy < len(batches):
            batch = batches[first + copy]
            done = decoder.run([work.token_ids[index] for index in batch], sequence_numbers=batch)
            if distributed.is_model_parallel_writer():
                _log_batch(done, number=first + copy + 1, num_batches=len(batches))
            finished = [(i, _record(work.prompts[i], lengths[i], new)) for i, new in zip(batch, done.generations)]
        finished = _collect(finished)
        records.update(finished)
        if file is not None:
            file.add(record for _, record in finished)
        if on_record is not None and distributed.rank() == 0:
            for _, record in finished:
                on_record(record)
    if distributed.rank() != 0:
        return []
    ordered = [records[index] for index in range(len(lengths))]
    if file is not None:
        file.finish(ordered)
    _log_total(ordered, time.perf_counter() - start)
    return ordered


def _record(prompt: Prompt, num_prompt_tokens: int, new: Generation) -> Record:
    num_new = len(new.token_ids)
    record: Record = {
        "id": prompt.id,
        "prompt": prompt.text,
        "completion": tokenizer.decode(new.token_ids, skip_special_tokens=True),
        "finish_reason": new.finish_reason,
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_new,
            "total_tokens": num_prompt_tokens + num_new,
        },
    }
    if new.log_probs is not None:
        record["logprobs"] = {"completion_logprobs": new.log_probs}
    return record


def _collect(finished: list[tuple[int, Record]]) -> list[tuple[int, Record]]:
    """What all copies of the model finished."""
    if distributed.data_parallel_size() == 1:
        return finished
    from megatron.core import parallel_state

    everyone: list[Any] = [None] * distributed.data_parallel_size()
    torch.distributed.all_gather_object(everyone, finished, group=parallel_state.get_data_parallel_group())
    return [pair for part in everyone for pair in part]


def _encode(prompt: Prompt, vocab_size: int) -> list[int]:
    if not prompt.text:
        raise UserError(f"Prompt {prompt.id!r} is empty; give at least one character")
    outside = tokenizer.outside_vocabulary(prompt.text, vocab_size)
    if outside:
        raise UserError(
            f"Prompt {prompt.id!r} has {outside[0]!r} at character {prompt.text.index(outside[0]) + 1}, which is not "
            f"among the tokenizer's {vocab_size} tokens; remove it"
        )
    return tokenizer.encode(prompt.text, vocab_size)


def memory_limit(model: StripedHyenaModel, batch_size: int) -> int:
    """Most tokens per sequence for which the caches of a batch fit into the free memory, on every process.

    Computed from the bytes of the caches that the model declares, so no size is written down twice.
    """
    one, two = _cache_bytes(model, 1), _cache_bytes(model, 2)
    per_token, fixed = two - one, 2 * one - two
    tokens = int((CACHE_SHARE * _free_bytes() / batch_size - fixed) / max(per_token, 1))
    fewest = torch.tensor([max(tokens, 0)], device=megatron.device())
    torch.distributed.all_reduce(fewest, torch.distributed.ReduceOp.MIN)
    return int(fewest.item())


def _free_bytes() -> int:
    if megatron.on_cuda():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except FileNotFoundError:  # macOS: all memory is the nearest figure the system gives
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def _cache_bytes(model: StripedHyenaModel, max_tokens: int) -> int:
    return sum(tensor.nbytes for tensor in _tensors(model.new_inference_state(1, max_tokens)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors inside declared caches, however nested."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, (tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _log_batch(done: GeneratedBatch, *, number: int, num_batches: int) -> None:
    size = len(done.generations)
    logger.info(
        "[PERF] Batch %d of %d: %d sequences, prefill %d tokens in %.3f s (%.1f tokens/s), "
        "decode %d steps in %.3f s (%.1f tokens/s)",
        number, num_batches, size, done.num_prefill_tokens, done.prefill_seconds,
        done.num_prefill_tokens / done.prefill_seconds, done.num_steps, done.decode_seconds,
        size * done.num_steps / done.decode_seconds if done.num_steps else 0.0,
    )  # fmt: skip


def _log_total(records: Sequence[Record], seconds: float) -> None:
    num_new = sum(record["usage"]["completion_tokens"] for record in records)
    rate = num_new / seconds
    logger.info("[PERF] Total: %d prompts, %d tokens in %.2f s (%.1f tokens/s)", len(records), num_new, seconds, rate)


def _log_memory(when: str) -> None:
    """Figures of this process: of the GPU's allocator, or the process's resident memory where there is none."""
    if distributed.rank() == 0:
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        logger.info("[MEMORY] %s: %.2f GiB, peak %.2f GiB", when, now / _GIB, peak / _GIB)
