# SPDX-License-Identifier: Apache-2.0
"""Variant scoring with shared context beside whole windows, on a CPU in float32.

``python benchmarks/variants.py [--model evo2_tiny hidden_512] [--window-length 8192] [--records 2] [--rounds 3]``

What ``variants_evo2`` runs, with and without ``--no-shared-context``, on SNVs of a made-up contig with random weights;
``evo2_1b_base`` takes a quarter of an hour a round. Scores are compared first; times are the best of the rounds, in
turns; whole windows in the batches that suit them.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from hidden_512 import ARCHITECTURE

from evo2_megatron.config import ParallelConfig
from evo2_megatron.data.genome import Genome
from evo2_megatron.runtime import megatron
from evo2_megatron.runtime.distributed import process_groups

MODELS = ("evo2_tiny", "hidden_512", "evo2_1b_base")
NUM_THREADS = 2
TOLERANCE = 1e-4


def build(name: str, window: int) -> torch.nn.Module:
    """A model with random weights."""
    from evo2_megatron.model.provider import provider_for

    settings = {"vocab_size": 512, "seq_length": window, "params_dtype": torch.float32, "bf16": False}
    if name == "hidden_512":
        a = ARCHITECTURE
        settings |= {
            "hybrid_override_pattern": a.pattern, "num_layers": len(a.pattern), "hidden_size": a.hidden_size,
            "ffn_hidden_size": a.ffn_hidden_size, "num_attention_heads": a.num_heads,
            "num_groups_hyena": a.hidden_size, "num_groups_hyena_medium": a.num_groups,
            "num_groups_hyena_short": a.num_groups,
        }  # fmt: skip
    provider = provider_for("evo2_tiny" if name == "hidden_512" else name, **settings)
    provider.finalize()
    return provider.provide().eval()


def snvs(genome: Genome, records: int, num_alts: int, window: int):
    """Groups and batches as the command makes them."""
    from evo2_megatron.tasks.scoring.variant_windows import Comparison, Edit, WindowSettings, make_groups

    comparisons = []
    for record in range(records):
        position = window + 7 * record
        reference = genome.bases(b"c", position, position + 1)
        alts = [base for base in (b"A", b"C", b"G", b"T") if base != reference][:num_alts]
        comparisons += [Comparison(b"c", Edit(position, position + 1, alt), False) for alt in alts]
    return make_groups(comparisons, genome.lengths, WindowSettings(window, 1))


def best(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each, in turns."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, spent in zip(calls, times):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    return [min(spent) for spent in times]


def measure(model: torch.nn.Module, genome: Genome, num_alts: int, args: argparse.Namespace) -> tuple[float, ...]:
    """Seconds per record whole and shared, and the largest difference of a mean score."""
    from evo2_megatron.tasks.scoring.allele_scoring import BATCH_TOKENS_CPU, SharedContext, WholeWindows, make_item
    from evo2_megatron.tasks.scoring.batching import BATCH_TOKENS_CPU as WHOLE_TOKENS
    from evo2_megatron.tasks.scoring.prediction_runner import Runner
    from evo2_megatron.tasks.scoring.prediction_settings import Output
    from evo2_megatron.tasks.scoring.variant_windows import plan_groups

    groups = snvs(genome, args.records, num_alts, args.window_length)
    items = [make_item(group, genome, prepend_bos=False) for group in groups]
    runner = Runner(model, Output(log_probs="sum"), precision="fp32")
    shared_context = SharedContext(runner, max_tokens=BATCH_TOKENS_CPU)
    batches = plan_groups(groups, max_tokens=BATCH_TOKENS_CPU)

    def shared() -> list[torch.Tensor]:
        results = [shared_context([items[index] for index in batch]) for batch in batches]
        return torch.cat([result["alternative"] - result["reference"] for result in results])

    def whole(tokens: int) -> torch.Tensor:
        result = WholeWindows(runner, max_tokens=tokens, can_split=True)(items)
        return result["alternative"] - result["reference"]

    worst = (shared() - whole(WHOLE_TOKENS)).abs().max().item() / (args.window_length - 1)
    if worst > TOLERANCE:
        sys.exit(f"scores differ by {worst:.1e}; nothing was timed")
    one, two, ours = best([lambda: whole(BATCH_TOKENS_CPU), lambda: whole(WHOLE_TOKENS), shared], args.rounds)
    return min(one, two) / args.records, ours / args.records, worst


def main() -> None:
    """Print one row for each model and number of ALTs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS[:2])
    parser.add_argument("--window-length", type=int, default=8192)
    parser.add_argument("--records", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    megatron.enter()
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    torch.set_num_threads(NUM_THREADS)
    print(f"{'model':12}{'ALTs':>5}{'whole s':>10}{'shared s':>10}{'ratio':>7}{'difference':>12}", flush=True)
    with process_groups(ParallelConfig()), tempfile.TemporaryDirectory() as folder:
        fasta = Path(folder) / "c.fa"
        fasta.write_text(">c\n" + "".join(random.Random(0).choices("ACGT", k=3 * args.window_length)) + "\n")
        with Genome(fasta) as genome:
            for name in args.model:
                model = build(name, args.window_length)
                for num_alts in (1, 3):
                    whole, shared, worst = measure(model, genome, num_alts, args)
                    row = f"{name:12}{num_alts:5}{whole:10.3f}{shared:10.3f}{shared / whole:7.2f}{worst:12.1e}"
                    print(row, flush=True)


if __name__ == "__main__":
    main()
