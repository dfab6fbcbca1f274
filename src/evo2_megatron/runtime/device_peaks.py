# SPDX-License-Identifier: Apache-2.0
"""What GPUs can do at most, for model FLOP utilisation."""

from __future__ import annotations

import re

import torch

from evo2_megatron.config import uses_fp8
from evo2_megatron.runtime import megatron

PEAK_TFLOPS = {
    "H100 PCIe": (756, 1513),
    "H100 NVL": (835, 1671),
    "H200 NVL": (835, 1671),
    "H100": (989, 1979),
    "H200": (989, 1979),
    "GH200": (989, 1979),
    "B200": (2250, 4500),
    "B300": (2250, 4500),
    "GB200": (2500, 5000),
    "GB300": (2500, 5000),
    "A100": (312, None),
    "A800": (312, None),
    "A40": (149.7, None),
    "L40S": (362, 733),
    "L40": (181, 362),
    "L4": (121, 242),
    "RTX A6000": (155, None),
}
"""Dense products in 16 bits with sums in float32, and in FP8, in 10^12 operations per second, by NVIDIA's data sheets
(half of what those give for sparse matrices). By what a device's name contains as whole words; the first that fits."""


def peak_tflops(precision: str) -> float | None:
    """The peak of this process's device for a precision recipe; None where it is not known, as for every CPU."""
    if not megatron.on_cuda() or precision == "fp32" or "nvfp4" in precision:
        return None
    return peak_of(torch.cuda.get_device_name(), fp8=uses_fp8(precision))


def peak_of(device: str, *, fp8: bool) -> float | None:
    """The same by a device's name; None for a part of a GPU (MIG), whose name begins with the whole one's."""
    if re.search(r"\bMIG\b", device):
        return None
    for name, (half, eighth) in PEAK_TFLOPS.items():
        # an RTX A1000 is no A100
        if re.search(rf"\b{name}\b", device):
            return eighth if fp8 else half
    return None
