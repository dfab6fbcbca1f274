# SPDX-License-Identifier: Apache-2.0
"""Continue prompts token by token with a StripedHyena model.

Shape legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import BOS, EOD, PAD, SEP, UNK, outside_vocabulary
from evo2_megatron.tasks.generation.completion import Completion, Generation
from evo2_megatron.tasks.generation.decoding import Decoding
from evo2_megatron.tasks.generation.sampling import Sampling, derive_seed

if TYPE_CHECKING:
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


def fit_together(num_sequences: int, longest: int, total: int, *, negligible: int = 0) -> bool:
    """Whether sequences are enough alike to be one batch.

    All caches of a batch are as long as its longest sequence will be. They must hold no more than ``_MOST_ROOM`` times
    what its sequences need.

    Args:
        num_sequences: How many.
        longest: Tokens of the longest, prompt and completion.
        total: Tokens of all.
        negligible: Tokens that the caches may hold in any case.
    """
    return num_sequences * longest <= max(_MOST_ROOM * total, negligible)


def plan_batches(lengths: Sequence[int], settings: GenerationSettings) -> list[list[int]]:
    """Group prompts by length, so that those of a batch ``fit_together``.

    Returns:
        Indices into ``lengths``, each once, shortest prompts first.
    """
    batches: list[list[int]] = []
    needed = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        batch = batches[-1] if batches else []
        room = lengths[index] + settings.max_new_tokens
        needed += room
        if batch and len(batch) < settings.max_batch_size and fit_together(len(batch) + 1, room, needed):
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
        decoding = Decoding.alike(model, settings, [prompts[i] for i in batch], seeds=[seeds[i] for i in batch])
        generations.update(zip(batch, decoding.run().generations))
    return [generations[index] for index in range(len(prompts))]
