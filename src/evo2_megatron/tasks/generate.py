# SPDX-License-Identifier: Apache-2.0
"""Continue prompts token by token with a StripedHyena model.

Shape legend: B sequences, T tokens of prompt and completion, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import BOS, EOD, PAD, SEP, UNK
from evo2_megatron.tasks.sampling import NOT_FINITE, Sampling, draw, log_probability, uniforms

if TYPE_CHECKING:
    from evo2_megatron.model.inference_state import InferenceState
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

PREFILL_CHUNK = 2_048
"""Tokens of a prompt that go through the model at once, unless told otherwise. It bounds the activations' memory, and
beyond it nothing is gained: on a CPU 32,768 tokens take as long as in one go, and 8,192 at a time take longer."""

_NEVER_DRAWN = (PAD, BOS, SEP, UNK)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSettings:
    """What to generate from each prompt, and in which portions.

    Raises:
        UserError: A number is out of range.
    """

    max_new_tokens: int = 100
    """Most tokens to add to each prompt."""

    sampling: Sampling = field(default_factory=Sampling)
    """How tokens are drawn."""

    return_log_probs: bool = False
    """Also give each new token's log-probability."""

    stop_ids: tuple[int, ...] = (EOD,)
    """Tokens that end a sequence."""

    vocab_size: int | None = None
    """Tokens that the tokenizer knows; ids from there on are never drawn. None: as many as the model."""

    max_batch_size: int = 1
    """Most prompts that go through the model together."""

    prefill_chunk: int = PREFILL_CHUNK
    """Most tokens of a prompt that go through the model at once; 0: all of them."""

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("max_batch_size", 1), ("prefill_chunk", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {least} or more")


class Generation(NamedTuple):
    """The continuation of one prompt."""

    token_ids: list[int]
    """New tokens, without the one that stopped it."""

    finish_reason: Literal["length", "stop"]
    """``stop``: the model ended the sequence before the number of tokens asked for."""

    log_probs: list[float] | None
    """Natural logarithm of each new token's probability under the model's own distribution, if asked for."""


class GeneratedBatch(NamedTuple):
    """Prompts that went through the model together."""

    generations: list[Generation]
    """In the order of the batch's prompts."""

    num_prefill_tokens: int
    """Tokens processed in blocks, all sequences together."""

    prefill_seconds: float
    """Time to the first drawn token."""

    num_steps: int
    """Forward passes of one token per sequence."""

    decode_seconds: float
    """Time of those passes."""


def plan_batches(lengths: Sequence[int], settings: GenerationSettings) -> list[list[int]]:
    """Group prompts by length.

    A batch is prefilled up to its shortest prompt, and the rest of the longer ones is fed one token per step. So a
    prompt joins a batch only if that takes no more steps than generating for it separately would.

    Returns:
        Indices into ``lengths``, each once, shortest prompts first.
    """
    most_extra = settings.max_new_tokens
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        batch = batches[-1] if batches else []
        if batch and len(batch) < settings.max_batch_size and lengths[index] - lengths[batch[0]] <= most_extra:
            batch.append(index)
        else:
            batches.append([index])
    return batches


def generate(
    model: StripedHyenaModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings = GenerationSettings()
) -> list[Generation]:
    """Continue every prompt. But for rounding, what a prompt gives does not depend on the others or the batch size.

    Args:
        model: In evaluation mode; all processes of one copy of the model must call this together.
        prompts: Token ids, at least one each.
        settings: A prompt's random numbers follow from the seed and its position in ``prompts``.

    Returns:
        One Generation for each prompt, in their order.

    Raises:
        UserError: A prompt is empty, top_k covers the vocabulary, or the model's output is not finite.
    """
    decoder = Decoder(model, settings)
    generations: dict[int, Generation] = {}
    for batch in plan_batches([len(prompt) for prompt in prompts], settings):
        done = decoder.run([prompts[index] for index in batch], sequence_numbers=batch)
        generations.update(zip(batch, done.generations))
    return [generations[index] for index in range(len(prompts))]


class Decoder:
    """Continues batches of prompts with one model."""

    def __init__(self, model: StripedHyenaModel, settings: GenerationSettings) -> None:
        self.model = model
        self.settings = settings

    @torch.inference_mode()
    def run(self, prompts: Sequence[Sequence[int]], *, sequence_numbers: Sequence[int]) -> GeneratedBatch:
        """Continue prompts together.

        Args:
            prompts: Token ids, at least one each.
            sequence_numbers: The number of each prompt; with the seed it decides the prompt's random numbers.
        """
        start = time.perf_counter()
        lengths = [len(prompt) for prompt in prompts]
        shortest, longest = min(lengths), max(lengths)
        if shortest == 0:
            raise UserError("a prompt is empty; give at least one token")
        end = longest + self.settings.max_new_tokens
        device = next(self.model.parameters()).device
        token_BT, uniform_BT = self._buffers(prompts, sequence_numbers, end)
        token_BT, uniform_BT = token_BT.to(device), uniform_BT.to(device)
        length_B = torch.tensor(lengths, device=device)
        rows = [_Row(length, self.settings) for length in lengths]

        state = self.model.new_inference_state(len(prompts), end, last_token_logits_only=True)
        logits_BV = self._prefill(token_BT[:, :shortest], state)
        blocked_V = self._blocked(logits_BV)
        log_prob_BT = torch.empty(token_BT.shape, device=device) if self.settings.return_log_probs else None
        for position in range(shortest, end):
            drawn_B = draw(logits_BV, uniform_BT[:, position], self.settings.sampling, blocked_V=blocked_V)
            if log_prob_BT is not None:
                log_prob_BT[:, position] = log_probability(logits_BV, drawn_B.clamp(min=0))
            if position < longest:
                drawn_B = torch.where(position < length_B, token_BT[:, position], drawn_B)
            token_BT[:, position] = drawn_B
            # the one wait for the device per token
            for row, token in zip(rows, drawn_B.tolist()):
                row.take(position, token)
            if position == shortest:
                first_token = time.perf_counter()
            if all(row.finish_reason for row in rows):
                break
            logits_BV = forward_last(self.model, token_BT[:, position : position + 1], state)
        return GeneratedBatch(
            [row.generation(None if log_prob_BT is None else log_prob_BT[i]) for i, row in enumerate(rows)],
            num_prefill_tokens=len(prompts) * shortest,
            prefill_seconds=first_token - start,
            num_steps=position - shortest,
            decode_seconds=time.perf_counter() - first_token,
        )

    def _buffers(
        self, prompts: Sequence[Sequence[int]], sequence_numbers: Sequence[int], end: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens, with room for the new ones; and for each place the random number that would draw its token."""
        token_BT = torch.full((len(prompts), end), PAD)
        uniform_BT = torch.zeros((len(prompts), end), dtype=torch.float64)
        for row, (prompt, number) in enumerate(zip(prompts, sequence_numbers)):
            token_BT[row, : len(prompt)] = torch.tensor(prompt)
            new = slice(len(prompt), len(prompt) + self.settings.max_new_tokens)
            uniform_BT[row, new] = uniforms(self.settings.sampling.seed, number, self.settings.max_new_tokens)
        return token_BT, uniform_BT

    def _prefill(self, token_BT: Tensor, state: InferenceState) -> Tensor:
        for chunk_BT in token_BT.split(self.settings.prefill_chunk or token_BT.shape[1], dim=1):
            logits_BV = forward_last(self.model, chunk_BT, state)
        return logits_BV

    def _blocked(self, logits_BV: Tensor) -> Tensor:
        num_logits = logits_BV.shape[-1]
        vocab_size = num_logits if self.settings.vocab_size is None else self.settings.vocab_size
        self.settings.sampling.check_vocabulary(vocab_size)
        blocked_V = torch.zeros(num_logits, dtype=torch.bool, device=logits_BV.device)
        blocked_V[vocab_size:] = True
        blocked_V[[token for token in _NEVER_DRAWN if token not in self.settings.stop_ids]] = True
        return blocked_V


class _Row:
    """What one sequence of a batch has drawn so far, on the host."""

    def __init__(self, prompt_length: int, settings: GenerationSettings) -> None:
        self.prompt_length = prompt_length
        self.settings = settings
        self.token_ids: list[int] = []
        self.finish_reason: Literal["length", "stop"] | None = None

    def take(self, position: int, token: int) -> None:
        """Note the token at a position, unless it is the prompt's own or the sequence is finished."""
        if token == NOT_FINITE:
            raise UserError(
                "the model's output is not finite; check the weights, or try --mixed-precision-recipe fp32"
            )
        if position < self.prompt_length or self.finish_reason:
            return
        if token in self.settings.stop_ids:
            self.finish_reason = "stop"
            return
        self.token_ids.append(token)
        if len(self.token_ids) == self.settings.max_new_tokens:
            self.finish_reason = "length"

    def generation(self, log_prob_T: Tensor | None) -> Generation:
        assert self.finish_reason is not None
        if log_prob_T is None:
            return Generation(self.token_ids, self.finish_reason, None)
        new = slice(self.prompt_length, self.prompt_length + len(self.token_ids))
        return Generation(self.token_ids, self.finish_reason, log_prob_T[new].tolist())


def forward_last(model: StripedHyenaModel, token_BT: Tensor, state: InferenceState) -> Tensor:
    """Run tokens through the model, all its pipeline stages, continuing from a state.

    Args:
        model: This process's stage.
        token_BT: The new tokens; every stage gets the same.
        state: Made with ``last_token_logits_only``; brought up to date in place.

    Returns:
        Logits after the last token, logits_BV, on every process.
    """
    from evo2_megatron.model.pipeline import forward_through_stages

    output = forward_through_stages(model, token_BT, inference_context=state)
    group = model.pg_collection.pp
    if group.size() == 1:
        return output[:, -1]
    if output is None:
        logits_BV = torch.empty((token_BT.shape[0], model.vocab_size), device=token_BT.device)
    else:
        logits_BV = output[:, -1].float().contiguous()
    torch.distributed.broadcast(logits_BV, group=group, group_src=group.size() - 1)
    return logits_BV
