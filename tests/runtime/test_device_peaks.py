# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.mark.parametrize(
    "device, fp8, expected",
    [
        ("NVIDIA H100 80GB HBM3", False, 989),
        ("NVIDIA H100 80GB HBM3", True, 1979),
        ("NVIDIA H100 PCIe", False, 756),
        ("NVIDIA GH200 480GB", False, 989),
        ("NVIDIA A100-SXM4-80GB", False, 312),
        ("NVIDIA A100-SXM4-80GB", True, None),
        ("NVIDIA GeForce GTX 1080", False, None),
        ("NVIDIA H200 NVL", False, 835),
        ("NVIDIA GB200", False, 2500),
        ("NVIDIA L40S", True, 733),
        ("NVIDIA L4", False, 121),
        ("NVIDIA RTX A1000 Laptop GPU", False, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", False, None),
    ],
)
def test_peaks(device, fp8, expected):
    from evo2_megatron.runtime.device_peaks import peak_of

    assert peak_of(device, fp8=fp8) == expected


def test_a_cpu_has_none(monkeypatch):
    from evo2_megatron.runtime import device_peaks

    monkeypatch.setattr(device_peaks.megatron, "on_cuda", lambda: False)
    assert device_peaks.peak_tflops("bf16_mixed") is None


def test_formats_without_a_peak(monkeypatch):
    from evo2_megatron.runtime import device_peaks

    monkeypatch.setattr(device_peaks.megatron, "on_cuda", lambda: True)
    monkeypatch.setattr(device_peaks.torch.cuda, "get_device_name", lambda: "NVIDIA B200")
    assert device_peaks.peak_tflops("bf16_mixed") == 2250
    assert device_peaks.peak_tflops("bf16_with_mxfp8_mixed") == 4500
    assert device_peaks.peak_tflops("bf16_with_nvfp4_mixed") is None and device_peaks.peak_tflops("fp32") is None
