# SPDX-License-Identifier: Apache-2.0
"""Guided generation with a trained model: from a checkpoint, prompts and a scorer to records."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from evo2_megatron.config import Fp8Choice, ParallelConfig, UserError
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks.generation import records as record_files
from evo2_megatron.tasks.generation.cache_memory import memory_limit
from evo2_megatron.tasks.generation.generate import GenerationSettings
from evo2_megatron.tasks.generation.generation_model import (
    GenerationCheckpoint,
    check_layout,
    find_checkpoint,
    running_model,
)
from evo2_megatron.tasks.generation.guided import Guided, Search, SearchSettings
from evo2_megatron.tasks.generation.prompts import Prompt, encode_prompt, warn_of_no_dna
from evo2_megatron.tasks.generation.records import Record, RecordFile
from evo2_megatron.tasks.generation.sampling import derive_seed
from evo2_megatron.tasks.generation.scorers import Score, check_scores

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel


class _Start(NamedTuple):
    """A prompt to search from."""

    prompt: Prompt
    token_ids: list[int]
    seed: int

    def record(self, rank: int, guided: Guided, settings: GenerationSettings) -> Record:
        """``rank``: number of the sequence in its search, from 0, the best."""
        new, log_probs = guided.generation, guided.generation.log_probs
        if not settings.return_log_probs:
            new = new._replace(log_probs=None)
        record = record_files.make_record(
            self.prompt, new, num_prompt_tokens=len(self.token_ids), seed=self.seed, sample=rank
        )
        record["score"] = guided.score
        record["log_prob_mean"] = math.fsum(log_probs) / len(log_probs) if log_probs else None
        return record


def guide(
    prompts: Sequence[Prompt],
    ckpt_dir: Path,
    settings: GenerationSettings,
    search: SearchSettings,
    score: Score,
    *,
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
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Search from each prompt with the model of a checkpoint, one prompt after the other; every process calls this.

    Args:
        prompts: Where to start; a seed of a prompt comes before the settings'.
        ckpt_dir: A Megatron Bridge checkpoint, or a folder of iterations.
        settings: How tokens are drawn, and how many; the tokenizer's size is filled in.
        search: How wide.
        score: Called on rank 0 with a list of strings; one number for each, higher is better.
        max_seq_length: As for ``tasks.generation.infer.infer``, like what follows; there is one copy of the model.
        on_record: Called on rank 0 with each record as its search ends.

    Returns:
        On rank 0, for each prompt at most ``search.beams`` records, best first, with ``score`` and ``log_prob_mean``,
        which is in nat per new base; nothing on other ranks. A record's seed is that of its prompt's search.

    Raises:
        UserError: Something about the checkpoint, the prompts, the settings or the scorer is wrong; no output file is
            written.
    """
    _check_processes(parallel)
    checkpoint = find_checkpoint(ckpt_dir, base_ckpt_dir)
    settings = dataclasses.replace(settings, vocab_size=checkpoint.vocab_size)
    settings.check_vocabulary(checkpoint.vocab_size)
    starts = _starts(prompts, checkpoint, settings)
    warn_of_no_dna(prompts)
    if max_seq_length is None:
        _check_lengths(starts, settings, checkpoint.seq_length, "that the checkpoint was trained for")
    else:
        _check_lengths(starts, settings, max_seq_length, "of --max-seq-length")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_output(starts, search, output_file, output_format, include_prompt))
        how = {"precision": precision, "provider_overrides": provider_overrides, "fp8": fp8}
        running = running_model(checkpoint, parallel=parallel, with_self_test=with_self_test, **how)
        model = stack.enter_context(running)
        if max_seq_length is None:
            rows = search.beams + min(search.width, settings.max_batch_size)
            _check_lengths(starts, settings, memory_limit(model, rows), "that the caches have memory for")
        return _run(model, starts, settings, search, score, file, on_record)


def _run(
    model: StripedHyenaModel,
    starts: Sequence[_Start],
    settings: GenerationSettings,
    search: SearchSettings,
    score: Score,
    file: RecordFile | None,
    on_record: Callable[[Record], None] | None,
) -> list[Record]:
    records: list[Record] = []
    for start in starts:
        one = Search(model, settings, search, _for_every_rank(score), seed=start.seed, name=start.prompt.id)
        found = one.run(start.token_ids)
        if distributed.rank() != 0:
            continue
        new = [start.record(rank, guided, settings) for rank, guided in enumerate(found)]
        records += new
        if file is not None:
            file.add(new)
        for record in new if on_record else ():
            on_record(record)
    if file is not None:
        file.finish(records)
    return records


def _check_processes(parallel: ParallelConfig) -> None:
    check_layout(parallel)
    if distributed.world_size() > parallel.model_size:
        raise UserError(
            f"a search is done by one copy of the model, which takes {parallel.model_size} of the "
            f"{distributed.world_size()} processes; start as many, or run evo2_guide once for each part of the prompts"
        )


def _starts(prompts: Sequence[Prompt], checkpoint: GenerationCheckpoint, settings: GenerationSettings) -> list[_Start]:
    starts = []
    for number, prompt in enumerate(prompts):
        base, own = (settings.sampling.seed, number) if prompt.seed is None else (prompt.seed, 0)
        ids = encode_prompt(prompt, checkpoint.vocab_size, keep_case=settings.keep_prompt_case)
        starts.append(_Start(prompt, ids, derive_seed(base, prompt=own)))
    return starts


def _check_lengths(starts: Sequence[_Start], settings: GenerationSettings, limit: int, whose: str) -> None:
    for start in starts:
        if len(start.token_ids) + settings.max_new_tokens > limit:
            raise UserError(
                f"Prompt {start.prompt.id!r} has {len(start.token_ids)} tokens, which with {settings.max_new_tokens} "
                f"new ones exceeds the {limit} {whose}; shorten it, lower --max-new-tokens, --beams or "
                "--max-batch-size, or raise --max-seq-length"
            )


def _output(
    starts: Sequence[_Start], search: SearchSettings, path: Path | None, format_name: str | None, include_prompt: bool
) -> contextlib.AbstractContextManager[RecordFile | None]:
    """The file to write, on rank 0; UserError if its format does not suit the records."""
    if format_name is None:
        format_name = "jsonl" if path is None else record_files.format_of(Path(path))
    names = [record_files.sequence_name(start.prompt.id, k) for start in starts for k in range(search.beams)]
    record_files.check_format(format_name, names, include_prompt=include_prompt)
    if path is None or distributed.rank() != 0:
        return contextlib.nullcontext()
    return RecordFile(path, format_name=format_name, include_prompt=include_prompt)


def _for_every_rank(score: Score) -> Score:
    """Let rank 0 ask the scorer, and tell the others what it said."""
    if distributed.world_size() == 1:
        return score

    def shared(sequences: list[str]) -> Sequence[float]:
        answer: list[Any] = [None, None]
        if distributed.rank() == 0:
            try:
                answer[0] = check_scores(score(sequences), len(sequences), "the scorer")
            except UserError as error:
                answer[1] = str(error)
        torch.distributed.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    return shared
