# SPDX-License-Identifier: Apache-2.0
"""Memory and time of scoring one long sequence, one row per length, in a process of its own, on a CPU in float32.

``python benchmarks/scoring_memory.py [--lengths 8k 64k 256k 1024k] [--hidden-size 512] [--pattern SDHSSDHS]``

Memory is the peak that scoring adds to what the process held with the model loaded; ``keys and values`` is the part of
it that attention layers must hold.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time

from long_context import forget_peak, held_bytes, tokens

from evo2_megatron.config import ParallelConfig


def score(length: int, hidden_size: int, pattern: str, chunk: int, results: multiprocessing.Queue) -> None:
    """Measure on this process; puts (bytes added, seconds, log-likelihood per base)."""
    import torch

    from evo2_megatron.runtime import megatron

    megatron.enter()
    from evo2_megatron.model.provider import provider_for
    from evo2_megatron.runtime.distributed import process_groups
    from evo2_megatron.tasks.prediction_runner import Runner
    from evo2_megatron.tasks.prediction_settings import Output

    with process_groups(ParallelConfig()):
        provider = provider_for(
            "evo2_tiny",
            hybrid_override_pattern=pattern,
            num_layers=len(pattern),
            hidden_size=hidden_size,
            ffn_hidden_size=11 * hidden_size // 4,
            num_attention_heads=hidden_size // 128,
            num_groups_hyena=hidden_size,
            num_groups_hyena_medium=hidden_size // 16,
            num_groups_hyena_short=hidden_size // 16,
            seq_length=length,
            vocab_size=512,
            params_dtype=torch.float32,
            bf16=False,
        )
        provider.finalize()
        runner = Runner(provider.provide().eval(), Output(log_probs="sum"), precision="fp32", chunk_length=chunk)

        def item(num_tokens: int) -> dict[str, torch.Tensor]:
            ids = torch.tensor(list(b"ACGT"))[torch.randint(4, (num_tokens,))]
            return {"tokens": ids, "loss_mask": torch.ones_like(ids), "seq_idx": torch.tensor(0)}

        runner([item(256)])  # what libraries set up at their first use is not the length's
        sequence = item(length)
        forget_peak()
        before, start = held_bytes("VmRSS"), time.perf_counter()
        result = runner([sequence])
        seconds = time.perf_counter() - start
        mean = (result["log_likelihood"] / result["num_scored"]).item()
        results.put((held_bytes("VmHWM") - before, seconds, mean))


def main() -> None:
    """Parse arguments, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=tokens, nargs="+", default=[tokens(n) for n in ("8k", "64k", "256k", "1024k")]
    )
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--pattern", default="SDHS")
    parser.add_argument("--chunk", type=tokens, default=tokens("8k"))
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{'hidden':>6} {'pattern':10}{'tokens':>9}{'MiB added':>11}{'keys and values':>17}{'tokens/s':>10}")
    for length in args.lengths:
        results = context.Queue()
        process = context.Process(target=score, args=(length, args.hidden_size, args.pattern, args.chunk, results))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"length {length}: status {process.exitcode}")
        added, seconds, mean = results.get()
        if not math.isfinite(mean):
            raise RuntimeError(f"length {length}: the log-likelihood is {mean}")
        held = 8 * args.hidden_size * length * args.pattern.count("*")
        figures = f"{added / 2**20:11.0f}{held / 2**20:17.0f}{length / seconds:10.0f}"
        print(f"{args.hidden_size:6} {args.pattern:10}{length:9}{figures}", flush=True)


if __name__ == "__main__":
    main()
