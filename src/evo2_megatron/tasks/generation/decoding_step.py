# SPDX-License-Identifier: Apache-2.0
"""One token of each sequence through the model, launch by launch or as a CUDA graph, and its way to the host.

Shape legend: B sequences, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.runtime import megatron
from evo2_megatron.tasks.forward import forward_last

if TYPE_CHECKING:
    from evo2_megatron.model.inference_state import InferenceState
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

_WARM_UPS = 2


class DecodingStep:
    """Launches every kernel of a step."""

    def __init__(self, model: StripedHyenaModel, state: InferenceState) -> None:
        self._model, self._state = model, state

    def __call__(self, token_B: Tensor) -> Tensor:
        """Logits after one more token of each sequence, logits_BV."""
        return forward_last(self._model, token_B[:, None], self._state)


class GraphedStep:
    """Replays a step as a CUDA graph: one launch for all its kernels."""

    def __init__(self, model: StripedHyenaModel, state: InferenceState) -> None:
        """Record a step; the state stays as it is, but only this object may bring it up to date from now on.

        Raises:
            UserError: As ``check_cuda_graphs``.
        """
        groups = model.pg_collection
        check_cuda_graphs(ParallelConfig(tensor=groups.tp.size(), pipeline=groups.pp.size()))
        self._state = state
        state.fix_shapes(megatron.device())
        self._token_B1 = torch.zeros(state.batch_size, 1, dtype=torch.int64, device=megatron.device())
        before, num_seen = [tensor.clone() for tensor in state.changing()], state.num_tokens_seen
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # libraries choose their kernels and allot their buffers in the first passes
            for _ in range(_WARM_UPS):
                forward_last(model, self._token_B1, state)
                self._restore(before, num_seen)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BV = forward_last(model, self._token_B1, state)
        self._restore(before, num_seen)

    def _restore(self, before: list[Tensor], num_seen: int) -> None:
        for tensor, value in zip(self._state.changing(), before):
            tensor.copy_(value)
        self._state.num_tokens_seen = num_seen

    def __call__(self, token_B: Tensor) -> Tensor:
        """As ``DecodingStep``; the next call overwrites what this one returned."""
        self._state.check_room(len(token_B), 1)
        self._token_B1[:, 0] = token_B
        self._graph.replay()
        self._state.num_tokens_seen += 1
        return self._logits_BV


def check_cuda_graphs(parallel: ParallelConfig) -> None:
    """Raise UserError unless a step of a model in this layout can be recorded."""
    if not megatron.on_cuda():
        raise UserError("--cuda-graphs needs a CUDA GPU; leave it out")
    if parallel.tensor * parallel.pipeline > 1:
        raise UserError("--cuda-graphs records what one process does; use tensor and pipeline size 1, or leave it out")


class ToHost:
    """A tensor on its way to the host, which does not wait for what is launched after it."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list:
        """The values, as soon as they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
