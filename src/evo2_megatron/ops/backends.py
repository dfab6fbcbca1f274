# SPDX-License-Identifier: Apache-2.0
"""Which kernels an operator runs on: plain torch, NVIDIA's subquadratic_ops_torch, or Triton.

Compiled ones are imported here only, and only when asked.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from evo2_megatron.ops import causal_conv, fused_conv, modal

logger = logging.getLogger(__name__)

PACKAGE = "subquadratic_ops_torch"


class Kernels(NamedTuple):
    """What the operators of a model call; all take and return what the plain functions do."""

    gated_conv: Callable[[Tensor, Tensor, Tensor], Tensor] = fused_conv.gated_conv
    """Whole sequences of S and D layers, without a skip term; differentiable."""

    causal_conv: Callable[[Tensor, Tensor, Tensor | None], Tensor] = causal_conv.causal_conv
    """Short convolutions."""

    modal_conv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], modal.ModalOutput] = modal.modal_conv
    """H layers; differentiable where no state is given."""


PLAIN = Kernels()


def can_run_compiled() -> bool:
    """Whether there is a GPU, or Triton's interpreter in its place."""
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def compiled_kernels() -> Kernels:
    """NVIDIA's kernels where they are installed, and else this project's in Triton.

    Raises:
        ImportError: There are neither; or the package is installed and lacks a kernel.
    """
    if importlib.util.find_spec(PACKAGE) is not None:
        return _of_package(subquadratic_ops())
    if importlib.util.find_spec("triton") is None:
        raise ImportError(f"use_subquadratic_ops needs {PACKAGE} or triton; install one, or switch it off")
    logger.info("%s is not installed: Triton kernels run in its place", PACKAGE)
    from evo2_megatron.ops import triton_conv, triton_modal

    return Kernels(triton_conv.gated_conv, triton_conv.causal_conv, triton_modal.modal_conv)


class SubquadraticOps(NamedTuple):
    """The four kernels a Hyena layer can use. B batch, D channels, K taps, L tokens, N modes. CUDA tensors only."""

    b2b_causal_conv1d: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(u [B,3D,L], input_taps [3D,K], inner_taps [D,K], skip [D]) -> y [B,D,L]; compare ``fused_conv.gated_conv``."""

    causal_conv1d: Callable[[Tensor, Tensor], Tensor]
    """(x [B,D,L], taps [D,K]) -> y [B,D,L]; compare ``causal_conv.causal_conv``."""

    fft_causal_conv1d: Callable[[Tensor, Tensor], Tensor]
    """(x [B,D,L], filter [D,K], K <= L) -> y [B,D,L], no skip term; compare ``reference.fft_causal_conv_ref``."""

    implicit_filter: Callable[[Tensor, Tensor, int], Tensor]
    """(log_pole [D,N], residue [D,N], L) -> filter [D,L]; compare ``reference.modal_filter_ref``."""


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


def _of_package(ops: SubquadraticOps) -> Kernels:
    """The package's functions in the form of ours. Taps are rounded to the dtype of the signal, as it wants them."""

    def gated_conv(u_BEL: Tensor, input_taps_EK: Tensor, inner_taps_DK: Tensor) -> Tensor:
        # the kernel has a skip term of its own; here it is part of the taps
        skip_D = u_BEL.new_zeros(inner_taps_DK.shape[0])
        return ops.b2b_causal_conv1d(
            u_BEL.contiguous(), input_taps_EK.to(u_BEL.dtype), inner_taps_DK.to(u_BEL.dtype), skip_D
        )

    def short_conv(x_BDL: Tensor, taps_DK: Tensor, history_BDP: Tensor | None = None) -> Tensor:
        num_before = 0 if history_BDP is None else history_BDP.shape[-1]
        if num_before:
            x_BDL = torch.cat([history_BDP.to(x_BDL.dtype), x_BDL], dim=-1)
        return ops.causal_conv1d(x_BDL.contiguous(), taps_DK.to(x_BDL.dtype))[..., num_before:]

    def long_conv(
        x_BDL: Tensor, log_pole_DN: Tensor, residue_DN: Tensor, skip_D: Tensor, state_BDN: Tensor | None = None
    ) -> modal.ModalOutput:
        if state_BDN is not None:  # the package has no form that carries a state
            return modal.modal_conv(x_BDL, log_pole_DN, residue_DN, skip_D, state_BDN)
        filter_DL = ops.implicit_filter(log_pole_DN.contiguous(), residue_DN.contiguous(), x_BDL.shape[-1])
        x_wide_BDL = x_BDL.float().contiguous()
        y_BDL = ops.fft_causal_conv1d(x_wide_BDL, filter_DL) + skip_D[:, None] * x_wide_BDL
        return modal.ModalOutput(y_BDL.to(x_BDL.dtype), modal.modal_state(x_BDL.detach(), log_pole_DN.detach()))

    return Kernels(gated_conv, short_conv, long_conv)
