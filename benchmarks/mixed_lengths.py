# SPDX-License-Identifier: Apache-2.0
"""Scoring many sequences of mixed length, and generating from mixed prompts, beside Arc's Vortex on a CPU.

``python benchmarks/mixed_lengths.py [--model hidden_512] [--sequences 8] [--new-tokens 64 256] [--bfloat16]``

The models, their weights and the way of timing are those of ``benchmarks/beside_vortex.py``. Sequences of 200 to 8,000
bases are scored by what ``predict_evo2`` runs, and one by one by Vortex, which pads what shares a batch. Eight prompts
of 50 to 400 bases are continued greedily by what ``infer_evo2`` runs, and one by one by Vortex, whose batches need
equal lengths. Outputs are compared first. With ``--bfloat16`` only scoring is timed: ours loaded in ``bf16_mixed``,
Vortex under autocast, the one way in which it runs with 16 bits on a CPU.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import beside_vortex
import torch

from evo2_megatron.config import ParallelConfig
from evo2_megatron.runtime.distributed import process_groups
from evo2_megatron.tasks.scoring.batching import BATCH_TOKENS_CPU, plan_batches

ROUNDS = 3
TOLERANCE = {"fp32": 1e-5, "bf16_mixed": 5e-3}
"""Largest relative difference of log-likelihoods from those of Vortex in float32."""


def made_up_dna(lengths: list[int]) -> list[list[int]]:
    """Token ids."""
    chance = random.Random(0)
    return [[ord(base) for base in chance.choices("ACGT", k=length)] for length in lengths]


def in_bfloat16(model: torch.nn.Module) -> torch.nn.Module:
    """The model as every command loads it in ``bf16_mixed``."""
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.checkpoint.write import whole_weights, write_checkpoint
    from evo2_megatron.data.tokenizer import tokenizer_dir

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(
            whole_weights(model), model.config, Path(folder), tokenizer=tokenizer_dir(512), recipe="fp32"
        )
        return load_model(checkpoint, parallel=ParallelConfig(), precision="bf16_mixed").model


def score_ours(model: torch.nn.Module, sequences: list[list[int]], precision: str = "fp32") -> list[float]:
    """Log-likelihoods, in batches of similar length."""
    from evo2_megatron.tasks.scoring.prediction_runner import Runner
    from evo2_megatron.tasks.scoring.prediction_settings import Output

    runner = Runner(model, Output(log_probs="sum"), precision=precision)
    scores = [0.0] * len(sequences)
    for batch in plan_batches([len(ids) for ids in sequences], max_tokens=BATCH_TOKENS_CPU):
        tokens = [torch.tensor(sequences[i]) for i in batch]
        result = runner(
            [{"tokens": t, "loss_mask": torch.ones_like(t), "seq_idx": torch.tensor(i)} for t, i in zip(tokens, batch)]
        )
        for i, score in zip(batch, result["log_likelihood"].tolist()):
            scores[i] = score
    return scores


def score_vortex(vortex, sequences: list[list[int]], *, bfloat16: bool = False) -> list[float]:
    """The same, one after the other."""
    scores = []
    for ids in sequences:
        tokens_BL = torch.tensor([ids])
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits_BLV = vortex.score(tokens_BL)
        log_probs = logits_BLV[0, :-1].float().log_softmax(-1)
        scores.append(log_probs.gather(1, tokens_BL[0, 1:, None]).double().sum().item())
    return scores


def generate_ours(model: torch.nn.Module, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    """Greedy continuations, all prompts in one batch."""
    from evo2_megatron.tasks.generation.generate import GenerationSettings, generate
    from evo2_megatron.tasks.generation.sampling import Sampling

    settings = GenerationSettings(
        max_new_tokens=num_new, sampling=Sampling(temperature=0), max_batch_size=len(prompts), alphabet="ACGT",
        stop_at_eod=False,
    )  # fmt: skip
    return [generation.token_ids for generation in generate(model, prompts, settings)]


def generate_vortex(vortex, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    """The same, one after the other."""
    letters = torch.tensor(list(b"ACGT"))
    made = []
    for prompt in prompts:
        logits_BV = vortex.prefill(torch.tensor([prompt]), max_tokens=len(prompt) + num_new)[:, -1]
        made.append([letters[logits_BV[0, letters].argmax()].item()])
        while len(made[-1]) < num_new:
            logits_BV = vortex.step(torch.tensor([made[-1][-1]]))
            made[-1].append(letters[logits_BV[0, letters].argmax()].item())
    return made


def measure(name: str, ours: Callable[[], object], theirs: Callable[[], object], num_tokens: int) -> None:
    """Print a row."""
    timing = beside_vortex.interleave(ours, theirs, num_tokens=num_tokens, rounds=ROUNDS)
    print(f"{name:14}{num_tokens:9,} {timing.ours:9,.0f} {timing.vortex:9,.0f} {timing.ratio:6.2f}", flush=True)


def main() -> None:
    """Print a row for scoring, and one for each number of new tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=beside_vortex.MODELS, default="hidden_512")
    parser.add_argument("--sequences", type=int, default=8, help="to score (default: 8)")
    parser.add_argument(
        "--new-tokens", type=int, nargs="+", default=[64, 256], help="of each prompt (default: 64 256)"
    )
    parser.add_argument("--bfloat16", action="store_true", help="score in 16 bits (default: in float32)")
    args = parser.parse_args()
    torch.set_num_threads(beside_vortex.NUM_THREADS)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    chance = random.Random(1)
    sequences = made_up_dna([chance.randint(200, 8_000) for _ in range(args.sequences)])
    prompts = made_up_dna([50 * (i + 1) for i in range(8)])
    with process_groups(ParallelConfig()):
        architecture = beside_vortex.MODELS[args.model]
        weights = beside_vortex.random_weights(architecture)
        ours = beside_vortex.Ours(architecture, weights).model
        vortex = beside_vortex.Vortex(architecture, weights)
        precision = "bf16_mixed" if args.bfloat16 else "fp32"
        if args.bfloat16:
            ours = in_bfloat16(ours)
        run = (
            lambda: score_ours(ours, sequences, precision),
            lambda: score_vortex(vortex, sequences, bfloat16=args.bfloat16),
        )
        pairs = [(a / b - 1, c / b - 1) for a, c, b in zip(run[0](), run[1](), score_vortex(vortex, sequences))]
        worst = max((abs(error) for pair in pairs for error in pair), default=0.0)
        if worst > TOLERANCE[precision]:
            sys.exit(f"scores differ by {worst:.1e}; nothing was timed")
        print(f"{'':14}{'tokens':>9} {'ours/s':>9} {'Vortex/s':>9} {'ratio':>6}")
        if sequences:
            measure("score", *run, sum(map(len, sequences)))
        for num_new in () if args.bfloat16 else args.new_tokens:
            run = (partial(generate_ours, ours, prompts, num_new), partial(generate_vortex, vortex, prompts, num_new))
            if run[0]() != run[1]():
                sys.exit(f"{num_new} generated tokens differ; they were not timed")
            measure(f"generate {num_new}", *run, num_new * len(prompts))


if __name__ == "__main__":
    main()
