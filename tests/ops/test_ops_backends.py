# SPDX-License-Identifier: Apache-2.0
import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch

from evo2_megatron.ops.backends import PACKAGE, PLAIN, SubquadraticOps, compiled_kernels, subquadratic_ops
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
def package_of_references(monkeypatch):
    """The package, with references in place of its kernels, that want what those want."""

    def alike(function):
        def kernel(*args):
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            assert len({x.dtype for x in tensors}) == 1 and all(x.is_contiguous() for x in tensors)
            return function(*args)

        return kernel

    functions = SubquadraticOps(
        gated_conv_ref,
        causal_conv_ref,
        lambda x_BDL, filter_DK: fft_causal_conv_ref(x_BDL, filter_DK, torch.zeros(len(filter_DK))),
        modal_filter_ref,
    )
    for name in ("", *(f".{kernel}" for kernel in SubquadraticOps._fields)):
        module = types.ModuleType(PACKAGE + name)
        module.__spec__ = importlib.machinery.ModuleSpec(PACKAGE + name, None)
        monkeypatch.setitem(sys.modules, PACKAGE + name, module)
    for name, function in functions._asdict().items():
        setattr(sys.modules[f"{PACKAGE}.{name}"], name, alike(function))
    torch.manual_seed(0)
    return compiled_kernels.__wrapped__()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_the_package_are_called_as_the_plain_ones(package_of_references, dtype):
    """Float32 within 1e-5, bfloat16, to which taps are rounded here only, within 5 %."""
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    u_BEL, x_BDL = torch.randn(37, 2, 12).permute(1, 2, 0).to(dtype), torch.randn(2, 4, 37).to(dtype)
    input_taps_EK, inner_taps_DK = 0.3 * torch.randn(12, 3), 0.3 * torch.randn(4, 7)
    log_pole_DN, residue_DN, skip_D = -torch.rand(4, 16), 0.1 * torch.randn(4, 16), torch.randn(4)
    state_BDN = torch.randn(2, 4, 16)
    calls = {
        "gated_conv": [(u_BEL, input_taps_EK, inner_taps_DK)],
        "causal_conv": [(x_BDL, inner_taps_DK, None), (x_BDL, inner_taps_DK, torch.randn(2, 4, 6))],
        "modal_conv": [(x_BDL, log_pole_DN, residue_DN, skip_D, state) for state in (None, state_BDN)],
    }
    for name, every in calls.items():
        for args in every:
            got, want = (getattr(kernels, name)(*args) for kernels in (package_of_references, PLAIN))
            torch.testing.assert_close(got, want, **close)


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
