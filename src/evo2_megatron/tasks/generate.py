# SPDX-License-Identifier: Apache-2.0
"""Continue prompts token by token with a StripedHyena model.

Shape legend: B sequences, T tokens of prompt and completion, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import BOS, EOD, PAD, SEP, UNK, outside_vocabulary
from evo2_megatron.tasks.completion import Completion, Generation
from evo2_megatron.tasks.decoding_step import DecodingStep, GraphedStep, ToHost
from evo2_megatron.tasks.forward import prefill
from evo2_megatron.tasks.sampling import NOT_FINITE, Sampling, derive_seed, draw, log_probability, uniforms

if TYPE_CHECKING:
    from evo2_megatron.model.inference_state import InferenceState
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

PREFILL_CHUNK = 2_048
"""Tokens of a prompt that go through the model at once, unless told otherwise. It bounds the activations' memory, and
beyond it nothing is gained: on a CPU 32,768 tokens take as long as in one go, and 8,192 at a time take longer."""

_MOST_ROOM = 2
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

    keep_prompt_case: bool = False
    """Show prompts given as text to the model as they are, and not in upper case as what it read in training."""

    max_batch_size: int = 1
    """Most prompts that go through the model together."""

    prefill_chunk: int = PREFILL_CHUNK
    """Most tokens of a prompt that go through the model at once; 0: all of them."""

    cuda_graphs: bool = False
    """Launch the kernels of a step together; needs a GPU of its own for each copy of the model."""

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
    """Of all prompts; one that several sequences share counts once."""

    prefill_seconds: float
    """Time to the first drawn token."""

    num_steps: int
    """Forward passes of one token per sequence."""

    num_decoded_tokens: int
    """What these gave to sequences that had not ended."""

    decode_seconds: float
    """Time of those passes."""


def plan_batches(lengths: Sequence[int], settings: GenerationSettings) -> list[list[int]]:
    """Group prompts by length.

    All caches of a batch are as long as its longest sequence will be. So a prompt joins a batch only if they hold no
    more than ``_MOST_ROOM`` times what its sequences need.

    Returns:
        Indices into ``lengths``, each once, shortest prompts first.
    """
    batches: list[list[int]] = []
    needed = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        batch = batches[-1] if batches else []
        room = lengths[index] + settings.max_new_tokens
        needed += room
        if batch and len(batch) < settings.max_batch_size and (len(batch) + 1) * room <= _MOST_ROOM * needed:
            batch.append(index)
        else:
            batches.append([index])
            needed = room
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
        if min(len(prompt) for prompt in prompts) == 0:
            raise UserError("a prompt is empty; give at least one token")
        self.rows = [settings.new_completion() for _ in prompts]
        """One for each prompt, in their order."""
        self._places = list(range(len(prompts)))
        self._logits_BV: Tensor | None = None
        self.prefill_seconds = self.decode_seconds = 0.0
        self.num_steps = self.num_prefill_tokens = self.num_decoded_tokens = 0

    @property
    def num_sequences(self) -> int:
        """How many have caches: all at first, fewer when most have ended."""
        return len(self._places)

    def logits_of(self, number: int) -> Tensor:
        """What the newest token of a prompt's sequence was drawn from, before any limit, logits_V."""
        return self._logits_BV[self._places.index(number)]

    def run(self) -> GeneratedBatch:
        """Go to the end."""
        for _ in self.steps():
            pass
        return self.result()

    @torch.inference_mode()
    def steps(self) -> Iterator[None]:
        """Give every sequence one more token at each item. Closing the iterator frees the caches."""
        start = time.perf_counter()
        num_new = self._settings.max_new_tokens
        device = next(self._model.parameters()).device
        random_BN = [uniforms(seed, len(prompt), num_new) for seed, prompt in zip(self._seeds, self._prompts)]
        uniform_BN = torch.stack(random_BN).to(device)
        state, logits_BV = self._begin(device)
        advance = (GraphedStep if self._settings.cuda_graphs else DecodingStep)(self._model, state)
        # a GPU goes on while the host looks at what was drawn, even if that turns out to have been the end
        runs_ahead = device.type == "cuda"
        blocked_V = self._settings.blocked(logits_BV.shape[-1], device)
        for step in range(num_new):
            drawn_B = draw(logits_BV, uniform_BN[:, step], self._settings.sampling, blocked_V=blocked_V)
            self._logits_BV = logits_BV.clone() if runs_ahead else logits_BV
            arriving = ToHost(_drawn(drawn_B, logits_BV, wanted=self._settings.return_log_probs))
            if runs_ahead and step < num_new - 1:
                # what is no token must not reach the embedding before the host has seen it
                logits_BV = advance(drawn_B.clamp(min=0))
            num_taken = self._take(_checked_pairs(arriving))
            now = time.perf_counter()
            if step == 0:
                self.prefill_seconds = now - start
            else:
                self.num_decoded_tokens += num_taken
            self.num_steps, self.decode_seconds = step, now - start - self.prefill_seconds
            yield
            if step == num_new - 1 or all(row.finish_reason for row in self.rows):
                return
            alive_B = self._without_ended(device)
            if alive_B is not None:
                state.select(alive_B)
                uniform_BN, drawn_B, logits_BV = uniform_BN[alive_B], drawn_B[alive_B], logits_BV[alive_B]
            if not runs_ahead:
                logits_BV = advance(drawn_B)

    def _without_ended(self, device: torch.device) -> Tensor | None:
        """Drop the sequences that have ended, if they are half of those with caches or more; which stay, None: all.

        The rest would be computed for nothing. The caches of the others are copied, so not for less than half.
        """
        alive = [index for index, place in enumerate(self._places) if self.rows[place].finish_reason is None]
        if 2 * len(alive) > len(self._places) or self._settings.cuda_graphs:  # whose steps have one size
            return None
        self._places = [self._places[index] for index in alive]
        return torch.tensor(alive, device=device)

    def _begin(self, device: torch.device) -> tuple[InferenceState, Tensor]:
        """Caches and logits_BV after the prompts: those of equal length go through together, equal ones once."""
        lengths = [len(prompt) for prompt in self._prompts]
        room = max(lengths) + self._settings.max_new_tokens
        state = self._model.new_inference_state(len(lengths), room, last_token_logits_only=True)
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        logits: list[Tensor] = []
        first = 0
        for _, places in itertools.groupby(order, key=lengths.__getitem__):
            prompts = [tuple(self._prompts[place]) for place in places]
            different = list(dict.fromkeys(prompts))
            part = state.rows(slice(first, first + len(different)))
            token_UT = torch.tensor(different, device=device)
            logits_UV = prefill(self._model, token_UT, part, chunk=self._settings.prefill_chunk)
            self.num_prefill_tokens += token_UT.numel()
            row_B = torch.tensor([different.index(prompt) for prompt in prompts], device=device)
            if len(different) < len(prompts):
                state.overwrite(slice(first, first + len(prompts)), first + row_B)
            logits.append(logits_UV[row_B])
            first += len(prompts)
        state.begin_at(sorted(lengths), device)
        if order == sorted(order):
            return state, torch.cat(logits)
        place_B = torch.tensor(order, device=device).argsort()
        state.select(place_B)
        return state, torch.cat(logits)[place_B]

    def result(self) -> GeneratedBatch:
        """What a finished batch gave."""
        return GeneratedBatch(
            [row.generation(log_probs=self._settings.return_log_probs) for row in self.rows],
            num_prefill_tokens=self.num_prefill_tokens,
            prefill_seconds=self.prefill_seconds,
            num_steps=self.num_steps,
            num_decoded_tokens=self.num_decoded_tokens,
            decode_seconds=self.decode_seconds,
        )

    def _take(self, drawn: Sequence[tuple[int, float | None]]) -> int:
        """Give each row that is not finished its new token; how many those were."""
        num_taken = 0
        for place, (token, log_prob) in zip(self._places, drawn):
            if self.rows[place].finish_reason is None:
                self.rows[place].add(token, log_prob)
                num_taken += 1
        return num_taken


def tokens_with_log_probs(drawn_B: Tensor, logits_BV: Tensor, *, wanted: bool) -> list[tuple[int, float | None]]:
    """Bring what was drawn to the host, in one wait for the device.

    Raises:
        UserError: The logits of a sequence are not finite.
    """
    return _checked_pairs(ToHost(_drawn(drawn_B, logits_BV, wanted=wanted)))


def _drawn(drawn_B: Tensor, logits_BV: Tensor, *, wanted: bool) -> Tensor:
    """Tokens [B, 1], or with their log-probabilities [B, 2], float64."""
    if not wanted:
        return drawn_B[:, None]
    # float64 holds every token id and every float32 exactly
    log_prob_B = log_probability(logits_BV, drawn_B.clamp(min=0))
    return torch.stack([drawn_B.double(), log_prob_B.double()], dim=1)


def _checked_pairs(drawn: ToHost) -> list[tuple[int, float | None]]:
    pairs = [(int(row[0]), row[1] if len(row) == 2 else None) for row in drawn.tolist()]
    if any(token == NOT_FINITE for token, _ in pairs):
        raise UserError("the model's output is not finite; check the weights, or try --mixed-precision-recipe fp32")
    return pairs
