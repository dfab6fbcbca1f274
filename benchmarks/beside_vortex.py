# SPDX-License-Identifier: Apache-2.0
"""Time our model beside Arc's Vortex: one process, the same float32 weights, two threads, on a CPU.

    python benchmarks/beside_vortex.py [--model evo2_tiny hidden_512]

Scoring gives logits everywhere; a prompt is read as each program reads it before it generates, ours by what
``infer_evo2`` runs. Every round times one after the other, so that a busy neighbour slows both; the table has medians,
and the median of the ratios of the rounds. Memory is the growth of a fresh process over what it held after loading, on
Linux.
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

from hidden_512 import ARCHITECTURE as HIDDEN_512
from long_context import forget_peak, held_bytes

# the oracle lives with the parity tests
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from torch import Tensor

from evo2_megatron.architectures import ARCHITECTURES, Architecture
from evo2_megatron.config import ParallelConfig
from evo2_megatron.runtime.distributed import process_groups
from parity.our_model import our_model
from parity.vortex_model import Vortex, random_weights

MODELS = {"evo2_tiny": ARCHITECTURES["evo2_tiny"], "hidden_512": HIDDEN_512}
NUM_THREADS = 2
ROUNDS = {1_024: 7, 8_192: 3}
"""Length in tokens: rounds of every measurement."""

STEPS_PER_ROUND = 16
TOLERANCE = 2e-4
"""Largest difference of logits, in units of their standard deviation; mostly the form of the RMSNorm."""


class Ours:
    """Our model behind the same three methods as ``Vortex``."""

    def __init__(self, architecture: Architecture, weights: dict[str, Tensor]) -> None:
        """``weights``: float32."""
        self.model = our_model(architecture, weights)
        self._state = None

    @torch.inference_mode()
    def score(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of a whole sequence, no cache."""
        return self.model(tokens_BL)

    @torch.inference_mode()
    def prefill(self, tokens_BL: Tensor, *, max_tokens: int) -> Tensor:
        """Logits [B, V] after a prompt; fills fresh caches for up to ``max_tokens``."""
        from evo2_megatron.tasks.forward import prefill
        from evo2_megatron.tasks.generation.generate import PREFILL_CHUNK

        self._state = self.model.new_inference_state(tokens_BL.shape[0], max_tokens, last_token_logits_only=True)
        return prefill(self.model, tokens_BL, self._state, chunk=PREFILL_CHUNK)

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
    of_all_BLV = vortex.prefill(prompt_BL, max_tokens=room)
    check_equal("prefill", ours.prefill(prompt_BL, max_tokens=room), of_all_BLV[:, -1])
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


def memory_growth(name: str, which: str, task: str, length: int) -> float:
    """Peak of this process while it scores or prefills ``length`` tokens, over what it holds after loading, in MiB."""
    weights = random_weights(MODELS[name])
    model = (Ours if which == "ours" else Vortex)(MODELS[name], weights)
    del weights
    tokens_BL = torch.randint(0, 512, (1, length))
    model.score(tokens_BL[:, :16])
    gc.collect()
    # pages that freed tensors left behind would hide part of the growth
    ctypes.CDLL(None).malloc_trim(0)
    forget_peak()
    before = held_bytes("VmRSS")
    if task == "score":
        model.score(tokens_BL)
    else:
        model.prefill(tokens_BL, max_tokens=length + 1)
    return (held_bytes("VmHWM") - before) / 2**20


def measure_memory(name: str, task: str, length: int) -> tuple[float, float]:
    """``memory_growth`` of ours and of Vortex, each in a process of its own."""
    growth = []
    for which in ("ours", "vortex"):
        command = [sys.executable, __file__, "--memory", name, which, task, str(length)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        growth.append(float(done.stdout.split()[-1]))
    return growth[0], growth[1]


def print_table(name: str) -> None:
    """Speed of one model, in this process, and memory, in others."""
    architecture = MODELS[name]
    weights = random_weights(architecture)
    ours, vortex = Ours(architecture, weights), Vortex(architecture, weights)
    print(
        f"{name}: {sum(w.numel() for w in weights.values()) / 1e6:.1f} M parameters, {architecture.pattern}, "
        f"hidden {architecture.hidden_size}, float32, {NUM_THREADS} threads, one sequence"
    )
    print(f"{'':8} {'tokens':>7} {'ours/s':>9} {'Vortex/s':>9} {'ratio':>6}")
    for length in ROUNDS:
        for task, timing in compare(ours, vortex, length).items():
            print(f"{task:8} {length:7,} {timing.ours:9,.0f} {timing.vortex:9,.0f} {timing.ratio:6.2f}", flush=True)
    longest = max(ROUNDS)
    print(f"\npeak memory over the loaded model, {longest:,} tokens, MiB")
    print(f"{'':8} {'':7} {'ours':>9} {'Vortex':>9} {'ratio':>6}")
    for task in ("score", "prefill"):
        ours_mib, vortex_mib = measure_memory(name, task, longest)
        print(f"{task:8} {'':7} {ours_mib:9,.0f} {vortex_mib:9,.0f} {ours_mib / vortex_mib:6.2f}", flush=True)


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--memory", nargs=4, metavar=("MODEL", "WHO", "TASK", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    with process_groups(ParallelConfig()):
        if args.memory:
            name, who, task, length = args.memory
            print(memory_growth(name, who, task, int(length)))
            return
        for name in args.model:
            print_table(name)
            print()


if __name__ == "__main__":
    main()
