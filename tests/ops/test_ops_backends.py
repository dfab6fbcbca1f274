# SPDX-License-Identifier: Apache-2.0
import importlib.util
import sys
import types

import pytest
import torch

from evo2_megatron.ops.backends import PACKAGE, SubquadraticOps, subquadratic_ops
from evo2_megatron.ops.reference import causal_conv_ref, fft_causal_conv_ref, gated_conv_ref, modal_filter_ref

LENGTHS = (129, 1024)


def test_missing_package_is_an_error_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    remedy = "install subquadratic-ops-torch-cu12 or -cu13, or switch use_subquadratic_ops off"
    with pytest.raises(ImportError, match=remedy) as info:
        subquadratic_ops()
    assert "\n" not in str(info.value)


def test_package_without_a_kernel_is_the_same_error(monkeypatch):
    for name in ("", *(f".{kernel}" for kernel in SubquadraticOps._fields)):
        monkeypatch.setitem(sys.modules, PACKAGE + name, types.ModuleType(PACKAGE + name))
    with pytest.raises(ImportError, match="b2b_causal_conv1d"):
        subquadratic_ops()


@pytest.fixture
def kernels():
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed")
    torch.manual_seed(0)
    return subquadratic_ops()


def make(*shapes):
    return [torch.randn(shape, device="cuda") for shape in shapes]


@pytest.mark.gpu
@pytest.mark.parametrize("L", LENGTHS)
def test_causal_conv1d_is_a_correlation(kernels, L):
    x_BDL, taps_DK = make((2, 16, L), (16, 3))
    torch.testing.assert_close(
        kernels.causal_conv1d(x_BDL, taps_DK), causal_conv_ref(x_BDL, taps_DK), rtol=1e-3, atol=1e-3
    )


@pytest.mark.gpu
@pytest.mark.parametrize("K", [7, 128])
@pytest.mark.parametrize("L", LENGTHS)
def test_b2b_causal_conv1d(kernels, L, K):
    args = make((2, 48, L), (48, 3), (16, K), (16,))
    torch.testing.assert_close(kernels.b2b_causal_conv1d(*args), gated_conv_ref(*args), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("L", LENGTHS)
def test_fft_causal_conv1d(kernels, L):
    x_BDL, filter_DK = make((2, 16, L), (16, L))
    want = fft_causal_conv_ref(x_BDL, filter_DK, torch.zeros(16, device="cuda"))
    torch.testing.assert_close(kernels.fft_causal_conv1d(x_BDL, filter_DK), want, rtol=1e-3, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("L", LENGTHS)
def test_implicit_filter(kernels, L):
    log_pole_DN, residue_DN = -torch.rand(16, 16, device="cuda"), torch.randn(16, 16, device="cuda")
    want = modal_filter_ref(log_pole_DN, residue_DN, L)
    torch.testing.assert_close(kernels.implicit_filter(log_pole_DN, residue_DN, L), want, rtol=1e-3, atol=1e-3)
