# SPDX-License-Identifier: Apache-2.0
"""What the quickstart reached: loss on held-out windows, speed, a generated sequence, and the loss curve as a picture.

Usage: python quickstart_report.py FOLDER    (the folder that quickstart.sh has filled)
"""

import csv
import json
import math
import statistics
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from quickstart_windows import read_documents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BASES = b"ACGT"
UNIFORM = math.log(len(BASES))
ORDER = 5
PRIOR_WEIGHT = 32  # observations that the next shorter context's estimate counts for


def base_numbers(document: str) -> np.ndarray:
    """0 to 3 for A, C, G and T."""
    table = np.full(256, -1)
    table[list(BASES)] = range(len(BASES))
    return table[list(document.encode())]


def markov_chain(documents: list[str], order: int) -> list[np.ndarray]:
    """Probabilities [4**k, 4] of the next base after k bases, for k = 0 to ``order``.

    Counts, smoothed towards the estimate for the context without its oldest base (a Dirichlet prior); the shortest
    towards 1/4.
    """
    tables, shorter = [], np.full((1, 4), 1 / 4)
    for k in range(order + 1):
        count = np.zeros((4**k, 4))
        for document in documents:
            bases = base_numbers(document)
            # the k bases before each, oldest first, as one number in base 4
            context = sum(4 ** (k - 1 - lag) * bases[lag : len(bases) - k + lag] for lag in range(k))
            np.add.at(count, (context, bases[k:]), 1)
        prior = np.tile(shorter, (len(count) // len(shorter), 1))
        shorter = (count + PRIOR_WEIGHT * prior) / (count.sum(axis=1, keepdims=True) + PRIOR_WEIGHT)
        tables.append(shorter)
    return tables


def markov_loss(tables: list[np.ndarray], windows: list[str]) -> float:
    """Mean negative log-likelihood in nat per base, of every base: the first ones have shorter contexts."""
    total, order = 0.0, len(tables) - 1
    for window in windows:
        context = 0
        for position, base in enumerate(base_numbers(window)):
            k = min(position, order)
            total -= math.log(tables[k][context % 4**k, base])
            context = (4 * context + base) % 4**order
    return total / sum(map(len, windows))


def model_loss(predictions: Path) -> float:
    """The same of the model, from the table that predict_evo2 writes."""
    with (predictions / "scores.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    lengths = [int(row["length"]) for row in rows]
    return -sum(n * float(row["mean_log_likelihood"]) for n, row in zip(lengths, rows)) / sum(lengths)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Steps and values of one TensorBoard curve."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def draw(logs: Path, markov: float, output: Path) -> None:
    """The loss curve, with the lines to beat."""
    train = scalars(logs, "lm loss")
    held_out = sorted(dict(scalars(logs, "lm loss validation")).items())  # the last step is evaluated twice
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*zip(*train), color="0.7", linewidth=1, label="training batch")
    axes.plot(*zip(*held_out), color="tab:blue", marker="o", markersize=4, label="held-out windows")
    axes.axhline(UNIFORM, color="black", linestyle="--", linewidth=1, label=f"uniform, {UNIFORM:.3f}")
    axes.axhline(markov, color="tab:red", linestyle=":", label=f"order-{ORDER} Markov chain, {markov:.3f}")
    # it starts at log(256): what matters happens below 1.6
    lowest = min(value for _, value in train + held_out)
    axes.set(ylim=(lowest - 0.02, 1.6), xlabel="optimizer step", ylabel="loss (nat per base)")
    axes.set_title(f"evo2_tiny on phage lambda (starts at {train[0][1]:.2f})")
    axes.legend()
    figure.savefig(output, dpi=120)


def main(folder: str) -> int:
    """Print the table; status 1 if the model has not learned anything."""
    out = Path(folder)
    prefix = out / "data" / "lambda_nucleotide_fast_tokenizer_256"
    windows = read_documents(f"{prefix}_val")[::2]
    markov = markov_loss(markov_chain(read_documents(f"{prefix}_train"), ORDER), windows)
    before, after = model_loss(out / "before"), model_loss(out / "after")
    logs = out / "run" / "tb_logs"
    steps, tokens = scalars(logs, "time/tokens")[-1]
    rate = tokens / steps / statistics.median(seconds for _, seconds in scalars(logs, "iteration-time"))
    record = json.loads((out / "generated.jsonl").read_text())
    draw(logs, markov, out / "loss.png")

    print(f"Loss on {sum(map(len, windows)):,} held-out bases, in nat per base")
    for name, loss in {
        "the model before training": before,
        "uniform over A, C, G, T": UNIFORM,
        f"Markov chain of order {ORDER}": markov,
        f"the model after {steps} steps": after,
    }.items():
        print(f"    {name:<28}{loss:7.4f}")
    print(f"Training: {tokens:,.0f} tokens at {rate:,.0f} tokens per second")
    print(f"Generated after {record['usage']['prompt_tokens']} held-out bases:")
    print(textwrap.indent("\n".join(textwrap.wrap(record["completion"], 80)), "    "))
    print(f"Loss curve: {out / 'loss.png'}")
    return 0 if after < UNIFORM else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
