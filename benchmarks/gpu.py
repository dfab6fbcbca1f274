# SPDX-License-Identifier: Apache-2.0
"""Speed on a GPU beside what the chip can do: training, scoring and decoding with random weights and made-up data.

    python benchmarks/gpu.py [--train evo2_1b_base] [--score evo2_7b] [--decode evo2_1b_base evo2_7b] [--profile]

Training is ``train_evo2 --mock-data`` with one sample at a time; the median time of its steps counts, the first ones
left out. Scoring is what ``predict_evo2`` runs, decoding what ``infer_evo2`` runs, with and without CUDA graphs. The
limit of training and scoring is the GPU's peak in 16 bits (FP8 recipes: in FP8), with the causal half of attention
counted; that of decoding is its memory's bandwidth, through which each token takes all weights, keys and values.

Without a GPU the same code runs in float32, for a try, and no limit is printed: ``--train evo2_tiny --score evo2_tiny
--decode evo2_tiny --lengths 1024 --training-length 512 --new-tokens 16``.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import torch

from evo2_megatron.architectures import ARCHITECTURES, Architecture
from evo2_megatron.config import ParallelConfig
from evo2_megatron.runtime import megatron
from evo2_megatron.runtime.device_peaks import peak_tflops
from evo2_megatron.runtime.distributed import process_groups

WARM_UP_STEPS = 5
STEPS = 15
TRAINING_LENGTH = 8_192
PROMPT_LENGTH = 1_024
BATCH_TOKENS = 65_536
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12}
"""Bytes per second by NVIDIA's data sheets (SXM)."""

STEP_TIME = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")


def forward_flops(a: Architecture, length: int) -> float:
    """Useful operations per token: matrix products and the causal half of attention; convolutions are below 0.3 %."""
    of_layers = len(a.pattern) * 2 * a.hidden_size * (4 * a.hidden_size + 3 * a.ffn_hidden_size)
    return of_layers + a.pattern.count("*") * 2 * length * a.hidden_size + 2 * a.hidden_size * 512


def share_of_peak(name: str, precision: str, length: int, tokens_per_second: float, passes: int = 1) -> float | None:
    """None where the peak is not known; ``passes``: 3 with the backward pass."""
    peak = peak_tflops(precision)
    flops = passes * forward_flops(ARCHITECTURES[name], length) * tokens_per_second
    return None if peak is None else flops / (peak * 1e12)


def row(what: str, name: str, setting: str, tokens_per_second: float, share: float | None) -> None:
    """Print one line of the table."""
    of_limit = "-" if share is None else f"{100 * share:.0f} %"
    print(f"{what:9}{name:16}{setting:44}{tokens_per_second:12,.0f}{of_limit:>8}", flush=True)


def build(name: str, precision: str, **overrides: object) -> torch.nn.Module:
    """A model with random weights, as ``load_model`` would leave it."""
    from evo2_megatron.model.provider import provider_for
    from evo2_megatron.runtime.precision import precision_settings

    provider = provider_for(name, vocab_size=512, bias_dropout_fusion=False, **overrides)
    precision_settings(precision).setup(provider)
    provider.finalize()
    return provider.provide().to(megatron.device(), provider.params_dtype).eval()


def train(name: str, precision: str, length: int, flags: list[str]) -> None:
    """``train_evo2`` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python",
            sys.executable, "-c", "from evo2_megatron.cli.train import main; main()", "--mock-data",
            "--model-size", name, "--seq-length", str(length), "--max-steps", str(WARM_UP_STEPS + STEPS),
            "--micro-batch-size", "1", "--global-batch-size", "1", "--log-interval", "1", "--eval-iters", "0",
            "--mixed-precision-recipe", precision, "--result-dir", folder, *flags,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"training {name} in {precision} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    seconds = [float(ms) / 1e3 for ms in STEP_TIME.findall(done.stdout + done.stderr)][WARM_UP_STEPS:]
    speed = length / statistics.median(seconds)
    share = share_of_peak(name, precision, length, speed, passes=3)
    row("train", name, " ".join([f"{length:,} tokens, {precision}", *flags]), speed, share)


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Median, the device waited for."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def score(name: str, precision: str, lengths: list[int], compiled: bool, profile: bool) -> None:
    """Log-likelihoods of whole sequences."""
    from evo2_megatron.tasks.scoring.prediction_runner import Runner
    from evo2_megatron.tasks.scoring.prediction_settings import Output

    runner = Runner(
        build(name, precision, use_subquadratic_ops=compiled), Output(log_probs="sum"), precision=precision
    )
    for length in lengths:
        tokens_L = torch.randint(65, 90, (length,))
        item = {"tokens": tokens_L, "loss_mask": torch.ones_like(tokens_L), "seq_idx": torch.tensor(0)}
        items = [item] * max(1, (BATCH_TOKENS if megatron.on_cuda() else length) // length)
        speed = len(items) * length / seconds_of(lambda items=items: runner(items), 3)
        kernels = "compiled kernels" if compiled else "plain operators"
        share = share_of_peak(name, precision, length, speed)
        row("score", name, f"{len(items)} x {length:,} tokens, {kernels}", speed, share)
        if profile:
            show_costs(lambda items=items: runner(items))


def show_costs(call: Callable[[], object]) -> None:
    """The three kernels that take most time."""
    with torch.profiler.profile() as run:
        call()
    on_cuda = megatron.on_cuda()
    events = [(e.self_device_time_total if on_cuda else e.self_cpu_time_total, e.key) for e in run.key_averages()]
    total = sum(spent for spent, _ in events)
    for spent, kernel in sorted(events, reverse=True)[:3]:
        print(f"         {100 * spent / total:3.0f} % {kernel[:90]}")


def decode(model: torch.nn.Module, name: str, batch: int, num_new: int, graphs: bool) -> None:
    """New tokens after prompts of ``PROMPT_LENGTH``, greedily."""
    from evo2_megatron.tasks.generation.decoding import Decoding
    from evo2_megatron.tasks.generation.generate import GenerationSettings
    from evo2_megatron.tasks.generation.sampling import Sampling

    settings = GenerationSettings(
        max_new_tokens=num_new, sampling=Sampling(temperature=0.0), stop_at_eod=False, cuda_graphs=graphs
    )
    prompts = torch.randint(65, 90, (batch, PROMPT_LENGTH)).tolist()
    for _ in range(2):  # the first run compiles and fills caches
        result = Decoding.alike(model, settings, prompts, seeds=range(batch)).run()
    speed = batch * result.num_steps / result.decode_seconds
    a, size = ARCHITECTURES[name], next(model.parameters()).element_size()
    weights = sum(parameter.numel() for parameter in model.parameters()) * size
    room = PROMPT_LENGTH + num_new
    cache = batch * a.pattern.count("*") * 2 * a.hidden_size * size * (room if graphs else room - num_new / 2)
    limit = next((v for k, v in BANDWIDTH.items() if megatron.on_cuda() and k in torch.cuda.get_device_name()), None)
    share = None if limit is None else speed / batch * (weights + cache) / limit
    row("decode", name, f"batch {batch}, {'CUDA graphs' if graphs else 'launch by launch'}", speed, share)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"nargs": "*", "choices": sorted(ARCHITECTURES)}
    parser.add_argument("--train", default=["evo2_1b_base"], **names)
    parser.add_argument("--score", default=["evo2_7b"], **names)
    parser.add_argument("--decode", default=["evo2_1b_base", "evo2_7b"], **names)
    parser.add_argument("--lengths", nargs="+", type=int, default=[8_192, 65_536, 131_072], help="of scoring")
    parser.add_argument("--training-length", type=int, default=TRAINING_LENGTH)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="of decoding")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--profile", action="store_true", help="name the three largest costs of scoring")
    args = parser.parse_args()
    megatron.enter()
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    on_cuda = megatron.on_cuda()
    print(torch.cuda.get_device_name() if on_cuda else "no GPU: float32 on the CPU")
    print(f"{'':9}{'model':16}{'':44}{'tokens/s':>12}{'limit':>8}")
    can_fp8 = on_cuda and megatron.have_transformer_engine() and torch.cuda.get_device_capability() >= (8, 9)
    fp8 = ["bf16_with_fp8_current_scaling_mixed"] if can_fp8 else []
    plain = "bf16_mixed" if on_cuda else "fp32"
    for name in args.train:
        for precision in [plain, *fp8]:
            train(name, precision, args.training_length, [])
        if on_cuda:
            train(name, plain, args.training_length, ["--no-activation-checkpointing"])
            train(name, plain, args.training_length, ["--no-activation-checkpointing", "--use-subquadratic-ops"])
    with process_groups(ParallelConfig()), torch.inference_mode():
        for name in args.score:
            for compiled in (False, True) if on_cuda else (False,):
                score(name, plain, args.lengths, compiled, args.profile)
        for name in args.decode:
            model = build(name, plain)
            for batch in args.batches:
                for graphs in (False, True) if on_cuda else (False,):
                    decode(model, name, batch, args.new_tokens, graphs)


if __name__ == "__main__":
    main()
