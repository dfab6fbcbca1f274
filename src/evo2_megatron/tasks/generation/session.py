# SPDX-License-Identifier: Apache-2.0
"""One sequence whose caches are kept between calls: feed it text, let the model go on, feed it more.

Shape legend: B sequences (here one), V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from evo2_megatron.config import UserError
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks.forward import prefill
from evo2_megatron.tasks.generation.completion import Completion, Generation
from evo2_megatron.tasks.generation.decoding import tokens_with_log_probs
from evo2_megatron.tasks.generation.generate import GenerationSettings
from evo2_megatron.tasks.generation.prompts import Prompt, encode_prompt
from evo2_megatron.tasks.generation.sampling import BatchSampling, uniforms

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel


class Session:
    """A sequence that grows; however it is divided into calls, the same seed gives the same tokens.

    Every token drawn belongs to the sequence, also those of a stop string that was cut off the result; the token that
    ends a document does not, so a sequence that the model has ended goes on only when it is fed.
    """

    def __init__(
        self,
        model: StripedHyenaModel,
        settings: GenerationSettings = GenerationSettings(),
        *,
        max_tokens: int,
        seed: int | None = None,
    ) -> None:
        """Allot the caches.

        Args:
            model: In evaluation mode; all processes of one copy of the model must use their sessions alike.
            settings: What to generate in each call.
            max_tokens: Room for everything that is fed and generated.
            seed: Of this sequence. None: the settings'.

        Raises:
            UserError: The settings ask for CUDA graphs, or do not fit the model's vocabulary.
        """
        if settings.cuda_graphs:
            raise UserError("a session takes turns with whoever feeds it and records no CUDA graphs; leave them out")
        self._model, self._settings = model, settings
        self._seed = settings.sampling.seed if seed is None else seed
        self._device = next(model.parameters()).device
        blocked_V = settings.blocked(model.vocab_size, self._device)
        self._sampling = BatchSampling([settings.sampling], blocked_V[None])
        self._state = model.new_inference_state(1, max_tokens, last_token_logits_only=True)
        self._pending: list[int] = []
        self._logits_BV: torch.Tensor | None = None

    def __len__(self) -> int:
        """Tokens of the sequence so far."""
        return self._state.num_tokens_seen + len(self._pending)

    def feed(self, text: str) -> None:
        """Append text to the sequence.

        Raises:
            UserError: It is empty, has a character that the tokenizer does not know, or does not fit into the room.
        """
        vocab_size = self._settings.vocab_size or self._model.vocab_size
        ids = encode_prompt(Prompt("session", text), vocab_size, keep_case=self._settings.keep_prompt_case)
        self._check_room(len(ids))
        self._pending += ids

    def generate(self, max_new_tokens: int | None = None) -> Generation:
        """Append what the model goes on with; ``max_new_tokens`` None: as the settings say.

        Raises:
            UserError: Nothing has been fed yet, there is no room, or the model's output is not finite.
        """
        completion = self._new_completion(max_new_tokens)
        for _ in self._steps(completion):
            pass
        return completion.generation(log_probs=self._settings.return_log_probs)

    def stream(self, max_new_tokens: int | None = None) -> Iterator[Generation]:
        """As ``generate``, in pieces as they are made; their ``finish_reason`` is that of the whole, None before.

        What has been drawn when the iterator is closed stays in the sequence.
        """
        completion = self._new_completion(max_new_tokens)
        return self._pieces(completion)

    def _pieces(self, completion: Completion) -> Iterator[Generation]:
        for _ in self._steps(completion):
            ids, log_probs = completion.release()
            if ids or completion.finish_reason:
                yield Generation(
                    ids,
                    completion.finish_reason,
                    log_probs if self._settings.return_log_probs else None,
                    completion.stop_string,
                )

    def _new_completion(self, max_new_tokens: int | None) -> Completion:
        settings = self._settings
        if max_new_tokens is not None:
            settings = dataclasses.replace(settings, max_new_tokens=max_new_tokens)
        if not len(self):
            raise UserError("the session is empty; feed it at least one character first")
        self._check_room(settings.max_new_tokens)
        return settings.new_completion()

    def _check_room(self, num_tokens: int) -> None:
        total, room = len(self) + num_tokens, self._state.max_tokens
        if total > room:
            raise UserError(f"{total} tokens exceed the {room} that the session has room for; raise max_tokens")

    @torch.inference_mode()
    def _steps(self, completion: Completion) -> Iterator[None]:
        while completion.finish_reason is None:
            if self._pending:
                token_BT = torch.tensor([self._pending], device=self._device)
                self._logits_BV = prefill(self._model, token_BT, self._state, chunk=self._settings.prefill_chunk)
                self._pending = []
            uniform_B = uniforms(self._seed, len(self), 1).to(self._device)
            drawn_B = distributed.of_first_in_model(self._sampling.draw(self._logits_BV, uniform_B))
            ((token, log_prob),) = tokens_with_log_probs(
                drawn_B, self._logits_BV, wanted=self._settings.return_log_probs
            )
            completion.add(token, log_prob)
            if token not in self._settings.end_ids:
                self._pending = [token]
            yield
