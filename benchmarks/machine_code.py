# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as machine code, without a GPU: registers, shared memory, and instructions for a token.

Each kernel is compiled for every architecture named, in the form that a model uses, and its machine code is counted
by the tools that come with Triton. "spilled" are bytes of registers that a thread keeps in memory;
"shared" is the memory that the threads of a program share, 99 KiB at most on the smallest GPUs. "issue" is the time
for one layer of hidden size 1,920 (1B) and 8,192 tokens if an H100 did nothing but begin instructions, one a cycle and
scheduler; "memory" the time its memory takes for what the kernel reads and writes. A kernel can be slower than both,
and not faster.

    python benchmarks/machine_code.py [--gpus sm_80 sm_90 sm_100] [--length 8192]

The exit status is 1 if a kernel spills more than 512 bytes, or takes more shared memory than that.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from evo2_megatron.ops import triton_conv, triton_modal

HIDDEN, TOKENS = 1_920, 8_192
MOST_SHARED, MOST_SPILLED = 99 * 1024, 512
ISSUES_PER_SECOND = 132 * 4 * 1.7e9
"""Multiprocessors of an H100 SXM, schedulers of each, cycles a second under load."""
BYTES_PER_SECOND = 3.35e12
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TOOLS = Path(triton.__path__[0]) / "backends/nvidia/bin"


class Case(NamedTuple):
    """One kernel in one form."""

    kernel: JITFunction
    name: str
    dtype: torch.dtype
    constants: dict[str, object]
    num_warps: int
    signal: tuple[str, ...]
    """The arguments in ``dtype``; all other pointers are float32."""

    tokens: int
    """Tokens of one channel that one pass through the code works on."""

    moved: tuple[float, float]
    """Values read or written for a token and channel: in ``dtype``, and in float32."""


class Counts(NamedTuple):
    """Of a compiled kernel."""

    registers: int
    spilled: int
    shared: int
    instructions: int


def cases(length: int) -> list[Case]:
    """All kernels in the forms that 1B to 40B models use, for sequences of ``length`` tokens."""
    found = []
    for dtype, num_taps in ((d, k) for d in TYPES for k in (3, 7, 128)):
        plain, gates = (triton_conv.Shape.of(num_taps, length, dtype, gates=g)._asdict() for g in (False, True))

        def add(kernel, name, shape, signal, moved, *, dtype=dtype, num_taps=num_taps, **more) -> None:
            constants = {k: v for k, v in shape.items() if k not in ("num_warps", "num_stages")} | more
            tokens = constants["T"] * constants.get("M", 1)
            name = f"{name}, {num_taps} taps"
            found.append(Case(kernel, name, dtype, constants, shape.get("num_warps", 4), signal, tokens, moved))

        add(triton_conv._conv_kernel, "convolution", plain, ("x", "y"), (2, 0), K=num_taps, BACKWARD=False)
        if num_taps == 3:  # before the gates, and the only one that trains without them
            few = {"T": triton_conv.FEW_TAPS_TOKENS}
            add(triton_conv._few_taps_backward_kernel, "gradients", few, ("x", "grad_x"), (2, 1), K=num_taps)
            continue
        products = triton_conv.products_form(num_taps, length) | {"PRECISION": plain["PRECISION"]}
        add(triton_conv._tap_products_kernel, "gradient of taps", products, (), (0, 2))
        add(triton_conv._gated_conv_kernel, "operator", gates, ("u", "y"), (4, 0), K=num_taps)
        add(triton_conv._gated_backward_kernel, "operator backward", gates, ("u", "grad_y"), (4, 5), K=num_taps)
    for dtype in TYPES:
        form = triton_modal.form(16, length, dtype)
        warps = form.pop("num_warps")
        del form["num_stages"]
        tokens, backward = form["T"] * form["M"], triton_modal._modal_backward_kernel
        for keep in (False, True):
            name = "modal states" if keep else "modal convolution"
            signal, moved = (("x",), (1, 0.5)) if keep else (("x", "y"), (2, 0))
            more = form | {"KEEP_STATES": keep}
            found.append(Case(triton_modal._modal_kernel, name, dtype, more, warps, signal, tokens, moved))
        signal = ("x", "grad_y", "grad_x")
        found.append(Case(backward, "modal convolution backward", dtype, form, warps, signal, tokens, (3, 0.5)))
    return found


def compile_for(case: Case, capability: int) -> Counts:
    """Machine code of one kernel for one compute capability (90 for 9.0)."""
    signature, aligned = {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "i32" if name in ("L", "D", "B") else TYPES[case.dtype] if name in case.signal else "*fp32"
        aligned[(place,)] = [["tt.divisibility", 16]]  # as Triton finds out when it is called
    source = ASTSource(case.kernel, signature, case.constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": case.num_warps, "num_stages": 1})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / tool, *flags, file.name], check=True, capture_output=True, text=True).stdout
            for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", ["--print-code"]))
        )
    registers, stack = (int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return Counts(registers, stack, compiled.metadata.shared, len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", default=["sm_90"], metavar="SM", help="architectures to compile for")
    parser.add_argument(
        "--length", type=int, default=TOKENS, help="tokens of a sequence, which decides about the form"
    )
    args = parser.parse_args()
    unfit = 0
    print(f"{'kernel':38} {'dtype':8} {'gpu':7} registers spilled shared instructions/token issue us memory us")
    for case in cases(args.length):
        for gpu in args.gpus:
            counts = compile_for(case, int(gpu.removeprefix("sm_")))
            per_token = counts.instructions * case.num_warps / case.tokens
            halves, wholes = case.moved
            num_bytes = halves * case.dtype.itemsize + wholes * 4
            issue, memory = per_token / ISSUES_PER_SECOND, num_bytes / BYTES_PER_SECOND
            numbers = f"{counts.registers:9} {counts.spilled:7} {counts.shared:6} {per_token:18.2f}"
            times = " ".join(f"{1e6 * seconds * HIDDEN * TOKENS:8.0f}" for seconds in (issue, memory))
            print(f"{case.name:38} {str(case.dtype)[6:]:8} {gpu:7} {numbers} {times}")
            unfit += counts.spilled > MOST_SPILLED or counts.shared > MOST_SHARED
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
