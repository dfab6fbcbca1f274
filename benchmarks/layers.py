# SPDX-License-Identifier: Apache-2.0
"""Forward and backward of one layer's parts in training: Hyena-SE, -MR and -LI mixers, attention, gated MLP.

Float32, two threads, one sequence; each with its norm, projections and gradients of weights and input. "products" is
the part of the time that the same matrix products take by themselves, forward and backward.

    python benchmarks/layers.py [--sizes evo2_tiny hidden_512] [--lengths 1024 8192]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from training import NUM_THREADS, SIZES, add_hidden_512

from evo2_megatron.architectures import Architecture, architecture
from evo2_megatron.config import ParallelConfig
from evo2_megatron.runtime import megatron
from evo2_megatron.runtime.distributed import process_groups

ROUNDS = {1_024: 15, 8_192: 5}
"""Length in tokens: rounds of every measurement, after one that is not counted."""


def parts(size: str, length: int) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """The parts of a model's layers, and what they are called with beside the residual stream."""
    from evo2_megatron.model.provider import provider_for

    provider = provider_for(
        size, seq_length=length, vocab_size=256, params_dtype=torch.float32, bf16=False, recompute_granularity=None,
        recompute_method=None, recompute_num_layers=None,
    )  # fmt: skip
    provider.finalize()
    model = provider.provide().train()
    layers = dict(zip(architecture(size).pattern, model.decoder.layers))  # the last of each kind
    rotary = {"attention_mask": None, "rotary_pos_emb": model.rotary_pos_emb(length)}
    return {
        "Hyena-SE": (layers["S"].mixer, {}),
        "Hyena-MR": (layers["D"].mixer, {}),
        "Hyena-LI": (layers["H"].mixer, {}),
        "attention": (layers["*"].self_attention, rotary),
        "MLP": (layers["S"].mlp, {}),
    }


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median of ``rounds`` calls, after one."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def train_part(module: nn.Module, given: dict[str, Tensor], x_LBH: Tensor) -> Callable[[], None]:
    """A forward and a backward pass."""
    grad_LBH = torch.randn_like(x_LBH)

    def run() -> None:
        x = x_LBH.detach().requires_grad_()
        module(x, **given)[0].backward(grad_LBH)
        module.zero_grad(set_to_none=True)

    return run


def products(name: str, arch: Architecture, length: int) -> Callable[[], None]:
    """The matrix products of a part's linear layers, forward and backward."""
    H, F = arch.hidden_size, arch.ffn_hidden_size
    shapes = ((H, 2 * F), (F, H)) if name == "MLP" else ((H, 3 * H), (H, H))
    pairs = [(torch.randn(length, n), torch.randn(m, n), torch.randn(length, m)) for n, m in shapes]

    def run() -> None:
        for x, weight, grad in pairs:
            _ = x @ weight.T, grad @ weight, grad.T @ x

    return run


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, choices=tuple(ROUNDS), default=tuple(ROUNDS))
    args = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    add_hidden_512()
    megatron.enter()
    print(f"forward and backward of the parts of a layer, float32, {NUM_THREADS} threads")
    print(f"{'':10} {'':9} {'tokens':>6} {'ms':>8} {'us/token':>8} {'products':>8}")
    with process_groups(ParallelConfig()):
        for size in args.sizes:
            arch = architecture(size)
            for length in args.lengths:
                for name, (module, given) in parts(size, length).items():
                    x_LBH = torch.randn(length, 1, arch.hidden_size)
                    part = seconds(train_part(module, given, x_LBH), ROUNDS[length])
                    share = seconds(products(name, arch, length), ROUNDS[length]) / part
                    each = 1e6 * part / length
                    print(f"{size:10} {name:9} {length:6,} {1e3 * part:8.1f} {each:8.2f} {share:8.0%}", flush=True)


if __name__ == "__main__":
    main()
