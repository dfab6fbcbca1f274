# SPDX-License-Identifier: Apache-2.0
"""Batches of similar lengths, and what is done when memory does not suffice."""

from __future__ import annotations

import random

import pytest
import torch

from evo2_megatron.config import UserError
from evo2_megatron.tasks.scoring.batching import Backoff, plan_batches


@pytest.mark.parametrize("max_tokens, max_sequences", [(1, None), (100, None), (100, 3), (10_000, None), (10_000, 1)])
def test_plan(max_tokens, max_sequences):
    chance = random.Random(0)
    lengths = [chance.choice((1, 5, chance.randrange(1, 300))) for _ in range(200)]
    batches = plan_batches(lengths, max_tokens=max_tokens, max_sequences=max_sequences)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        of_batch = [lengths[index] for index in batch]
        assert of_batch == sorted(of_batch, reverse=True)
        assert len(batch) == 1 or len(batch) * of_batch[0] <= max_tokens
        assert max_sequences is None or len(batch) <= max_sequences
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts == sorted(firsts, reverse=True)


def test_equal_lengths_stay_in_order():
    assert plan_batches([4] * 5, max_tokens=8) == [[0, 1], [2, 3], [4]]
    assert plan_batches([], max_tokens=8) == []


class SmallMemory:
    """A runner that can hold so many tokens at a time."""

    def __init__(self, capacity: int, error: Exception) -> None:
        self.capacity, self.error, self.chunk_length = capacity, error, 65_536
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, items):
        longest = max(len(item["tokens"]) for item in items)
        self.sizes.append((len(items), longest))
        if len(items) * min(longest, self.chunk_length) > self.capacity:
            raise self.error
        return {"seq_idx": torch.stack([item["seq_idx"] for item in items])}


def items(*lengths):
    return [{"tokens": torch.zeros(n), "seq_idx": torch.tensor(i)} for i, n in enumerate(lengths)]


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_smaller_batches_when_memory_runs_out(error, caplog):
    runner = SmallMemory(250, error)
    run = Backoff(runner, can_split=True)
    assert run(items(100, 100, 90, 80, 70, 60))["seq_idx"].tolist() == [0, 1, 2, 3, 4, 5]
    assert "Not enough memory for 6 sequence(s) of up to 100 tokens" in caplog.text
    failures = len(runner.sizes)
    # what was learnt is kept: nothing too large is tried again
    run(items(100, 100, 90))
    assert all(count * longest <= 250 for count, longest in runner.sizes[failures:])


def test_shorter_pieces_for_one_sequence():
    runner = SmallMemory(3000, ERRORS[0])
    assert Backoff(runner, can_split=True)(items(20_000))["seq_idx"].tolist() == [0]
    assert runner.chunk_length == 2500


def test_too_little_memory():
    with pytest.raises(UserError, match=r"memory for 1 sequence\(s\) of up to 20000 tokens, even in pieces"):
        Backoff(SmallMemory(10, ERRORS[0]), can_split=True)(items(20_000))
    with pytest.raises(UserError, match="lower --max-batch-tokens or --chunk-length"):
        Backoff(SmallMemory(10, ERRORS[0]), can_split=False)(items(20, 20))


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="shape"):
        Backoff(SmallMemory(10, RuntimeError("shape mismatch")), can_split=True)(items(20))
