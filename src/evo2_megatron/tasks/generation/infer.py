# SPDX-License-Identifier: Apache-2.0
"""Continue prompts with a trained model: from a checkpoint and prompts to records, or to pieces as they are made."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from evo2_megatron.config import Fp8Choice, ParallelConfig, UserError
from evo2_megatron.data import tokenizer
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks.generation import records as record_files
from evo2_megatron.tasks.generation.cache_memory import memory_limit
from evo2_megatron.tasks.generation.completion import FinishReason, Generation
from evo2_megatron.tasks.generation.decoding import Decoding, GeneratedBatch
from evo2_megatron.tasks.generation.decoding_step import check_cuda_graphs
from evo2_megatron.tasks.generation.generate import GenerationSettings, plan_batches
from evo2_megatron.tasks.generation.generation_model import (
    GenerationCheckpoint,
    check_layout,
    find_checkpoint,
    running_model,
)
from evo2_megatron.tasks.generation.prompts import Prompt, encode_prompt, warn_of_no_dna
from evo2_megatron.tasks.generation.records import Record, RecordFile
from evo2_megatron.tasks.generation.sampling import derive_seed

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """What one sequence got since its last piece."""

    id: str
    """Of its prompt."""

    sample: int | None
    """Number of the continuation where a prompt has several, else None."""

    text: str
    """New characters; empty at most in the last piece."""

    log_probs: list[float] | None
    """In nat, one for each character, if asked for."""

    finish_reason: FinishReason | None
    """Of the sequence, in its last piece."""

    number: int
    """Of the sequence in its run, from 0: ids may be alike."""


OnRecord = Callable[[Record], None]
OnPiece = Callable[[Piece], None]


class _Sequence(NamedTuple):
    """One continuation to make."""

    prompt: Prompt
    token_ids: list[int]
    seed: int
    sample: int | None

    def record(self, new: Generation) -> Record:
        return record_files.make_record(
            self.prompt, new, num_prompt_tokens=len(self.token_ids), seed=self.seed, sample=self.sample
        )


class _Work(NamedTuple):
    """What to do, checked as far as it can be without the weights."""

    checkpoint: GenerationCheckpoint
    sequences: list[_Sequence]
    settings: GenerationSettings
    max_seq_length: int | None

    def check_lengths(self, limit: int, whose: str) -> None:
        num_new = self.settings.max_new_tokens
        for sequence in self.sequences:
            if len(sequence.token_ids) + num_new > limit:
                raise UserError(
                    f"Prompt {sequence.prompt.id!r} has {len(sequence.token_ids)} tokens, which with {num_new} new "
                    f"ones exceeds the {limit} {whose}; shorten it, lower --max-new-tokens or raise --max-seq-length"
                )

    def check_memory(self, model: StripedHyenaModel) -> None:
        if self.max_seq_length is None:
            limit = memory_limit(model, max(map(len, self.batches()), default=1))
            self.check_lengths(limit, "that a batch's caches have memory for")

    def batches(self) -> list[list[int]]:
        return plan_batches([len(sequence.token_ids) for sequence in self.sequences], self.settings)

    def decoding(self, model: StripedHyenaModel, batch: Sequence[int]) -> Decoding:
        sequences = [self.sequences[index] for index in batch]
        seeds = [s.seed for s in sequences]
        return Decoding.alike(model, self.settings, [s.token_ids for s in sequences], seeds=seeds)

    def pieces(self, batch: Sequence[int], decoding: Decoding) -> Iterator[Piece]:
        """Advance a batch to its end, and give what becomes certain."""
        ended = [False] * len(batch)
        with contextlib.closing(decoding.steps()) as steps:
            for _ in steps:
                for place, (index, row) in enumerate(zip(batch, decoding.rows)):
                    if ended[place]:
                        continue
                    ended[place] = row.ended
                    ids, log_probs = row.completion.release()
                    if ids or row.ended:
                        sequence = self.sequences[index]
                        text = tokenizer.decode(ids, skip_special_tokens=True)
                        given = log_probs if self.settings.return_log_probs else None
                        reason = row.completion.finish_reason
                        yield Piece(sequence.prompt.id, sequence.sample, text, given, reason, index)


def infer(
    prompts: Sequence[Prompt],
    ckpt_dir: Path,
    settings: GenerationSettings,
    *,
    num_samples: int = 1,
    max_seq_length: int | None = None,
    parallel: ParallelConfig = ParallelConfig(),
    precision: str | None = None,
    provider_overrides: Mapping[str, Any] | None = None,
    base_ckpt_dir: Path | None = None,
    fp8: Fp8Choice = "as_asked",
    with_self_test: bool = False,
    output_file: Path | None = None,
    output_format: str | None = None,
    include_prompt: bool = False,
    on_record: OnRecord | None = None,
    on_piece: OnPiece | None = None,
) -> list[Record]:
    """Continue prompts with the model of a checkpoint; every process of the job calls this.

    Args:
        prompts: What to continue; a seed of a prompt comes before the settings'.
        ckpt_dir: A Megatron Bridge checkpoint, or a folder of iterations.
        settings: What to generate; the tokenizer's size is filled in.
        num_samples: Continuations of each prompt, each with a seed of its own (``sampling.derive_seed``).
        max_seq_length: Longest prompt with its new tokens. None: what the checkpoint was trained for and the caches of
            a batch have memory for.
        parallel: Tensor and pipeline sizes.
        precision: As for ``checkpoint.load.load_model``, like ``provider_overrides``, ``base_ckpt_dir`` and ``fp8``.
        with_self_test: Compare the model with the numbers stored in its checkpoint before it generates.
        output_file: For the records.
        output_format: One of ``records.FORMATS``; None: by the suffix of ``output_file``.
        include_prompt: In FASTA and text, the prompt stands before the completion.
        on_record: Called on rank 0 with each record as it finishes.
        on_piece: Called on rank 0 with each piece as it is made; this takes a single copy of the model.

    Returns:
        The records on rank 0, and nothing on the other ranks: all of the first prompt, then all of the second.

    Raises:
        UserError: Something about the checkpoint, the prompts or the settings is wrong; no output file is written.
    """
    work = _prepare(prompts, ckpt_dir, settings, num_samples, max_seq_length, parallel, base_ckpt_dir)
    if on_piece is not None:
        _check_one_copy(parallel)
    elif len(prompts) > 1:
        distributed.tell_of_idle_gpus()
    speaks = distributed.rank() == 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_output(work, output_file, output_format, include_prompt))
        how = {"precision": precision, "provider_overrides": provider_overrides, "fp8": fp8}
        running = running_model(work.checkpoint, parallel=parallel, with_self_test=with_self_test, **how)
        model = stack.enter_context(running)
        work.check_memory(model)
        return _run(model, work, file, on_record if speaks else None, on_piece if speaks else None)


def stream(
    prompts: Sequence[Prompt],
    ckpt_dir: Path,
    settings: GenerationSettings,
    *,
    num_samples: int = 1,
    max_seq_length: int | None = None,
    parallel: ParallelConfig = ParallelConfig(),
    precision: str | None = None,
    provider_overrides: Mapping[str, Any] | None = None,
    base_ckpt_dir: Path | None = None,
    fp8: Fp8Choice = "as_asked",
    with_self_test: bool = False,
) -> Iterator[Piece]:
    """As ``infer``, but give each character as soon as it is certain; every process of the job iterates.

    The model is loaded at the first piece. Closing the iterator, on every process, frees the model, its caches and the
    process groups. Sequences of one batch take turns.

    Raises:
        UserError: As ``infer``, before the first piece; or there are several copies of the model.
    """
    work = _prepare(prompts, ckpt_dir, settings, num_samples, max_seq_length, parallel, base_ckpt_dir)
    _check_one_copy(parallel)

    def pieces() -> Iterator[Piece]:
        with running_model(
            work.checkpoint,
            parallel=parallel,
            precision=precision,
            provider_overrides=provider_overrides,
            fp8=fp8,
            with_self_test=with_self_test,
        ) as model:
            work.check_memory(model)
            for batch in work.batches():
                yield from work.pieces(batch, work.decoding(model, batch))

    return pieces()


def _prepare(
    prompts: Sequence[Prompt],
    ckpt_dir: Path,
    settings: GenerationSettings,
    num_samples: int,
    max_seq_length: int | None,
    parallel: ParallelConfig,
    base_ckpt_dir: Path | None,
) -> _Work:
    check_layout(parallel)
    if settings.cuda_graphs:
        check_cuda_graphs(parallel)
    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}; it must be 1 or more")
    checkpoint = find_checkpoint(ckpt_dir, base_ckpt_dir)
    settings = dataclasses.replace(settings, vocab_size=checkpoint.vocab_size)
    settings.check_vocabulary(checkpoint.vocab_size)
    sequences = []
    warn_of_no_dna(prompts)
    for number, prompt in enumerate(prompts):
        ids = encode_prompt(prompt, checkpoint.vocab_size, keep_case=settings.keep_prompt_case)
        base, own = (settings.sampling.seed, number) if prompt.seed is None else (prompt.seed, 0)
        sequences += [
            _Sequence(prompt, ids, derive_seed(base, prompt=own, sample=sample), None if num_samples == 1 else sample)
            for sample in range(num_samples)
        ]
    work = _Work(checkpoint, sequences, settings, max_seq_length)
    if max_seq_length is None:
        work.check_lengths(checkpoint.seq_length, "that the checkpoint was trained for")
    else:
        work.check_lengths(max_seq_length, "of --max-seq-length")
    return work


def _output(
    work: _Work, path: Path | None, format_name: str | None, include_prompt: bool
) -> contextlib.AbstractContextManager[RecordFile | None]:
    """The file to write, on rank 0; UserError if its format does not suit the records."""
    if format_name is None:
        format_name = "jsonl" if path is None else record_files.format_of(Path(path))
    names = [record_files.sequence_name(s.prompt.id, s.sample) for s in work.sequences]
    record_files.check_format(format_name, names, include_prompt=include_prompt)
    if path is None or distributed.rank() != 0:
        return contextlib.nullcontext()
    return RecordFile(path, format_name=format_name, include_prompt=include_prompt)


def _check_one_copy(parallel: ParallelConfig) -> None:
    copies = distributed.world_size() // parallel.model_size
    if copies > 1:
        raise UserError(
            f"{distributed.world_size()} processes hold {copies} copies of the model, and only one can be shown as it "
            f"goes; start {parallel.model_size} of them, or leave out --stream"
        )


def _run(
    model: StripedHyenaModel,
    work: _Work,
    file: RecordFile | None,
    on_record: OnRecord | None,
    on_piece: OnPiece | None,
) -> list[Record]:
    """Give each copy of the model every n-th batch; collect on all what they finish."""
    start = time.perf_counter()
    batches = work.batches()
    num_copies, copy = distributed.data_parallel_size(), distributed.data_parallel_rank()
    records: dict[int, Record] = {}
    for first in range(0, len(batches), num_copies):
        finished = []
        if first + copy < len(batches):
            batch = batches[first + copy]
            decoding = work.decoding(model, batch)
            for piece in work.pieces(batch, decoding):
                if on_piece is not None:
                    on_piece(piece)
            done = decoding.result()
            if distributed.rank() == 0:  # others log nothing
                _log_batch(done, number=first + copy + 1, num_batches=len(batches))
            finished = [(index, work.sequences[index].record(new)) for index, new in zip(batch, done.generations)]
        finished = _collect(finished)
        records.update(finished)
        if file is not None:
            file.add(record for _, record in finished)
        if on_record is not None:
            for _, record in finished:
                on_record(record)
    if distributed.rank() != 0:
        return []
    ordered = [records[index] for index in range(len(work.sequences))]
    if file is not None:
        file.finish(ordered)
    _log_total(ordered, time.perf_counter() - start)
    return ordered


def _collect(finished: list[tuple[int, Record]]) -> list[tuple[int, Record]]:
    """What all copies of the model finished."""
    if distributed.data_parallel_size() == 1:
        return finished
    from megatron.core import parallel_state

    everyone: list[Any] = [None] * distributed.data_parallel_size()
    torch.distributed.all_gather_object(everyone, finished, group=parallel_state.get_data_parallel_group())
    return [pair for part in everyone for pair in part]


def _log_batch(done: GeneratedBatch, *, number: int, num_batches: int) -> None:
    size = len(done.generations)
    logger.info(
        "[PERF] Batch %d of %d: %d sequences, prefill %d tokens in %.3f s (%.1f tokens/s), "
        "decode %d steps in %.3f s (%.1f tokens/s)",
        number, num_batches, size, done.num_prefill_tokens, done.prefill_seconds,
        done.num_prefill_tokens / done.prefill_seconds, done.num_steps, done.decode_seconds,
        done.num_decoded_tokens / done.decode_seconds if done.num_decoded_tokens else 0.0,
    )  # fmt: skip


def _log_total(records: Sequence[Record], seconds: float) -> None:
    num_new = sum(record["usage"]["completion_tokens"] for record in records)
    rate = num_new / seconds
    logger.info(
        "[PERF] Total: %d sequences, %d tokens in %.2f s (%.1f tokens/s)", len(records), num_new, seconds, rate
    )
