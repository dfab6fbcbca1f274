# SPDX-License-Identifier: Apache-2.0
"""Time our model beside Arc's Vortex: one process, the same float32 weights, two threads, on a CPU.

Every round times one after the other, so that a busy neighbour slows both; the table has medians, and the median of
the ratios of the rounds. Memory is the growth of a fresh process over what it held after loading, on Linux.

    python benchmarks/vortex.py
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hidden_512 import ARCHITECTURE

# the oracle lives with the parity tests; and this folder must go, or "import vortex" finds this file
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from torch import Tensor

from evo2_megatron.config import ParallelConfig
from evo2_megatron.runtime.distributed import process_groups
from parity.our_model import our_model
from parity.vortex_model import Vortex, random_weights

NUM_THREADS = 2
ROUNDS = {1_024: 7, 8_192: 3}
"""Length in tokens: rounds of every measurement."""

STEPS_PER_ROUND = 16
TOLERANCE = 2e-4
"""Largest difference of logits, in units of their standard deviation; mostly the form of the RMSNorm."""


class Ours:
    """Our model behind the same three methods as ``Vortex``."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        """Load float32 ``weights`` of ``ARCHITECTURE``."""
        self.model = our_model(ARCHITECTURE, weights)
        self._state = None

    @torch.inference_mode()
    def score(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of a whole sequence, no cache."""
        return self.model(tokens_BL)

    @torch.inference_mode()
    def prefill(self, tokens_BL: Tensor, *, max_tokens: int) -> Tensor:
        """Logits [B, L, V] of a prompt; fills fresh caches for up to ``max_tokens``."""
        self._state = self.model.new_inference_state(tokens_BL.shape[0], max_tokens)
        return self.model(tokens_BL, inference_context=self._state)

    @torch.inference_mode()
    def step(self, tokens_B: Tensor) -> Tensor:
        """Logits [B, V] after one more token per sequence."""
        return self.model(tokens_B[:, None], inference_context=self._state)[:, -1]


class Timing(NamedTuple):
    """Medians over the rounds."""

    ours: float
    """Tokens per second."""

    vortex: float
    """Tokens per second."""

    ratio: float
    """Ours over Vortex, round by round."""


def check_equal(what: str, ours: Tensor, vortex: Tensor) -> None:
    """Stop unless both computed the same logits."""
    error = ((ours - vortex).abs().max() / vortex.std()).item()
    if not error < TOLERANCE:
        sys.exit(f"{what}: logits differ by {error:.1e} of their standard deviation; nothing was timed")


def interleave(ours: Callable[[], object], vortex: Callable[[], object], *, num_tokens: int, rounds: int) -> Timing:
    """Time both in turn, ``rounds`` times; each call handles ``num_tokens``."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        # who goes first alternates
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (ours, vortex)[which]()
            seconds[which].append(time.perf_counter() - start)
    ratio = statistics.median(v / o for o, v in zip(*seconds, strict=True))
    return Timing(*(num_tokens / statistics.median(s) for s in seconds), ratio)


def compare(ours: Ours, vortex: Vortex, length: int) -> dict[str, Timing]:
    """Scoring, prefill and decoding at one length; outputs are compared first, which also warms both up."""
    rounds = ROUNDS[length]
    num_steps = 1 + rounds * STEPS_PER_ROUND
    tokens_BL = torch.randint(0, 512, (1, length + num_steps), generator=torch.Generator().manual_seed(length))
    prompt_BL, rest = tokens_BL[:, :length], tokens_BL[:, length:].unbind(1)

    check_equal("scoring", ours.score(prompt_BL), vortex.score(prompt_BL))
    score = interleave(
        lambda: ours.score(prompt_BL), lambda: vortex.score(prompt_BL), num_tokens=length, rounds=rounds
    )
    room = length + num_steps
    check_equal("prefill", *(model.prefill(prompt_BL, max_tokens=room) for model in (ours, vortex)))
    prefill = interleave(
        lambda: ours.prefill(prompt_BL, max_tokens=room),
        lambda: vortex.prefill(prompt_BL, max_tokens=room),
        num_tokens=length,
        rounds=rounds,
    )
    check_equal("decoding", *(model.step(rest[0]) for model in (ours, vortex)))

    def stepper(model: Ours | Vortex) -> Callable[[], None]:
        remaining = iter(rest[1:])

        def run() -> None:
            for _ in range(STEPS_PER_ROUND):
                model.step(next(remaining))

        return run

    decode = interleave(stepper(ours), stepper(vortex), num_tokens=STEPS_PER_ROUND, rounds=rounds)
    return {"score": score, "prefill": prefill, "decode": decode}


def status_mib(field: str) -> float:
    """A field of this process's memory status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def memory_growth(which: str, task: str, length: int) -> float:
    """Peak of this process while it scores or prefills ``length`` tokens, over what it holds after loading, in MiB."""
    weights = random_weights(ARCHITECTURE)
    model = Ours(weights) if which == "ours" else Vortex(ARCHITECTURE, weights)
    del weights
    tokens_BL = torch.randint(0, 512, (1, length))
    model.score(tokens_BL[:, :16])
    gc.collect()
    # pages that freed tensors left behind would hide part of the growth
    ctypes.CDLL(None).malloc_trim(0)
    # the peak starts again from here
    Path("/proc/self/clear_refs").write_text("5")
    before = status_mib("VmRSS")
    if task == "score":
        model.score(tokens_BL)
    else:
        model.prefill(tokens_BL, max_tokens=length + 1)
    return status_mib("VmHWM") - before


def measure_memory(task: str, length: int) -> tuple[float, float]:
    """``memory_growth`` of ours and of Vortex, each in a process of its own."""
    growth = []
    for which in ("ours", "vortex"):
        command = [sys.executable, __file__, "--memory", which, task, str(length)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        growth.append(float(done.stdout.split()[-1]))
    return growth[0], growth[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", nargs=3, metavar=("WHO", "TASK", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    with process_groups(ParallelConfig()):
        if args.memory:
            print(memory_growth(args.memory[0], args.memory[1], int(args.memory[2])))
            return
        weights = random_weights(ARCHITECTURE)
        ours, vortex = Ours(weights), Vortex(ARCHITECTURE, weights)
        print(
            f"{sum(w.numel() for w in weights.values()) / 1e6:.1f} M parameters, {ARCHITECTURE.pattern}, "
            f"hidden {ARCHITECTURE.hidden_size}, float32, {NUM_THREADS} threads, one sequence"
        )
        print(f"{'':8} {'tokens':>7} {'ours/s':>9} {'Vortex/s':>9} {'ratio':>6}")
        for length in ROUNDS:
            for task, timing in compare(ours, vortex, length).items():
                rates = f"{timing.ours:9,.0f} {timing.vortex:9,.0f} {timing.ratio:6.2f}"
                print(f"{task:8} {length:7,} {rates}", flush=True)
    longest = max(ROUNDS)
    print(f"\npeak memory over the loaded model, {longest:,} tokens, MiB")
    print(f"{'':8} {'':7} {'ours':>9} {'Vortex':>9} {'ratio':>6}")
    for task in ("score", "prefill"):
        ours_mib, vortex_mib = measure_memory(task, longest)
        print(f"{task:8} {'':7} {ours_mib:9,.0f} {vortex_mib:9,.0f} {ours_mib / vortex_mib:6.2f}", flush=True)


if __name__ == "__main__":
    main()
