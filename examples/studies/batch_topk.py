# SPDX-License-Identifier: Apache-2.0
"""A Batch-TopK sparse autoencoder (Bussmann, Leask and Nanda, 2024, arXiv:2412.06410).

Vectors become sums of few of many learned directions. In training, of all latents of a batch of B vectors the B * k
largest are kept, so that a vector may have more or fewer than k. Afterwards a threshold decides, the mean over batches
of the smallest that was kept: a vector's latents then do not depend on its batch. Latents that have not been kept for
long are dead; an auxiliary loss makes them explain what is left over, by which they come back.

Shape legend: B vectors of a batch, N vectors, H channels, M latents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

_THRESHOLD_MOMENTUM = 0.99


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Of the autoencoder and its training."""

    num_latents: int
    k: int
    """Latents per vector, on average."""
    steps: int = 2000
    batch_size: int = 1024
    """Vectors."""
    lr: float = 1e-3
    aux_weight: float = 1 / 32
    """Of the auxiliary loss."""
    dead_after: int = 50
    """Steps without being kept after which a latent is dead."""
    seed: int = 1


class SparseAutoencoder(nn.Module):
    """Encoder, decoder with directions of length 1, and the threshold."""

    def __init__(self, num_channels: int, num_latents: int) -> None:
        super().__init__()
        direction_MH = nn.functional.normalize(torch.randn(num_latents, num_channels), dim=-1)
        self.decoder_MH = nn.Parameter(direction_MH)
        self.encoder_HM = nn.Parameter(direction_MH.T.clone())
        self.encoder_bias_M = nn.Parameter(torch.zeros(num_latents))
        self.decoder_bias_H = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        """Vectors are multiplied by this first, so that their mean square is 1 per channel."""

    def activations(self, x_BH: Tensor) -> Tensor:
        """All latents before any is dropped, of scaled vectors; 0 or more, [B, M]."""
        return torch.relu((x_BH - self.decoder_bias_H) @ self.encoder_HM + self.encoder_bias_M)

    def decode(self, latent_BM: Tensor) -> Tensor:
        """Scaled vectors [B, H]."""
        return latent_BM @ self.decoder_MH + self.decoder_bias_H

    def encode(self, x_BH: Tensor) -> Tensor:
        """Latents [B, M] of vectors as they come from the model: those above the threshold, the others 0."""
        latent_BM = self.activations(x_BH * self.scale)
        return torch.where(latent_BM > self.threshold, latent_BM, 0.0)

    def reconstruct(self, x_BH: Tensor) -> Tensor:
        """Vectors [B, H] from their latents, as they come from the model."""
        return self.decode(self.encode(x_BH)) / self.scale


def batch_topk(latent_BM: Tensor, k: int) -> Tensor:
    """Keep the B * k largest of a batch, the others are 0. Zeros do not count, so there may be fewer."""
    num_kept = min(k * latent_BM.shape[0], latent_BM.numel())
    flat = latent_BM.flatten()
    values, where = flat.topk(num_kept, sorted=False)
    return torch.zeros_like(flat).scatter(0, where, values).view_as(latent_BM)


def _auxiliary_loss(model: SparseAutoencoder, latent_BM: Tensor, dead_M: Tensor, residual_BH: Tensor) -> Tensor:
    """Mean square of what the dead latents leave of the residual, relative to the residual's."""
    dead = dead_M.nonzero().flatten()
    if not len(dead):
        return residual_BH.new_zeros(())
    of_dead = latent_BM[:, dead]
    # half as many as there are channels, as in the paper on TopK autoencoders
    most = min(residual_BH.shape[1] // 2, len(dead))
    if most < len(dead):
        values, where = of_dead.topk(most, dim=-1, sorted=False)
        of_dead = torch.zeros_like(of_dead).scatter(1, where, values)
    explained_BH = of_dead @ model.decoder_MH[dead]
    return (explained_BH - residual_BH).pow(2).mean() / residual_BH.pow(2).mean().clamp(min=1e-12)


class Progress(NamedTuple):
    """Training at one step."""

    step: int
    explained_variance: float
    """Of the batch."""
    num_dead: int


def train(vectors_NH: Tensor, settings: Settings) -> tuple[SparseAutoencoder, list[Progress]]:
    """Train an autoencoder on vectors, on their device.

    Args:
        vectors_NH: Float32; batches are drawn from them at random.
        settings: Sizes and duration.

    Returns:
        The model in evaluation mode, and a hundred points of its progress.
    """
    device = vectors_NH.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = SparseAutoencoder(vectors_NH.shape[1], settings.num_latents).to(device)
    with torch.no_grad():
        model.scale.copy_(vectors_NH.pow(2).mean().rsqrt())
        model.decoder_bias_H.copy_(vectors_NH.mean(0) * model.scale)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, betas=(0.9, 0.99))
    # the last fifth comes to rest, without which directions keep trembling
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, 5 * (1 - n / settings.steps)))
    unused_M = torch.zeros(settings.num_latents, device=device)
    progress = []
    for step, x_BH in enumerate(_batches(vectors_NH, settings)):
        x_BH = x_BH * model.scale
        latent_BM = model.activations(x_BH)
        kept_BM = batch_topk(latent_BM, settings.k)
        residual_BH = x_BH - model.decode(kept_BM)
        loss = residual_BH.pow(2).mean()
        dead_M = unused_M > settings.dead_after
        (loss + settings.aux_weight * _auxiliary_loss(model, latent_BM, dead_M, residual_BH.detach())).backward()
        _step(model, optimizer)
        schedule.step()
        with torch.no_grad():
            unused_M = torch.where((kept_BM > 0).any(0), 0, unused_M + 1)
            _update_threshold(model, kept_BM, first=step == 0)
            if step % max(1, settings.steps // 100) == 0 or step == settings.steps - 1:
                progress.append(Progress(step + 1, explained_variance(x_BH, residual_BH), int(dead_M.sum())))
    return model.eval(), progress


def _batches(vectors_NH: Tensor, settings: Settings) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch_size, len(vectors_NH))
    for _ in range(settings.steps):
        yield vectors_NH[torch.randint(len(vectors_NH), (size,), generator=generator).to(vectors_NH.device)]


def _step(model: SparseAutoencoder, optimizer: torch.optim.Optimizer) -> None:
    """One step in which the directions keep their length of 1."""
    with torch.no_grad():
        direction_MH, gradient_MH = model.decoder_MH, model.decoder_MH.grad
        gradient_MH -= (gradient_MH * direction_MH).sum(-1, keepdim=True) * direction_MH
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model.decoder_MH.copy_(nn.functional.normalize(model.decoder_MH, dim=-1))


def _update_threshold(model: SparseAutoencoder, kept_BM: Tensor, *, first: bool) -> None:
    positive = kept_BM[kept_BM > 0]
    if len(positive):
        smallest = positive.min()
        model.threshold.copy_(smallest if first else model.threshold.lerp(smallest, 1 - _THRESHOLD_MOMENTUM))


def explained_variance(x_NH: Tensor, residual_NH: Tensor) -> float:
    """1 minus the residual's mean square over the variance of the vectors."""
    variance = (x_NH - x_NH.mean(0)).pow(2).mean()
    return float(1 - residual_NH.pow(2).mean() / variance)


class Report(NamedTuple):
    """An autoencoder on vectors, by its threshold."""

    num_vectors: int
    explained_variance: float
    l0: float
    """Mean number of latents that are not 0."""
    num_latents: int
    num_dead: int
    """Latents that are 0 for all of the vectors."""


@torch.no_grad()
def evaluate(model: SparseAutoencoder, vectors_NH: Tensor, *, batch_size: int = 4096) -> Report:
    """Measure on vectors, best on others than those of training."""
    l0, squares = 0, 0.0
    used_M = torch.zeros(model.decoder_MH.shape[0], dtype=torch.bool, device=vectors_NH.device)
    for x_BH in vectors_NH.split(batch_size):
        latent_BM = model.encode(x_BH)
        l0 += int((latent_BM > 0).sum())
        used_M |= (latent_BM > 0).any(0)
        squares += float((x_BH - model.decode(latent_BM) / model.scale).double().pow(2).sum())
    variance = float((vectors_NH - vectors_NH.mean(0)).pow(2).mean())
    return Report(
        len(vectors_NH),
        1 - squares / vectors_NH.numel() / variance,
        l0 / len(vectors_NH),
        len(used_M),
        int((~used_M).sum()),
    )


def save(model: SparseAutoencoder, settings: Settings, path: Path, **about: str | int) -> None:
    """Write the tensors by the names above, and the settings as metadata, to a safetensors file."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"settings": json.dumps(asdict(settings) | about)})


def load(path: Path) -> SparseAutoencoder:
    """What ``save`` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    num_latents, num_channels = tensors["decoder_MH"].shape
    model = SparseAutoencoder(num_channels, num_latents)
    model.load_state_dict(tensors)
    return model.eval()
