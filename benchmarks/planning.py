# SPDX-License-Identifier: Apache-2.0
"""Memory as evo2_plan plans it: for published models, and beside real steps and runs of small models.

``python benchmarks/planning.py``, on a CPU, prints Markdown. Measured is the most that a real step or run adds, by the
events of PyTorch's allocator: unlike resident memory, these leave out what the process keeps after freeing it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from evo2_megatron.config import ParallelConfig
from evo2_megatron.tasks.planning.plan import plan
from evo2_megatron.tasks.planning.plan_inference import Inference, longest_sequence, plan_inference
from tasks.planning.allocations import as_on_a_cpu, of_inference, of_training_step

TRAINING = (
    # tokens, GPUs, layout, and how far positions are stretched beyond the model size's own
    (2**20, 256, ParallelConfig(tensor=8, context=16), None),
    (2**21, 512, ParallelConfig(tensor=8, context=32), 256.0),
)
INFERENCE = (
    # model size, tensor-parallel processes, tokens
    ("evo2_1b_base", 1, 8_192),
    ("evo2_7b", 1, 8_192),
    ("evo2_7b", 1, 131_072),
    ("evo2_7b", 2, 1_048_576),
    ("evo2_40b", 2, 8_192),
    ("evo2_40b", 2, 131_072),
    ("evo2_40b", 4, 1_048_576),
)
GIGABYTES = (24, 48, 80, 141)
PATTERNS = ("SDH*", "SDHS")


def training_table() -> None:
    """The published layouts of the 40B model."""
    print("| tokens | GPUs | layout | weights + gradients | optimizer | activations | GB per GPU | planned in |")
    print("|---|---|---|---|---|---|---|---|")
    for length, num_gpus, layout, stretch in TRAINING:
        start = time.perf_counter()
        given = {} if stretch is None else {"seq_len_interpolation_factor": stretch}
        worst = plan(
            num_gpus, model_size="evo2_40b", seq_length=length, global_batch_size=2, parallel=layout, **given
        ).worst
        seconds = time.perf_counter() - start
        parts = (worst.weight_bytes, worst.optimizer_bytes, worst.activation_bytes, worst.total_bytes)
        figures = " | ".join(f"{size / 1e9:.1f}" for size in parts)
        print(f"| {length:,} | {num_gpus} | TP {layout.tensor}, CP {layout.context} | {figures} | {seconds:.0f} s |")


def inference_tables() -> None:
    """Of one sequence; and the longest sequence on GPUs as they are sold."""
    print("\n| model | GPUs | tokens | weights, GB per GPU | to score, GB | to generate, GB |")
    print("|---|---|---|---|---|---|")
    for size, tensor, length in INFERENCE:
        given = {"model_size": size, "seq_length": length, "parallel": ParallelConfig(tensor=tensor)}
        score, generate = (plan_inference(Inference(use), **given)[0] for use in ("score", "generate"))
        totals = f"{score.total_bytes / 1e9:.1f} | {generate.total_bytes / 1e9:.1f}"
        print(f"| `{size}` | {tensor} | {length:,} | {score.weight_bytes / 1e9:.1f} | {totals} |")
    print("\n| model | GPUs | " + " | ".join(f"{gigabytes} GB" for gigabytes in GIGABYTES) + " |")
    print("|---|---|" + "---|" * len(GIGABYTES))
    for size, tensor in dict.fromkeys((size, tensor) for size, tensor, _ in INFERENCE):
        layout, cells = ParallelConfig(tensor=tensor), []
        for gigabytes in GIGABYTES:
            # a GPU has 3 GB less for tensors: context, libraries, gaps
            room = (gigabytes - 3) * 1e9
            longest = [
                longest_sequence(Inference(use), room, model_size=size, parallel=layout)
                for use in ("score", "generate")
            ]
            cells.append(", ".join(f"{length:,}" for length in longest) if any(longest) else "-")
        print(f"| `{size}` | {tensor} | " + " | ".join(cells) + " |")


def measured_tables() -> None:
    """Small models, planned and run."""
    print("\n| training, layers | precision | recompute | planned, MB | measured, MB | planned / measured |")
    print("|---|---|---|---|---|---|")
    small = {"model_size": "evo2_tiny", "seq_length": 2048}
    for pattern in PATTERNS:
        for precision in ("fp32", "bf16_mixed"):
            given = small | {"hybrid_override_pattern": pattern, "precision": precision}
            for recompute in ("full", "none"):
                more = {"global_batch_size": 1, "recompute": recompute}
                planned, real = plan(1, **given, **more).worst.activation_bytes, of_training_step(**given, **more)
                print(f"| {pattern} | {precision} | {recompute} | {_figures(planned, real)} |")
    print("\n| layers | precision | | tokens in a piece | planned, MB | measured, MB | planned / measured |")
    print("|---|---|---|---|---|---|---|")
    for pattern in PATTERNS:
        for precision in ("fp32", "bf16_mixed"):
            given = small | {"hybrid_override_pattern": pattern, "precision": precision}
            for inference in (Inference(use, 1, piece) for use in ("score", "generate") for piece in (4096, 512)):
                planned = plan_inference(inference, **given)[0].activation_bytes
                figures = _figures(planned, of_inference(inference, **given))
                print(f"| {pattern} | {precision} | {inference.use} | {inference.piece} | {figures} |")


def _figures(planned: int, real: int) -> str:
    return f"{planned / 1e6:.1f} | {real / 1e6:.1f} | {planned / real:.3f}"


def main() -> None:
    """Print all tables."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # that fake groups have no real backend
    training_table()
    inference_tables()
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_cpu(patch)
        measured_tables()


if __name__ == "__main__":
    main()
