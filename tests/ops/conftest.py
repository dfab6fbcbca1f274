# SPDX-License-Identifier: Apache-2.0
"""What the tests of the operators share."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def _agree(got: Callable, want: Callable, args: Sequence[Tensor], *, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    """Values, and gradients with respect to every argument, of a function and of its reference."""
    args = [x.detach().requires_grad_() for x in args]
    got_outputs, want_outputs = _as_tuple(got(*args)), _as_tuple(want(*args))
    assert len(got_outputs) == len(want_outputs)
    for g, w in zip(got_outputs, want_outputs):
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol)
    weights = [torch.randn_like(w) for w in want_outputs]
    got_grads = torch.autograd.grad(got_outputs, args, weights)
    want_grads = torch.autograd.grad(want_outputs, args, weights)
    for g, w in zip(got_grads, want_grads):
        torch.testing.assert_close(g, w, rtol=rtol, atol=atol)


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """These tensors are too small to share between threads."""


@pytest.fixture
def agree() -> Callable:
    torch.manual_seed(0)
    return _agree


@pytest.fixture
def few_channels_at_a_time(monkeypatch):
    """Cut the work into slices of a channel or two, as at lengths too long for a test."""
    monkeypatch.setattr("evo2_megatron.ops.toeplitz._CPU_SLICE", 1)
