# SPDX-License-Identifier: Apache-2.0
"""Memory and time of one training step on long sequences, one row per length, in a process of its own.

``python benchmarks/long_context.py [--lengths 8k 32k 128k 512k] [--context-parallel-size 1] [--pattern SDHS]``

Forward, loss and backward of one sequence in float32 through a 4-layer model of 256 channels. Memory is the peak that
the step adds to what the process held before it: activations, gradients and temporaries.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import time
from pathlib import Path

from evo2_megatron.config import ParallelConfig

HIDDEN, FFN, HEADS, GROUPS = 256, 704, 2, 16
WARM_UP_CHUNK = 512


def held_bytes(name: str) -> int:
    """A figure of /proc/self/status: VmRSS, or VmHWM, the peak since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Start a new peak."""
    Path("/proc/self/clear_refs").write_text("5")


def step(length: int, pattern: str, parallel: ParallelConfig, recompute: bool, results: multiprocessing.Queue) -> None:
    """Measure on this process; puts (bytes added, seconds)."""
    import torch

    from evo2_megatron.runtime import megatron

    megatron.enter()
    from evo2_megatron.model.provider import provider_for
    from evo2_megatron.ops.zigzag import zigzag_split
    from evo2_megatron.runtime.distributed import process_groups, rank

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // parallel.context))
    changed = {"recompute_num_layers": 1} if recompute else {"recompute_granularity": None, "recompute_method": None}
    with process_groups(parallel):
        provider = provider_for(
            "evo2_tiny",
            hybrid_override_pattern=pattern,
            num_layers=len(pattern),
            hidden_size=HIDDEN,
            ffn_hidden_size=FFN,
            num_attention_heads=HEADS,
            num_groups_hyena=HIDDEN,
            num_groups_hyena_medium=GROUPS,
            num_groups_hyena_short=GROUPS,
            seq_length=length,
            vocab_size=512,
            params_dtype=torch.float32,
            bf16=False,
            context_parallel_size=parallel.context,
            **changed,
        )
        provider.finalize()
        model = provider.provide()
        ids_BL = torch.tensor(list(b"ACGT"))[torch.randint(4, (1, length))]
        if parallel.context > 1:
            ids_BL = zigzag_split(ids_BL, 1, num_ranks=parallel.context, rank=rank())
        warm = ids_BL[:, : 2 * WARM_UP_CHUNK]
        model(warm, labels=warm).mean().backward()  # what libraries set up at their first use is not the length's
        forget_peak()
        before, start = held_bytes("VmRSS"), time.perf_counter()
        model(ids_BL, labels=ids_BL).mean().backward()
        results.put((held_bytes("VmHWM") - before, time.perf_counter() - start))


def start(rank: int, parallel: ParallelConfig, port: int, *arguments: object) -> None:
    """Body of one process."""
    names = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    values = dict.fromkeys(names[0], str(rank)) | dict.fromkeys(names[1], str(parallel.context))
    os.environ |= values | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    step(*arguments)


def measure(length: int, pattern: str, parallel: ParallelConfig, recompute: bool) -> tuple[int, float]:
    """Most bytes that a process added, and the slowest one's seconds."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=start, args=(i, parallel, port, length, pattern, parallel, recompute, results))
        for i in range(parallel.context)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"length {length}: status {process.exitcode}")
    figures = [results.get() for _ in processes]
    return max(added for added, _ in figures), max(seconds for _, seconds in figures)


def tokens(text: str) -> int:
    """``8k`` is 8,192."""
    return int(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)


def main() -> None:
    """Parse arguments, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=tokens, nargs="+", default=[tokens(n) for n in ("8k", "32k", "128k")])
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--pattern", default="SDHS")
    parser.add_argument("--no-recompute", action="store_true")
    args = parser.parse_args()
    parallel = ParallelConfig(context=args.context_parallel_size)
    print(f"{'pattern':8}{'tokens':>9}{'CP':>4}{'recompute':>11}{'MiB/process':>13}{'kB/token':>10}{'seconds':>9}")
    for length in args.lengths:
        added, seconds = measure(length, args.pattern, parallel, not args.no_recompute)
        per_token = added / (length / parallel.context) / 1000
        figures = f"{added / 2**20:13.0f}{per_token:10.2f}{seconds:9.1f}"
        how = f"{parallel.context:4}{'no' if args.no_recompute else 'yes':>11}"
        print(f"{args.pattern:8}{length:9}{how}{figures}", flush=True)


if __name__ == "__main__":
    main()
