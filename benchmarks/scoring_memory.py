# SPDX-License-Identifier: Apache-2.0
"""Memory and time of scoring one long sequence, here and in Arc's Vortex, on a CPU in float32.

``python benchmarks/scoring_memory.py [--lengths 8k 64k 256k 1024k] [--hidden-size 512] [--pattern SDHSSDHS]``

Every row is measured in a process of its own, which may take all memory that is free when it begins. Memory is the
peak that scoring adds to what the process held with the model loaded; ``keys and values`` is the part of ours that
attention layers must hold. Ours is what ``predict_evo2`` runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from queue import Empty

import beside_vortex
import psutil
from long_context import forget_peak, held_bytes, tokens
from mixed_lengths import score_ours, score_vortex

from evo2_megatron.architectures import Architecture
from evo2_megatron.config import ParallelConfig
from evo2_megatron.runtime.distributed import process_groups


def architecture(pattern: str, hidden_size: int, length: int) -> Architecture:
    """Sizes in the proportions of the published models."""
    return Architecture(
        pattern=pattern,
        hidden_size=hidden_size,
        ffn_hidden_size=11 * hidden_size // 4,
        num_heads=hidden_size // 128,
        num_groups=hidden_size // 16,
        max_tokens=length,
    )


def scorer(which: str, shape: Architecture) -> Callable[[list[int]], float]:
    """From token ids to their log-likelihood."""
    weights = beside_vortex.random_weights(shape)
    if which == "Vortex":
        vortex = beside_vortex.Vortex(shape, weights)
        return lambda ids: score_vortex(vortex, [ids])[0]
    model = beside_vortex.Ours(shape, weights).model
    return lambda ids: score_ours(model, [ids])[0]


def measure(which: str, shape: Architecture, length: int, results: multiprocessing.Queue) -> None:
    """On this process; puts (bytes added, seconds, log-likelihood per base), or None if memory does not suffice."""
    import torch

    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    torch.set_num_threads(beside_vortex.NUM_THREADS)
    with process_groups(ParallelConfig()):
        score = scorer(which, shape)
        ids = torch.tensor(list(b"ACGT"))[torch.randint(4, (length,), generator=torch.Generator().manual_seed(0))]
        score(ids[:256].tolist())  # what libraries set up at their first use is not the length's
        sequence = ids.tolist()
        # an error of this process, and not the end of another one
        limit = psutil.Process().memory_info().vms + psutil.virtual_memory().available
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        forget_peak()
        before, start = held_bytes("VmRSS"), time.perf_counter()
        try:
            mean = score(sequence) / (length - 1)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            results.put(None)
            return
        results.put((held_bytes("VmHWM") - before, time.perf_counter() - start, mean))


def run(which: str, shape: Architecture, length: int) -> tuple[float, float, float] | None:
    """``measure`` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure, args=(which, shape, length, results))
    process.start()
    process.join()
    try:
        return results.get(timeout=10)
    except Empty:
        raise RuntimeError(f"{which}, length {length}: status {process.exitcode}") from None


def main() -> None:
    """Parse arguments, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=tokens, nargs="+", default=[tokens(n) for n in ("8k", "64k", "256k", "1024k")]
    )
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--pattern", default="SDHS")
    parser.add_argument("--who", nargs="+", choices=("ours", "Vortex"), default=["ours", "Vortex"])
    args = parser.parse_args()
    print(f"{'':8}{'hidden':>6} {'pattern':10}{'tokens':>9}{'MiB added':>11}{'keys and values':>17}{'tokens/s':>10}")
    for length in args.lengths:
        shape, means = architecture(args.pattern, args.hidden_size, length), []
        for who in args.who:
            row = f"{who:8}{args.hidden_size:6} {args.pattern:10}{length:9}"
            result = run(who, shape, length)
            if result is None:
                print(f"{row}   not enough memory", flush=True)
                continue
            added, seconds, mean = result
            held = f"{8 * args.hidden_size * length * args.pattern.count('*') / 2**20:.0f}" if who == "ours" else ""
            print(f"{row}{added / 2**20:11.0f}{held:>17}{length / seconds:10.0f}", flush=True)
            means.append(mean)
        if not max(means) - min(means) < 1e-4:
            raise RuntimeError(f"length {length}: the log-likelihoods per base differ, {means}")


if __name__ == "__main__":
    main()
