# SPDX-License-Identifier: Apache-2.0
"""The sparse autoencoder of the studies, on planted dictionaries and features."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evo2_megatron.config import UserError
from evo2_megatron.data.bed import Interval

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_ATOMS, NUM_CHANNELS, NUM_ACTIVE = 48, 32, 3


@pytest.fixture
def topk(study):
    return study("batch_topk")


@pytest.fixture
def autoencoder(study):
    return study("sparse_autoencoder")


def planted(num_vectors: int):
    """Sums of three of 48 directions in 32 dimensions with an offset; the directions; and which are in which."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(NUM_ATOMS, NUM_CHANNELS, generator=generator), dim=-1)
    chosen = torch.rand(num_vectors, NUM_ATOMS, generator=generator).argsort(1)[:, :NUM_ACTIVE]
    weights = 0.5 + torch.rand(num_vectors, NUM_ACTIVE, generator=generator)
    active = torch.zeros(num_vectors, NUM_ATOMS).scatter(1, chosen, weights)
    return active @ atoms + 0.3, atoms, active


def test_a_planted_dictionary_is_recovered(topk, tmp_path):
    vectors, atoms, active = planted(12_000)
    settings = topk.Settings(num_latents=96, k=NUM_ACTIVE, steps=600, batch_size=512, lr=3e-3)
    model, progress = topk.train(vectors[:10_000], settings)

    cosine, latent = (atoms @ model.decoder_MH.detach().T).max(1)
    assert (cosine > 0.9).float().mean() > 0.9
    report = topk.evaluate(model, vectors[10_000:])
    assert report.explained_variance > 0.9 and abs(report.l0 - NUM_ACTIVE) < 0.5
    assert report.num_latents == 96 and 96 - report.num_dead >= NUM_ATOMS * 0.9
    assert progress[-1].step == 600 and progress[-1].explained_variance > progress[0].explained_variance
    # an atom's latent is on where the atom is, by the threshold and without a batch
    on = model.encode(vectors[10_000:])[:, latent] > 0
    assert ((on == (active[10_000:] > 0)).float().mean(0) > 0.95).float().mean() > 0.9
    torch.testing.assert_close(model.decoder_MH.norm(dim=-1), torch.ones(96))

    topk.save(model, settings, tmp_path / "sae.safetensors", layer=3)
    again = topk.load(tmp_path / "sae.safetensors")
    torch.testing.assert_close(again.encode(vectors[:5]), model.encode(vectors[:5]), rtol=0, atol=0)
    torch.testing.assert_close(again.reconstruct(vectors[:5]), model.reconstruct(vectors[:5]), rtol=0, atol=0)
    from safetensors import safe_open

    with safe_open(tmp_path / "sae.safetensors", "pt") as file:
        assert json.loads(file.metadata()["settings"])["layer"] == 3


def test_dead_latents_come_back(topk):
    """From a start where most latents point away from all vectors, the auxiliary loss brings some back."""
    vectors, _, _ = planted(4_000)
    dead = {}
    for weight in (0.0, 1.0):
        # with a large step all but a few die early
        settings = topk.Settings(
            num_latents=96, k=NUM_ACTIVE, steps=150, batch_size=256, lr=3e-2, aux_weight=weight, dead_after=10
        )
        dead[weight] = topk.evaluate(topk.train(vectors, settings)[0], vectors).num_dead
    assert dead[1.0] < dead[0.0]


def test_batch_topk_keeps_the_largest_of_the_batch(topk):
    latents = torch.tensor([[9.0, 8.0, 7.0, 0.0], [1.0, 0.0, 0.0, 2.0]])
    torch.testing.assert_close(topk.batch_topk(latents, 2), torch.tensor([[9.0, 8, 7, 0], [0, 0, 0, 2]]))
    torch.testing.assert_close(topk.batch_topk(latents, 9), latents)


def test_training_repeats(topk):
    vectors, _, _ = planted(500)
    settings = topk.Settings(num_latents=64, k=3, steps=5, batch_size=64)
    first, second = (topk.train(vectors, settings)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_auxiliary_loss(topk):
    """Only the dead are asked, and the loss is relative to what is left over."""
    model = topk.SparseAutoencoder(4, 3)
    model.decoder_MH.data = torch.eye(4)[:3]
    latents, residual = torch.tensor([[5.0, 2.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0, 0.0]])
    loss = topk._auxiliary_loss(model, latents, torch.tensor([False, True, False]), residual)
    assert float(loss.detach()) == pytest.approx(0.25)
    assert float(topk._auxiliary_loss(model, latents, torch.tensor([False] * 3), residual)) == 0


def test_training_that_diverges_writes_nothing(autoencoder, topk, tmp_path):
    windows = [autoencoder.Window("c", 64 * n, bytes(64)) for n in range(5)]
    vectors = iter(planted(320)[0].numpy().reshape(5, 64, NUM_CHANNELS))

    def embed(sequences):
        return [next(vectors) for _ in sequences]

    settings = topk.Settings(num_latents=8, k=3, steps=5, batch_size=64, lr=1e30)
    with pytest.raises(UserError, match="--lr 1e[+]30; give a smaller one"):
        autoencoder.sparse_autoencoder(embed, windows, tmp_path, settings=settings)
    assert list(tmp_path.iterdir()) == []


def slow_best(latents, mask, thresholds):
    """By trying everything."""
    best = (-1.0, None)
    for latent in range(latents.shape[1]):
        values = latents[:, latent]
        for quantile in thresholds:
            positive = values[values > 0]
            if len(positive):
                marked = values > (np.quantile(positive, quantile) if quantile else 0)
                hits = (marked & mask).sum()
                best = max(best, (2 * hits / (marked.sum() + mask.sum()), -latent))
    return best[0], -best[1]


def test_best_latent_of_a_feature(autoencoder):
    from scipy import sparse

    rng = np.random.default_rng(0)
    mask = rng.random(400) < 0.2
    latents = np.maximum(rng.normal(size=(400, 6)), 0)
    latents[:, 4] = np.where(mask, 2.0, 0.0) * (rng.random(400) < 0.9) + (rng.random(400) < 0.05)
    wanted = slow_best(latents, mask, autoencoder._THRESHOLDS)
    latent, threshold = autoencoder.best_latent(sparse.csc_matrix(latents.astype(np.float32)), mask)
    marked = latents[:, latent] > threshold
    assert latent == wanted[1] == 4
    assert 2 * (marked & mask).sum() / (marked.sum() + mask.sum()) == pytest.approx(wanted[0])


def test_features_are_measured_on_other_bases_than_they_were_chosen_on(autoencoder):
    from scipy import sparse

    train, held_out = np.zeros((8, 3)), np.zeros((8, 3))
    train[:4, 1], held_out[2:6, 1] = 1, 1
    train[:3, 2], held_out[:4, 2] = 1, 1  # would win on the held-out ones
    mask = np.arange(8) < 4
    (found,) = autoencoder.match(*map(sparse.csc_matrix, (train, held_out)), {"f": mask}, {"f": mask})
    assert found == ("f", 4, 1, 0.0, 0.5, 0.5, 0.5, pytest.approx(2 / 3))
    nowhere = {"f": np.zeros(8, bool)}
    assert autoencoder.match(*map(sparse.csc_matrix, (train, held_out)), {"f": mask}, nowhere) == []


def test_windows_and_features(autoencoder):
    genome = {"a": b"ACGT" * 10, "b": b"ACGTN" * 8 + b"ACGT" * 5}
    windows = autoencoder.draw_windows(genome, 4, 100, seed=1)
    assert len(windows) == 10 + 2 + 5 and len(set(windows)) == 17
    assert all(w.sequence == genome[w.contig][w.start : w.start + 4] == b"ACGT" for w in windows)
    features = [Interval("a", 2, 6, "f", "+"), Interval("b", 0, 9, "f", "+"), Interval("a", 38, 40, "g", "-")]
    masks = autoencoder.feature_masks(features, windows)
    for name in ("f", "g"):
        wanted = [
            any(f.name == name and f.contig == w.contig and f.start <= w.start + i < f.end for f in features)
            for w in windows
            for i in range(4)
        ]
        assert masks[name].tolist() == wanted
    with pytest.raises(UserError, match="4 windows of 10 bases are too few"):
        autoencoder.draw_windows({"a": b"A" * 40}, 10, 100, seed=1)
