# SPDX-License-Identifier: Apache-2.0
"""Continue prompts token by token with a StripedHyena model.

Shape legend: B sequences, T tokens of prompt and completion, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import BOS, EOD, PAD, SEP, UNK, outside_vocabulary
from evo2_megatron.tasks.completion import Completion, Generation
from evo2_megatron.tasks.sampling import NOT_FINITE, Sampling, derive_seed, draw, log_probability, uniforms

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

    stop_at_eod: bool = True
    """False: the end of a document is never drawn, whatever ``stop_ids`` says."""

    alphabet: str = ""
    """Characters to draw among, beside ``end_ids``; empty: all that the tokenizer knows."""

    stop_strings: tuple[str, ...] = ()
    """Texts that end a sequence as soon as its new tokens hold one."""

    include_stop_string: bool = False
    """Keep the text that ended a sequence, instead of cutting it off."""

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
        for text in self.stop_strings:
            if not text:
                raise UserError("a stop string is empty; give at least one character")
            foreign = [c for c in text if self.alphabet and c not in self.alphabet]
            if foreign:
                raise UserError(
                    f"stop string {text!r} has {foreign[0]!r}, which is not in the alphabet {self.alphabet!r}, so it "
                    "would never appear"
                )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError unless top_k, the alphabet and the stop strings fit the tokenizer."""
        self.sampling.check_vocabulary(vocab_size)
        for what, text in (("alphabet", self.alphabet), *(("stop string", text) for text in self.stop_strings)):
            foreign = outside_vocabulary(text, vocab_size)
            if foreign:
                raise UserError(
                    f"{what} {text!r} has {foreign[0]!r}, which is not among the tokenizer's {vocab_size} tokens; "
                    "remove it"
                )

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that may be drawn and end a sequence."""
        return self.stop_ids if self.stop_at_eod else tuple(token for token in self.stop_ids if token != EOD)

    def new_completion(self) -> Completion:
        """An empty continuation that ends by these rules."""
        return Completion(
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.end_ids,
            stop_strings=self.stop_strings,
            include_stop_string=self.include_stop_string,
        )

    def blocked(self, num_logits: int, device: torch.device) -> Tensor:
        """Tokens that are never drawn, blocked_V, bool; UserError as ``check_vocabulary``."""
        vocab_size = num_logits if self.vocab_size is None else self.vocab_size
        self.check_vocabulary(vocab_size)
        blocked_V = torch.zeros(num_logits, dtype=torch.bool)
        blocked_V[vocab_size:] = True
        blocked_V[list(_NEVER_DRAWN)] = True
        if self.alphabet:
            blocked_V[:] = True
            blocked_V[[ord(character) for character in self.alphabet]] = False
        blocked_V[EOD] |= not self.stop_at_eod
        blocked_V[list(self.end_ids)] = False
        return blocked_V.to(device)


class GeneratedBatch(NamedTuple):
    """Prompts that went through the model together."""

    generations: list[Generation]
    """In the order of the batch's prompts."""

    num_prefill_tokens: int
    """Tokens processed in blocks, all sequences together; a beginning that several share counts once."""

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
    model: StripedHyenaModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings = GenerationSettings(),
    *,
    seeds: Sequence[int] | None = None,
) -> list[Generation]:
    """Continue every prompt. But for rounding, what a prompt gives does not depend on the others or the batch size.

    Args:
        model: In evaluation mode; all processes of one copy of the model must call this together.
        prompts: Token ids, at least one each.
        settings: What to generate.
        seeds: Of each prompt. None: made from the settings' seed and the prompts' numbers by ``derive_seed``.

    Returns:
        One Generation for each prompt, in their order.

    Raises:
        UserError: A prompt is empty, top_k covers the vocabulary, or the model's output is not finite.
    """
    if seeds is None:
        seeds = [derive_seed(settings.sampling.seed, prompt=number) for number in range(len(prompts))]
    generations: dict[int, Generation] = {}
    for batch in plan_batches([len(prompt) for prompt in prompts], settings):
        decoding = Decoding(model, settings, [prompts[i] for i in batch], seeds=[seeds[i] for i in batch])
        generations.update(zip(batch, decoding.run().generations))
    return [generations[index] for index in range(len(prompts))]


class Decoding:
    """One batch of prompts on its way through a model."""

    def __init__(
        self,
        model: StripedHyenaModel,
        settings: GenerationSettings,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
    ) -> None:
        """Compute nothing yet.

        Args:
            model: In evaluation mode.
            settings: What to generate.
            prompts: Token ids, at least one each; UserError if there is none.
            seeds: Of each prompt; with the places in the sequence they decide the random numbers.
        """
        self._model, self._settings, self._prompts, self._seeds = model, settings, prompts, seeds
        self._lengths = [len(prompt) for prompt in prompts]
        if min(self._lengths) == 0:
            raise UserError("a prompt is empty; give at least one token")
        self.rows = [settings.new_completion() for _ in prompts]
        """One for each prompt, in their order."""
        self.logits_BV: Tensor | None = None
        """What the newest tokens were drawn from, before any limit."""
        self.prefill_seconds = self.decode_seconds = 0.0
        self.num_steps = self.num_prefill_tokens = 0

    def run(self) -> GeneratedBatch:
        """Go to the end."""
        for _ in self.steps():
            pass
        return self.result()

    @torch.inference_mode()
    def steps(self) -> Iterator[None]:
        """Advance by one place of the sequences at each item. Closing the iterator frees the caches."""
        start = time.perf_counter()
        shortest, longest = min(self._lengths), max(self._lengths)
        end = longest + self._settings.max_new_tokens
        device = next(self._model.parameters()).device
        prompt_BT, uniform_BT = (tensor.to(device) for tensor in self._buffers(end))
        length_B = torch.tensor(self._lengths, device=device)

        state, logits_BV = self._begin(prompt_BT[:, :shortest], end)
        blocked_V = self._settings.blocked(logits_BV.shape[-1], device)
        for position in range(shortest, end):
            drawn_B = draw(logits_BV, uniform_BT[:, position], self._settings.sampling, blocked_V=blocked_V)
            self._take(position, drawn_B, logits_BV)
            self.logits_BV = logits_BV
            now = time.perf_counter()
            if position == shortest:
                self.prefill_seconds = now - start
            self.num_steps, self.decode_seconds = position - shortest, now - start - self.prefill_seconds
            yield
            if all(row.finish_reason for row in self.rows):
                return
            if position < longest:
                drawn_B = torch.where(position < length_B, prompt_BT[:, position], drawn_B)
            logits_BV = forward_last(self._model, drawn_B[:, None], state)

    def _begin(self, start_BT: Tensor, end: int) -> tuple[InferenceState, Tensor]:
        """Caches and logits_BV after the tokens that every sequence has."""
        # samples of one prompt begin alike: what they share is computed once
        start_UT, row_B = start_BT.unique(dim=0, return_inverse=True)
        shared = len(start_UT) < len(start_BT)
        start_BT = start_UT if shared else start_BT
        self.num_prefill_tokens = start_BT.numel()
        state = self._model.new_inference_state(len(start_BT), end, last_token_logits_only=True)
        logits_BV = prefill(self._model, start_BT, state, chunk=self._settings.prefill_chunk)
        if shared:
            state.select(row_B)
            logits_BV = logits_BV[row_B]
        return state, logits_BV

    def result(self) -> GeneratedBatch:
        """What a finished batch gave."""
        return GeneratedBatch(
            [row.generation(log_probs=self._settings.return_log_probs) for row in self.rows],
            num_prefill_tokens=self.num_prefill_tokens,
            prefill_seconds=self.prefill_seconds,
            num_steps=self.num_steps,
            decode_seconds=self.decode_seconds,
        )

    def _buffers(self, end: int) -> tuple[Tensor, Tensor]:
        """Tokens of the prompts, padded; and for each place the random number that would draw its token."""
        prompt_BT = torch.full((len(self.rows), max(self._lengths)), PAD)
        uniform_BT = torch.zeros((len(self.rows), end), dtype=torch.float64)
        for row, (prompt, seed) in enumerate(zip(self._prompts, self._seeds)):
            prompt_BT[row, : len(prompt)] = torch.tensor(prompt)
            new = slice(len(prompt), len(prompt) + self._settings.max_new_tokens)
            uniform_BT[row, new] = uniforms(seed, len(prompt), self._settings.max_new_tokens)
        return prompt_BT, uniform_BT

    def _take(self, position: int, drawn_B: Tensor, logits_BV: Tensor) -> None:
        """Give each row its new token, unless the place is its prompt's or it is finished."""
        drawn = tokens_with_log_probs(drawn_B, logits_BV, wanted=self._settings.return_log_probs)
        for row, length, (token, log_prob) in zip(self.rows, self._lengths, drawn):
            if position >= length and row.finish_reason is None:
                row.add(token, log_prob)


def tokens_with_log_probs(drawn_B: Tensor, logits_BV: Tensor, *, wanted: bool) -> list[tuple[int, float | None]]:
    """Bring what was drawn to the host, in one wait for the device.

    Raises:
        UserError: The logits of a sequence are not finite.
    """
    if wanted:
        # float64 holds every token id and every float32 exactly
        log_prob_B = log_probability(logits_BV, drawn_B.clamp(min=0))
        both_B2 = torch.stack([drawn_B.double(), log_prob_B.double()], dim=1)
        pairs = [(int(token), log_prob) for token, log_prob in both_B2.tolist()]
    else:
        pairs = [(token, None) for token in drawn_B.tolist()]
    if any(token == NOT_FINITE for token, _ in pairs):
        raise UserError("the model's output is not finite; check the weights, or try --mixed-precision-recipe fp32")
    return pairs


def prefill(model: StripedHyenaModel, token_BT: Tensor, state: InferenceState, *, chunk: int) -> Tensor:
    """Run tokens through the model, ``chunk`` at a time (0: all at once), as ``forward_last``; logits_BV."""
    for chunk_BT in token_BT.split(chunk or token_BT.shape[1], dim=1):
        logits_BV = forward_last(model, chunk_BT, state)
    return logits_BV


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
