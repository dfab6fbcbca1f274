# SPDX-License-Identifier: Apache-2.0
"""Train a Batch-TopK sparse autoencoder on the hidden states of one layer, and ask what its latents stand for.

Windows are drawn at random from a genome; a fifth of them is kept from training. Written are the autoencoder, what it
explains of the held-out windows, and, for each kind of annotated feature, the latent that marks it best by F1. The
latent and its threshold are chosen on the windows of training and measured on the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import harness
import numpy as np
from annotation import covered

from evo2_megatron.cli import groups
from evo2_megatron.config import UserError
from evo2_megatron.data.bed import Interval, check_within, read_bed
from evo2_megatron.tasks.transfer import disk_errors, new_files

if TYPE_CHECKING:
    import torch
    from batch_topk import Progress, Report, Settings, SparseAutoencoder

NAME = "sparse_autoencoder.py"
_THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 0.9)
"""Quantiles of a latent's positive values above which it is taken to mark a base."""


class Window(NamedTuple):
    """A piece of the genome that the model sees at a time."""

    contig: str
    start: int
    sequence: bytes


class Match(NamedTuple):
    """The latent that marks a feature best."""

    feature: str
    num_bases: int
    """Held-out bases of the feature."""
    latent: int
    threshold: float
    """The latent is over it: in scaled units."""
    precision: float
    recall: float
    f1: float
    """Of the held-out bases."""
    chance: float
    """F1 of marking every held-out base."""


def draw_windows(genome: Mapping[str, bytes], length: int, count: int, seed: int) -> list[Window]:
    """Up to ``count`` windows of one length at random, none twice, none overlapping, none with N.

    Raises:
        UserError: There are fewer than five.
    """
    places = [
        Window(contig, start, bases[start : start + length])
        for contig, bases in genome.items()
        for start in range(0, len(bases) - length + 1, length)
        if b"N" not in bases[start : start + length]
    ]
    if min(len(places), count) < 5:
        raise UserError(
            f"{min(len(places), count)} windows of {length} bases are too few; make --window shorter, or --num-bases "
            "larger"
        )
    order = np.random.default_rng(seed).permutation(len(places))[:count]
    return [places[place] for place in order]


def hidden_states(embed: harness.Embed, windows: Sequence[Window]) -> torch.Tensor:
    """Of all bases of the windows, float32 [N, H], in their order."""
    import torch

    return torch.from_numpy(np.concatenate(list(embed([window.sequence for window in windows]))))


def feature_masks(features: Sequence[Interval], windows: Sequence[Window]) -> dict[str, np.ndarray]:
    """For each name of a feature, bool [N]: which bases of the windows it covers."""
    names = dict.fromkeys(feature.name for feature in features)
    result: dict[str, np.ndarray] = {}
    for name in names:
        parts = []
        for window in windows:
            end = window.start + len(window.sequence)
            inside = [
                Interval(f.contig, max(f.start - window.start, 0), f.end - window.start, name, f.strand)
                for f in features
                if f.name == name and f.contig == window.contig and f.start < end and f.end > window.start
            ]
            parts.append(covered(inside, len(window.sequence)))
        result[name] = np.concatenate(parts)
    return result


def encode_all(model: SparseAutoencoder, vectors_NH: torch.Tensor, batch_size: int = 4096):
    """Latents of all vectors as a sparse matrix of SciPy, float32 [N, M], by column."""
    import torch
    from scipy import sparse

    with torch.no_grad():
        parts = [sparse.csr_matrix(model.encode(x_BH).cpu().numpy()) for x_BH in vectors_NH.split(batch_size)]
    return sparse.vstack(parts).tocsc()


def f1_of(hits: np.ndarray, marked: np.ndarray, positives: int) -> np.ndarray:
    """2 hits / (marked + positives), 0 where nothing is."""
    return 2 * hits / np.maximum(marked + positives, 1)


def best_latent(latents, mask: np.ndarray) -> tuple[int, float]:
    """Latent and threshold of the highest F1; ``latents`` is what ``encode_all`` gives, ``mask`` bool [N]."""
    best = (-1.0, 0, 0.0)
    positives = int(mask.sum())
    for latent in np.flatnonzero(np.diff(latents.indptr)):
        span = slice(latents.indptr[latent], latents.indptr[latent + 1])
        values, hit = latents.data[span], mask[latents.indices[span]]
        for quantile in _THRESHOLDS:
            threshold = float(np.quantile(values, quantile)) if quantile else 0.0
            over = values > threshold
            f1 = float(f1_of((over & hit).sum(), over.sum(), positives))
            if f1 > best[0]:
                best = (f1, int(latent), threshold)
    return best[1], best[2]


def match(train, held_out, train_masks: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]) -> list[Match]:
    """Best latent of each feature that occurs in both parts, the best first.

    Args:
        train, held_out: Latents, as ``encode_all`` gives them: to choose on, to measure on.
        train_masks, masks: Which bases each feature covers in the two.
    """
    matches = []
    for name, mask in masks.items():
        if not mask.any() or not train_masks[name].any():
            continue
        latent, threshold = best_latent(train, train_masks[name])
        marked = np.asarray(held_out[:, [latent]].todense()).ravel() > threshold
        hits, positives = int((marked & mask).sum()), int(mask.sum())
        precision, recall = hits / max(int(marked.sum()), 1), hits / positives
        f1 = float(f1_of(hits, marked.sum(), positives))
        chance = float(f1_of(positives, len(mask), positives))
        matches.append(Match(name, positives, latent, threshold, precision, recall, f1, chance))
    return sorted(matches, key=lambda m: -m.f1)


def sparse_autoencoder(
    embed: harness.Embed,
    windows: Sequence[Window],
    output_dir: Path,
    *,
    settings: Settings,
    features: Sequence[Interval] = (),
    device: str = "cpu",
    about: Mapping[str, str | int] | None = None,
) -> tuple[Report, list[Match]]:
    """Train, measure, and write ``sparse_autoencoder.safetensors``, its ``.png`` and tables.

    Args:
        embed: Hidden states of bases.
        windows: Every fifth is kept from training.
        output_dir: Where to write.
        settings: Of the autoencoder.
        features: Annotated intervals; those of one name are one feature.
        device: Of the autoencoder.
        about: Written beside the settings into the file.

    Raises:
        UserError: Training diverged.
    """
    import batch_topk

    parts = ([w for n, w in enumerate(windows) if n % 5], windows[::5])
    train_NH, held_out_NH = (hidden_states(embed, part).to(device) for part in parts)
    model, progress = batch_topk.train(train_NH, settings)
    if not all(values.isfinite().all() for values in model.state_dict().values()):
        raise UserError(f"the autoencoder is not finite after training with --lr {settings.lr:g}; give a smaller one")
    report = batch_topk.evaluate(model, held_out_NH)
    matches: list[Match] = []
    if features:
        latents = [encode_all(model, vectors_NH) for vectors_NH in (train_NH, held_out_NH)]
        matches = match(*latents, *(feature_masks(features, part) for part in parts))
    with disk_errors(), new_files([output_dir / "sparse_autoencoder.safetensors"]) as (partial,):
        batch_topk.save(model, settings, partial, **(about or {}))
    harness.write_table(output_dir / "sparse_autoencoder.tsv", report._fields, [report])
    if features:
        columns = ("feature", "num_bases", "latent", "threshold", "precision", "recall", "f1", "f1_of_all_bases")
        harness.write_table(output_dir / "sparse_autoencoder_features.tsv", columns, matches)
    frequency = (encode_all(model, held_out_NH) > 0).mean(axis=0)
    draw(progress, np.asarray(frequency).ravel(), report, matches, output_dir / "sparse_autoencoder.png")
    return report, matches


def draw(
    progress: Sequence[Progress], frequency: np.ndarray, report: Report, matches: Sequence[Match], path: Path
) -> None:
    """Training, how often latents are on, and features."""
    plt = harness.pyplot()
    count = 3 if matches else 2
    figure, axes = plt.subplots(1, count, figsize=(5 * count, 4.2), layout="constrained")
    axes[0].plot([p.step for p in progress], [p.explained_variance for p in progress], color="C0")
    axes[0].axhline(report.explained_variance, color="C0", linestyle="--", linewidth=1, label="held-out, at the end")
    axes[0].set_ylim(min(0.0, report.explained_variance), 1.02)
    axes[0].set_xlabel("step")
    axes[0].set_ylabel("explained variance")
    axes[0].set_title(f"held-out: {report.explained_variance:.3f} explained by {report.l0:.1f} latents per base")
    axes[0].legend(frameon=False, loc="lower right")
    alive = frequency[frequency > 0]
    axes[1].hist(np.log10(alive), bins=40, color="C2")
    axes[1].set_xlabel("log10(share of held-out bases with the latent)")
    axes[1].set_ylabel("latents")
    axes[1].set_title(f"{len(alive):,} latents; {report.num_dead:,} of {report.num_latents:,} are dead")
    if matches:
        shown = matches[:20][::-1]
        axes[2].barh(range(len(shown)), [m.f1 for m in shown], color="C1", label="best latent")
        ticks = range(len(shown))
        axes[2].scatter([m.chance for m in shown], ticks, color="black", marker="|", s=120, label="marking all bases")
        axes[2].set_yticks(ticks, [f"{m.feature} (latent {m.latent})" for m in shown])
        axes[2].set_xlim(0, 1)
        axes[2].set_ylim(-2, max(len(shown), 3))  # -2: room for the legend
        axes[2].set_xlabel("F1, held-out bases")
        axes[2].set_title("latents and annotated features")
        axes[2].legend(frameon=False, fontsize="small", loc="lower right")
    for panel in axes:
        panel.title.set_fontsize(10)
        harness.tidy(panel)
    harness.save_figure(figure, path)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = harness.parser(NAME, __doc__)
    parser.add_argument("--fasta", type=Path, required=True, metavar="FILE", help="genome, plain or gzip")
    parser.add_argument("--layer", type=int, required=True, metavar="N", help="0 is the first, -1 the last")
    parser.add_argument(
        "--features", type=Path, metavar="FILE", help="BED; intervals of one name are one feature (default: none)"
    )
    numbers = (
        ("--window", 1024, "bases that the model sees at a time"),
        ("--num-bases", 200_000, "most bases whose hidden states are kept, 4 bytes per channel each"),
        ("--num-latents", 4096, "directions to learn"),
        ("--k", 32, "latents per base, on average"),
        ("--steps", 2000, "of training"),
        ("--batch-size", 1024, "bases per step"),
        ("--seed", 1, "of windows, start and batches"),
    )
    for flag, default, meaning in numbers:
        parser.add_argument(
            flag, type=groups.positive_int, default=default, metavar="N", help=f"{meaning} (default: {default})"
        )
    parser.add_argument(
        "--lr", type=groups.positive_float, default=1e-3, metavar="X", help="learning rate of Adam (default: 0.001)"
    )
    return parser


def main() -> None:
    """Entry point."""
    args = build_parser().parse_args()

    def work() -> None:
        harness.check_output_dir(args.output_dir)
        if args.k >= args.num_latents:
            raise UserError(f"--k {args.k} of --num-latents {args.num_latents} is not sparse; give a smaller --k")
        genome = harness.read_genome(args.fasta)
        features = read_bed(args.features, named=True) if args.features else []
        check_within(features, harness.lengths(genome), args.features)
        windows = draw_windows(genome, args.window, args.num_bases // args.window, args.seed)

        from batch_topk import Settings

        from evo2_megatron.runtime import megatron

        chosen = {name: vars(args)[name] for name in ("num_latents", "k", "steps", "batch_size", "lr", "seed")}
        of_model = {"layers": [args.layer], "max_batch_tokens": args.max_batch_tokens}
        with harness.open_model(args.ckpt_dir, longest=args.window, **of_model) as model:
            report, _ = sparse_autoencoder(
                model.embed,
                windows,
                args.output_dir,
                settings=Settings(**chosen),
                features=features,
                device=str(megatron.device()),
                about={"layer": args.layer, "checkpoint": str(args.ckpt_dir)},
            )
        print(f"explained variance {report.explained_variance:.4f}, L0 {report.l0:.2f}, {report.num_dead} dead")

    harness.run(NAME, work)


if __name__ == "__main__":
    main()
