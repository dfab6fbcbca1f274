# SPDX-License-Identifier: Apache-2.0
"""What Megatron costs: our training run beside the same model in plain PyTorch on the project's own operators.

The plain model is torch.nn, ``evo2_megatron.ops`` and autograd, with torch's fused AdamW; it gets the weights before
the run's first step, by name. Gradients of that step and losses of all steps are compared. Pairs are timed in the same
process: one pass of Megatron Bridge's training loop with all that belongs to it (data, logging, norms, scheduler), and
one step of the plain model on the same batch.

    python benchmarks/plain_model.py [--sizes evo2_tiny hidden_512] [--lengths 1024 8192] [--recompute none full]

Shape legend: B batch, L tokens, H channels, E = 3H projection rows, N heads, C channels per head, D = H.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import NUM_THREADS, SAMPLES_PER_STEP, SIZES, STEPS, WARM_UP_STEPS, add_hidden_512, options, prepare

from evo2_megatron.architectures import Architecture, architecture
from evo2_megatron.ops.casing import is_lower, to_upper
from evo2_megatron.ops.causal_conv import causal_conv
from evo2_megatron.ops.fused_conv import gated_conv
from evo2_megatron.ops.modal import modal_conv

EPSILON = 1e-6
GRADIENT_TOLERANCE = 1e-4
"""Largest difference of a gradient's elements, in units of the largest of them."""

LOSS_TOLERANCE = 1e-3
"""Largest difference of a step's losses in nat; it grows with the steps, since Adam divides by small gradients."""

BASE, LOWERCASE_WEIGHT = 10_000, 0.1


def rms_norm(x_BLH: Tensor, weight_H: Tensor) -> Tensor:
    """The fast form on a CPU; F.rms_norm takes several times as long."""
    norm_BL1 = torch.linalg.vector_norm(x_BLH, dim=-1, keepdim=True)
    return x_BLH * torch.rsqrt(norm_BL1.square() / x_BLH.shape[-1] + EPSILON) * weight_H


class Parameters(nn.Module):
    """Named tensors, without a forward function."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))


class NormLinear(Parameters):
    """RMSNorm and a linear layer without bias."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(layer_norm_weight=(num_in,), weight=(num_out, num_in))

    def forward(self, x_BLH: Tensor) -> Tensor:
        return F.linear(rms_norm(x_BLH, self.layer_norm_weight), self.weight)


class GatedMLP(nn.Module):
    """``W2 (g(W1 x) * V1 x)`` behind its norm."""

    def __init__(self, arch: Architecture, *, gelu: bool) -> None:
        super().__init__()
        self.linear_fc1 = NormLinear(arch.hidden_size, 2 * arch.ffn_hidden_size)
        self.linear_fc2 = nn.Linear(arch.ffn_hidden_size, arch.hidden_size, bias=False)
        self.gelu = gelu

    def forward(self, x_BLH: Tensor) -> Tensor:
        gate, up = self.linear_fc1(x_BLH).chunk(2, dim=-1)
        return self.linear_fc2((F.gelu(gate) if self.gelu else gate) * up)


class Operator(Parameters):
    """The operator of an S, D or H layer, with its input convolution's taps handed in."""

    def __init__(self, symbol: str, arch: Architecture) -> None:
        H, G = arch.hidden_size, arch.num_groups
        super().__init__(**({} if symbol == "S" else {"conv_bias": (H,)}))
        self.symbol, self.repeats = symbol, H // G
        if symbol == "S":
            self.short_conv = Parameters(short_conv_weight=(G, 1, 7))
            return
        self.filter = Parameters(**({"h": (G, 128)} if symbol == "D" else dict.fromkeys(("p", "gamma", "R"), (H, 16))))
        if symbol == "D":
            self.filter.register_buffer("decay", torch.empty(G, 128))

    def forward(self, u_BEL: Tensor, input_taps_EK: Tensor) -> Tensor:
        if self.symbol == "H":
            f_BEL = causal_conv(u_BEL, input_taps_EK)
            post_gate, pre_gate, value = f_BEL.unflatten(1, (-1, 3)).unbind(2)
            log_pole = -torch.exp(self.filter.p) * torch.exp(self.filter.gamma)
            return post_gate * modal_conv(pre_gate * value, log_pole, self.filter.R, self.conv_bias).y_BDL
        if self.symbol == "S":
            taps_GK, skip_D = self.short_conv.short_conv_weight.flatten(1), None
        else:
            taps_GK, skip_D = (self.filter.h * self.filter.decay).flip(1), self.conv_bias
        taps_DK = taps_GK[:, None].expand(-1, self.repeats, -1).flatten(0, 1)
        return gated_conv(u_BEL, input_taps_EK, taps_DK, skip_D)


class Mixer(nn.Module):
    """Projection, operator, projection back."""

    def __init__(self, symbol: str, arch: Architecture) -> None:
        super().__init__()
        H = arch.hidden_size
        self.dense_projection = NormLinear(H, 3 * H)
        self.hyena_proj_conv = Parameters(short_conv_weight=(3 * H, 3))
        self.mixer = Operator(symbol, arch)
        self.dense = nn.Linear(H, H)

    def forward(self, x_BLH: Tensor) -> Tensor:
        u_BEL = self.dense_projection(x_BLH).transpose(1, 2)
        return self.dense(self.mixer(u_BEL, self.hyena_proj_conv.short_conv_weight).transpose(1, 2))


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.num_heads = arch.num_heads
        self.linear_qkv = NormLinear(arch.hidden_size, 3 * arch.hidden_size)
        self.linear_proj = nn.Linear(arch.hidden_size, arch.hidden_size)

    def forward(self, x_BLH: Tensor) -> Tensor:
        qkv_BNLC = self.linear_qkv(x_BLH).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        query, key, value = qkv_BNLC.chunk(3, dim=-1)
        y_BNLC = F.scaled_dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        return self.linear_proj(y_BNLC.transpose(1, 2).flatten(2))


def rotated(x_BNLC: Tensor) -> Tensor:
    """Rotary position embedding of positions 0 .. L - 1; channel c turns with channel c + C / 2."""
    L, C = x_BNLC.shape[-2:]
    angle_LC = torch.outer(torch.arange(L), BASE ** (-torch.arange(0, C, 2) / C)).repeat(1, 2)
    first, second = x_BNLC.chunk(2, dim=-1)
    return x_BNLC * angle_LC.cos() + torch.cat([-second, first], dim=-1) * angle_LC.sin()


class Layer(nn.Module):
    """Mixer or attention, and MLP, each with a residual connection."""

    def __init__(self, symbol: str, arch: Architecture, *, gelu: bool) -> None:
        super().__init__()
        if symbol == "*":
            self.self_attention = Attention(arch)
        else:
            self.mixer = Mixer(symbol, arch)
        self.mlp = GatedMLP(arch, gelu=gelu)

    def forward(self, x_BLH: Tensor) -> Tensor:
        mix = self.mixer if hasattr(self, "mixer") else self.self_attention
        x_BLH = x_BLH + mix(x_BLH)
        return x_BLH + self.mlp(x_BLH)


class PlainModel(nn.Module):
    """The model of an architecture of Arc's kind (tied embedding, GELU in layer 0 only), and its loss.

    Names of parameters are those of our checkpoints.
    """

    def __init__(self, arch: Architecture, num_rows: int, *, recompute_num_layers: int | None) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Module(), nn.Module()
        self.embedding.word_embeddings = nn.Embedding(num_rows, arch.hidden_size)
        layers = [Layer(symbol, arch, gelu=i == 0) for i, symbol in enumerate(arch.pattern)]
        self.decoder.layers = nn.ModuleList(layers)
        self.decoder.final_norm = Parameters(weight=(arch.hidden_size,))
        self.recompute_num_layers = recompute_num_layers

    def forward(self, tokens_BL: Tensor, labels_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Loss in nat, summed over the labels that count."""
        x_BLH = self.embedding.word_embeddings(tokens_BL)
        layers, block = self.decoder.layers, self.recompute_num_layers
        for start in range(0, len(layers), block or len(layers)):
            part = nn.Sequential(*layers[start : start + (block or len(layers))])
            x_BLH = checkpoint(part, x_BLH, use_reentrant=False) if block else part(x_BLH)
        x_BLH = rms_norm(x_BLH, self.decoder.final_norm.weight)
        logits_BLV = F.linear(x_BLH, self.embedding.word_embeddings.weight)
        loss_BL = F.cross_entropy(logits_BLV.flatten(0, 1), to_upper(labels_BL).flatten(), reduction="none")
        weight_BL = mask_BL * torch.where(is_lower(labels_BL), LOWERCASE_WEIGHT, 1.0)
        weight_BL = weight_BL * (mask_BL.sum(1) / weight_BL.sum(1).clamp(min=1.0))[:, None]
        return (loss_BL.view_as(weight_BL) * weight_BL).sum()


class PlainTraining:
    """AdamW with clipping around ``PlainModel``."""

    def __init__(self, model: PlainModel, config: Any) -> None:
        """``config``: Megatron's, for the optimizer's settings."""
        self.model = model
        betas = (config.adam_beta1, config.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=betas, eps=config.adam_eps, weight_decay=config.weight_decay, fused=True
        )
        self.clip_grad = config.clip_grad

    def gradients(self, batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
        """Forward and backward of all micro-batches; returns the loss per label that counts."""
        self.optimizer.zero_grad()
        num_labels, total = sum(mask.sum() for *_, mask in batches), 0.0
        for batch in batches:
            loss = self.model(*batch) / num_labels
            loss.backward()
            total += loss.item()
        return total

    def update(self, lr: float) -> None:
        """Clip the gradients and change the weights."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


def now() -> tuple[float, float]:
    """Seconds of time, and of CPU time of all threads, which neighbours on the machine disturb less."""
    return time.perf_counter(), time.process_time()


class Pairs:
    """A plain step after every step of Megatron Bridge's training loop."""

    def __init__(self, size: str, recompute: str) -> None:
        """Hook into the loop; ``runtime.megatron.enter`` was called."""
        from megatron.bridge.training import train as bridge

        from evo2_megatron.model import forward_step

        self.size, self.recompute = size, recompute
        self.plain: PlainTraining | None = None
        self.batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self.seconds: list[list[tuple[float, float]]] = []
        """By step: time of ours and of the plain model, and CPU time of both."""

        self.losses: list[tuple[float, float]] = []
        self.gradient_error = float("nan")
        self._get_batch, self._train_step = forward_step.get_batch, bridge.train_step
        forward_step.get_batch, bridge.train_step = self.get_batch, self.train_step
        self._since = now()

    def get_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Keep what the run trains on."""
        tokens, labels, mask, *rest = self._get_batch(*args, **kwargs)
        self.batches.append((tokens, labels, mask))
        return tokens, labels, mask, *rest

    def train_step(self, forward_step: Any, data: Any, model: list, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Megatron's step, then the plain one; the time since the last plain step is the loop's."""
        if self.plain is None:
            self._copy(model[0], optimizer)
            self._since = now()
        (lr,) = {group["lr"] for group in optimizer.param_groups}
        self.batches.clear()
        result = self._train_step(forward_step, data, model, optimizer, *args, **kwargs)
        start = now()
        loss = self.plain.gradients(self.batches)
        if not self.losses:
            self._compare_gradients()
        self.plain.update(lr)
        end = now()
        self.seconds.append([(start[i] - self._since[i], end[i] - start[i]) for i in (0, 1)])
        self.losses.append((result[0]["lm loss"].item(), loss))
        self._since = now()
        return result

    def _copy(self, wrapped: nn.Module, optimizer: Any) -> None:
        from evo2_megatron.checkpoint.names import is_weight

        weights = {n.removeprefix("module."): w for n, w in wrapped.state_dict().items() if is_weight(n)}
        arch = architecture(self.size)
        rows = weights["embedding.word_embeddings.weight"].shape[0]
        block = arch.recompute_num_layers if self.recompute == "full" else None
        plain = PlainModel(arch, rows, recompute_num_layers=block)
        plain.load_state_dict(weights)
        self.plain = PlainTraining(plain, optimizer.config)
        step = optimizer.step

        def step_once() -> Any:
            optimizer.step = step
            self._gradients = {
                name.removeprefix("module."): p.main_grad.clone() for name, p in wrapped.named_parameters()
            }
            return step()

        optimizer.step = step_once

    def _compare_gradients(self) -> None:
        named = dict(self.plain.model.named_parameters())
        assert named.keys() == self._gradients.keys()
        self.gradient_error = max(
            ((named[name].grad - ours).abs().max() / named[name].grad.abs().max()).item()
            for name, ours in self._gradients.items()
        )


def worker(folder: Path, run_dir: Path, size: str, length: int, recompute: str, threads: int, timed: int) -> None:
    """Train both on this process; write what was compared and timed."""
    from evo2_megatron.runtime import megatron

    torch.set_num_threads(threads)
    add_hidden_512()
    megatron.enter()
    pairs = Pairs(size, recompute)
    from evo2_megatron.tasks.training.train import train

    # the plain model has one group of parameters
    train(**options(folder, run_dir, size, length, recompute, WARM_UP_STEPS + timed), wd=0.0)
    result = {"gradients": pairs.gradient_error, "losses": pairs.losses, "seconds": pairs.seconds[WARM_UP_STEPS:]}
    (folder / "pairs.json").write_text(json.dumps(result))


def compare(folder: Path, size: str, length: int, recompute: str, *, threads: int, timed: int) -> dict[str, Any]:
    """``worker`` in a process of its own; stops unless both models computed the same."""
    command = [sys.executable, __file__, "--worker", str(folder), tempfile.mkdtemp(dir=folder)]
    command += [size, str(length), recompute, str(threads), str(timed)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"training {size} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result = json.loads((folder / "pairs.json").read_text())
    loss_error = max(abs(ours - plain) for ours, plain in result["losses"])
    if not (result["gradients"] < GRADIENT_TOLERANCE and loss_error < LOSS_TOLERANCE):
        sys.exit(f"{size}: gradients differ by {result['gradients']:.1e}, losses by {loss_error:.1e} nat")
    return result | {"loss_error": loss_error}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, choices=(1_024, 8_192), default=(1_024, 8_192))
    parser.add_argument("--recompute", nargs="+", choices=("none", "full"), default=("none",))
    parser.add_argument("--threads", type=int, default=NUM_THREADS)
    parser.add_argument("--steps", type=int, help="pairs to time (default: fewer the larger they are)")
    parser.add_argument("--worker", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder, run_dir, size, length, recompute, threads, timed = args.worker
        worker(Path(folder), Path(run_dir), size, int(length), recompute, int(threads), int(timed))
        return
    print(f"training beside plain PyTorch, float32, {args.threads} threads; medians, of the cost over the pairs")
    print(f"{'':27} {'tokens per second':>17} {'cost in':>11} {'largest difference of':>22}")
    columns = f"{'ours':>8} {'plain':>8} {'time':>5} {'CPU':>5} {'gradients':>10} {'losses':>11}"
    print(f"{'':10} {'tokens':>6} {'recompute':>9} {columns}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for size in args.sizes:
            for length in args.lengths:
                for recompute in args.recompute:
                    timed = args.steps or STEPS[size, length]
                    result = compare(folder, size, length, recompute, threads=args.threads, timed=timed)
                    tokens = SAMPLES_PER_STEP[length] * length
                    wall, cpu = zip(*result["seconds"], strict=True)
                    ours, plain = (tokens / statistics.median(s) for s in zip(*wall, strict=True))
                    cost, cpu_cost = (statistics.median(o / p for o, p in pairs) for pairs in (wall, cpu))
                    print(
                        f"{size:10} {length:6,} {recompute:>9} {ours:8,.0f} {plain:8,.0f} {cost:5.2f} {cpu_cost:5.2f} "
                        f"{result['gradients']:10.1e} {result['loss_error']:7.1e} nat",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
