# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of a reference sequence and its alternatives, with their common start computed once, or whole.

The state after the common start (filter tails, modes, keys and values) is copied for the reference and for each
alternative, which then go through together. Both ways give float64 sums over the same tokens.
Shape legend: G groups, K alternatives of a group, N tokens of a sequence, P tokens shared, R rows, S of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from evo2_megatron.data.tokenizer import EOD, PAD, encode_sequence
from evo2_megatron.runtime import megatron
from evo2_megatron.tasks.scoring.batching import BATCH_TOKENS_CUDA, Backoff
from evo2_megatron.tasks.scoring.prediction_runner import Runner
from evo2_megatron.tasks.scoring.variant_windows import Bases, Group
from evo2_megatron.tasks.steps import finished

if TYPE_CHECKING:
    from evo2_megatron.model.inference_state import InferenceState

Batch = dict[str, Tensor]
Item = dict[str, Tensor]

BATCH_TOKENS_CPU = 8_448
"""The second halves of two windows, with what the cut leaves of the first: half of what suits whole sequences."""


def batch_tokens() -> int:
    """Most tokens that go through the model together."""
    return BATCH_TOKENS_CUDA if megatron.on_cuda() else BATCH_TOKENS_CPU


class Score(NamedTuple):
    """What was computed for an ALT; in nat."""

    delta: float
    reference: float
    alternative: float
    num_scored: int

    @classmethod
    def of_strands(cls, strands: Sequence[Mapping[str, Tensor]], collapse: Literal["mean", "sum"]) -> Score:
        """The mean of strands.

        Args:
            strands: ``reference``, ``alternative`` and ``num_scored`` of each, scalars.
            collapse: ``delta`` per scored token, or in sum.
        """
        reference, alternative = (
            sum(of_one[name].item() for of_one in strands) / len(strands) for name in ("reference", "alternative")
        )
        num_scored, delta = int(strands[0]["num_scored"]), alternative - reference
        return cls(delta / num_scored if collapse == "mean" else delta, reference, alternative, num_scored)


def make_item(group: Group, genome: Bases, *, prepend_bos: bool) -> Item:
    """A group as token ids: ``tokens`` [N] of the reference, ``alternatives`` [K, N], ``num_shared`` scalar, int64.

    Raises:
        UserError: The contig holds a character that has no token.
    """

    def ids(bases: bytes) -> list[int]:
        prefix = [EOD] if prepend_bos else []
        return prefix + list(encode_sequence(bases, name=f"contig {group.contig.decode(errors='backslashreplace')!r}"))

    return {
        "tokens": torch.tensor(ids(group.reference(genome))),
        "alternatives": torch.tensor([ids(bases) for bases in group.alternatives(genome)]),
        "num_shared": torch.tensor(group.num_shared and group.num_shared + prepend_bos),
    }


class SharedContext:
    """Runs the common start of a group once."""

    def __init__(self, runner: Runner, *, max_tokens: int) -> None:
        """``runner``: computes log-probabilities. ``max_tokens``: of the rows that go through together."""
        self._runner, self._max_tokens = runner, max_tokens

    @property
    def chunk_length(self) -> int:
        return self._runner.chunk_length

    @chunk_length.setter
    def chunk_length(self, value: int) -> None:
        # what Backoff shortens when memory runs out; fewer rows at a time come with it
        self._max_tokens = min(self._max_tokens, value)
        self._runner.chunk_length = value

    def __call__(self, items: Sequence[Item]) -> Batch | None:
        """``reference`` and ``alternative``, float64, and ``num_scored``, int64, [sum of K].

        None on all pipeline stages but the last. All items have the same N and the same P.
        """
        return finished(self.in_pieces(items))

    def in_pieces(self, items: Sequence[Item]) -> Generator[None, None, Batch | None]:
        """As a call, with an item after each piece that goes through the model."""
        tokens_GN = torch.stack([item["tokens"] for item in items])
        num_groups, num_tokens = tokens_GN.shape
        num_shared = int(items[0]["num_shared"]) // self._runner.multiple * self._runner.multiple
        padded = num_shared + math.ceil((num_tokens - num_shared) / self._runner.multiple) * self._runner.multiple
        state = self._runner.new_state(num_groups, padded)
        start_G: Tensor | None = torch.zeros(num_groups, dtype=torch.float64)
        if num_shared:
            next_GP = tokens_GN[:, 1 : num_shared + 1]
            log_probs_GP = yield from self._runner.extending(state, tokens_GN[:, :num_shared], next_GP)
            start_G = None if log_probs_GP is None else log_probs_GP.sum(-1, dtype=torch.float64)

        row_sequences = [seq_N for item in items for seq_N in (item["tokens"], *item["alternatives"])]
        group_R = torch.tensor([g for g, item in enumerate(items) for _ in range(1 + len(item["alternatives"]))])
        size = max(1, self._max_tokens // (num_tokens - num_shared))
        ends = []
        for first in range(0, len(row_sequences), size):
            rows = torch.stack(row_sequences[first : first + size])[:, num_shared:]
            ends.append((yield from self._ends(state, rows, group_R[first : first + size], padded - num_shared)))
        if start_G is None or ends[0] is None:
            return None
        total_R = start_G[group_R] + torch.cat(ends)
        return _by_alternative(total_R, group_R, num_tokens)

    def _ends(
        self, state: InferenceState, rows_RS: Tensor, group_R: Tensor, padded: int
    ) -> Generator[None, None, Tensor | None]:
        num_rows, num_tokens = rows_RS.shape
        tokens_RS = torch.full((num_rows, padded), PAD)
        tokens_RS[:, :num_tokens] = rows_RS
        device = next(self._runner.model.parameters()).device
        copies = state.copies(group_R.to(device))
        log_probs_RS = yield from self._runner.extending(copies, tokens_RS, tokens_RS.roll(-1, dims=1))
        return None if log_probs_RS is None else log_probs_RS[:, : num_tokens - 1].sum(-1, dtype=torch.float64)


class WholeWindows:
    """Runs every sequence from its first base, as ``predict_evo2`` does."""

    def __init__(self, runner: Runner, *, max_tokens: int, can_split: bool) -> None:
        """``max_tokens``: of the sequences that go through together. ``can_split``: as for ``Backoff``."""
        self._run, self._max_tokens = Backoff(runner, can_split=can_split), max_tokens

    def __call__(self, items: Sequence[Item]) -> Batch | None:
        """As ``SharedContext``."""
        sequences = [sequence_N for item in items for sequence_N in (item["tokens"], *item["alternatives"])]
        group_R = torch.tensor([g for g, item in enumerate(items) for _ in range(1 + len(item["alternatives"]))])
        samples = [
            {"tokens": tokens_N, "loss_mask": torch.ones_like(tokens_N), "seq_idx": torch.tensor(row)}
            for row, tokens_N in enumerate(sequences)
        ]
        size = max(1, self._max_tokens // len(sequences[0]))
        results = [self._run(samples[first : first + size]) for first in range(0, len(samples), size)]
        if results[0] is None:
            return None
        totals_R = torch.cat([result["log_likelihood"] for result in results])
        return _by_alternative(totals_R, group_R, len(sequences[0]))


def _by_alternative(total_R: Tensor, group_R: Tensor, num_tokens: int) -> Batch:
    """The first row of each group is its reference; the first of its tokens is not scored."""
    is_first_R = torch.ones_like(group_R, dtype=torch.bool)
    is_first_R[1:] = group_R[1:] != group_R[:-1]
    alternative = total_R[~is_first_R]
    num_scored = torch.full((len(alternative),), num_tokens - 1)
    reference = total_R[is_first_R][group_R[~is_first_R]]
    return {"reference": reference, "alternative": alternative, "num_scored": num_scored}
