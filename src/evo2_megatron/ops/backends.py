# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels that may be installed: NVIDIA's subquadratic_ops_torch. Imported here only, and only when asked."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

PACKAGE = "subquadratic_ops_torch"


class SubquadraticOps(NamedTuple):
    """The four kernels a Hyena layer can use. B batch, D channels, K taps, L tokens, N modes. CUDA tensors only."""

    b2b_causal_conv1d: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(u [B,3D,L], input_taps [3D,K], inner_taps [D,K], skip [D]) -> y [B,D,L]; compare ``fused_conv.gated_conv``."""

    causal_conv1d: Callable[[Tensor, Tensor], Tensor]
    """(x [B,D,L], taps [D,K]) -> y [B,D,L]; compare ``causal_conv.causal_conv``."""

    fft_causal_conv1d: Callable[[Tensor, Tensor], Tensor]
    """(x [B,D,L], filter [D,K], K <= L) -> y [B,D,L], no skip term; compare ``fft_conv.fft_causal_conv``."""

    implicit_filter: Callable[[Tensor, Tensor, int], Tensor]
    """(log_pole [D,N], residue [D,N], L) -> filter [D,L]; compare ``modal.modal_filter``."""


def subquadratic_ops() -> SubquadraticOps:
    """Import the compiled kernels.

    Raises:
        ImportError: the package, or one of the kernels in it, is missing.
    """
    try:
        kernels = [getattr(importlib.import_module(f"{PACKAGE}.{name}"), name) for name in SubquadraticOps._fields]
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"subquadratic kernels were asked for but cannot be loaded ({error}): "
            "install subquadratic-ops-torch-cu12 or -cu13, or switch use_subquadratic_ops off"
        ) from error
    return SubquadraticOps(*kernels)
