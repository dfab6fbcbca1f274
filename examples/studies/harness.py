# SPDX-License-Identifier: Apache-2.0
"""What the studies share: a trained model as functions of sequences, and results that are whole or not there.

A study's core takes functions of sequences, not a model, so that a test can hand it one whose answer is known.

Shape legend: L bases of a sequence, H channels.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from evo2_megatron.cli import command, groups
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.tasks.transfer import disk_errors, new_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evo2_megatron.checkpoint.load import LoadedModel

BASES = "ACGT"

Score = Callable[[Sequence[bytes]], np.ndarray]
"""Sequences to log-likelihoods in nat, float64."""

LogProbs = Callable[[Sequence[bytes]], list[np.ndarray]]
"""Sequences to log-probabilities in nat, float32 [L]: of each base after those before it. The first has none: 0."""

Distributions = Callable[[Sequence[bytes]], list[np.ndarray]]
"""Sequences to log-probabilities in nat, float32 [L, 4]: in row t those of A, C, G, T (summing to 1) as the base at t
after those before it. The first row, before which nothing is, has ln 1/4."""

Embed = Callable[[Sequence[bytes]], Iterable[np.ndarray]]
"""Sequences to hidden states, float32 [L, H] each, in their order."""


FirstOrder = Callable[[bytes], np.ndarray]
"""A sequence to float32 [2, L, 4], nat: by how much A, C, G and T in place of the base at t change the log-probability
of that base, which is exact, and to first order those of all bases behind it. 0 for the base that is there."""

Pooling = Literal["mean", "last"] | range
"""Of the hidden states of a sequence: the mean of all, the last one's, or the mean of those at these positions."""


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """With the flags that every study has."""
    made = command.Parser(name, description)
    made.add_argument(
        "--ckpt-dir", type=Path, required=True, metavar="DIR", help="Megatron Bridge checkpoint, or a folder of them"
    )
    made.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="folder for tables and pictures")
    made.add_argument(
        "--max-batch-tokens",
        type=groups.positive_int,
        metavar="N",
        help="most tokens per forward pass (default: 65536, and 2048 without a GPU)",
    )
    return made


def add_region(parser: argparse.ArgumentParser) -> None:
    """Flags ``--fasta``, ``--contig``, ``--start``, ``--end`` and ``--context``."""
    parser.add_argument("--fasta", type=Path, required=True, metavar="FILE", help="genome, plain or gzip")
    parser.add_argument("--contig", required=True, metavar="NAME", help="where the region is")
    parser.add_argument("--start", type=int, required=True, metavar="N", help="its first base, 0-based")
    parser.add_argument("--end", type=int, required=True, metavar="N", help="its end, excluded")
    parser.add_argument(
        "--context",
        type=groups.positive_int,
        default=500,
        metavar="N",
        help="bases on each side that the model sees, too (default: 500)",
    )


def run(name: str, main: Callable[[], None]) -> None:
    """Call ``main``; a UserError becomes one line on stderr and exit status 2."""
    command.set_up_logging()
    command.run(name, lambda _: main())


class Model:
    """A loaded model; ``log_probs``, ``distributions`` and ``embed`` are what the studies' cores take."""

    def __init__(self, loaded: LoadedModel, layers: Sequence[int], max_batch_tokens: int | None) -> None:
        """``layers``: of embeddings, counted from 0, ascending, to the last of ``loaded``; none: for scores."""
        from evo2_megatron.tasks.scoring.batching import batch_tokens

        self._loaded, self.layers = loaded, list(layers)
        self._max_tokens = max_batch_tokens or batch_tokens()

    def log_probs(self, sequences: Sequence[bytes]) -> list[np.ndarray]:
        """``LogProbs``."""
        from evo2_megatron.tasks.scoring.prediction_settings import Output

        results: list[np.ndarray] = [np.zeros(0, np.float32)] * len(sequences)
        for indices, batch in self._batches(sequences, Output(log_probs="per_token")):
            for row, index in enumerate(indices):
                values = batch["log_probs_seqs"][row, : len(sequences[index]) - 1].numpy()
                results[index] = np.concatenate([np.zeros(1, np.float32), values])
        return results

    def log_likelihoods(self, sequences: Sequence[bytes]) -> np.ndarray:
        """Sums of ``log_probs`` in nat, float64, one per sequence."""
        from evo2_megatron.tasks.scoring.prediction_settings import Output

        results = np.zeros(len(sequences))
        for indices, batch in self._batches(sequences, Output(log_probs="sum")):
            results[indices] = batch["log_likelihood"].numpy()
        return results

    def distributions(self, sequences: Sequence[bytes]) -> list[np.ndarray]:
        """``Distributions``; the logits of all tokens of a batch exist at a time."""
        from evo2_megatron.tasks.scoring.prediction_settings import Output

        letters = list(BASES.encode())
        results: list[np.ndarray] = [np.zeros(0)] * len(sequences)
        for indices, batch in self._batches(sequences, Output()):
            rows_BL4 = batch["token_logits"][..., letters].float().log_softmax(-1).numpy()
            for row, index in enumerate(indices):
                first = np.full((1, len(BASES)), -np.log(len(BASES)), np.float32)
                results[index] = np.concatenate([first, rows_BL4[row, : len(sequences[index]) - 1]])
        return results

    def embed(self, sequences: Sequence[bytes]) -> list[np.ndarray]:
        """``Embed``, after the layer that the model was opened with."""
        from evo2_megatron.tasks.scoring.prediction_settings import Output

        (layer,) = self.layers
        results: list[np.ndarray] = [np.zeros(0)] * len(sequences)
        output = Output(embedding_layers=(layer,))
        for indices, batch in self._batches(sequences, output):
            for row, index in enumerate(indices):
                results[index] = batch[output.hidden_name(layer)][row, : len(sequences[index])].numpy()
        return results

    def pooled(self, sequences: Sequence[bytes], pooling: Pooling) -> dict[int, np.ndarray]:
        """Of each layer, float32 [sequences, H]."""
        from evo2_megatron.tasks.scoring.prediction_settings import Output, Window

        how = Window(pooling.start + 1, pooling.stop) if isinstance(pooling, range) else pooling
        output = Output(embedding_layers=tuple(self.layers), pooling=how)
        size = self._loaded.provider.hidden_size
        results = {layer: np.zeros((len(sequences), size), np.float32) for layer in self.layers}
        for indices, batch in self._batches(sequences, output):
            for layer, values in results.items():
                values[indices] = batch[output.hidden_name(layer)].numpy()
        return results

    def first_order(self, sequence: bytes) -> np.ndarray:
        """``FirstOrder``, by one pass forwards and one backwards, whose activations are all in memory."""
        import torch

        from evo2_megatron.data.tokenizer import encode_sequence

        model = self._loaded.model.requires_grad_(False)
        embedding, letters = model.embedding.word_embeddings, list(BASES.encode())
        seen: list[torch.Tensor] = []
        hook = embedding.register_forward_hook(lambda *call: seen.append(call[-1].requires_grad_()) or call[-1])
        ids_L = torch.tensor(list(encode_sequence(sequence.upper(), name="a window")), device=embedding.weight.device)
        with torch.enable_grad():
            log_probs_LV = model(ids_L[None], None, None)[0].float().log_softmax(-1)
            of_next_L = log_probs_LV[:-1].gather(1, ids_L[1:, None])
            of_next_L.sum().backward()
        hook.remove()
        result_2L4 = torch.zeros(2, len(ids_L), len(letters))
        result_2L4[0, 1:] = (log_probs_LV[:-1, letters] - of_next_L).detach()
        grad_LH, table_VH = seen[0].grad[0].float(), embedding.weight.float()
        result_2L4[1] = grad_LH @ table_VH[letters].T - (grad_LH * table_VH[ids_L]).sum(-1, keepdim=True)
        return result_2L4.numpy()

    def _batches(self, sequences: Sequence[bytes], output) -> Iterator[tuple[list[int], dict]]:
        from tqdm import tqdm

        from evo2_megatron.data.fasta_dataset import make_sample
        from evo2_megatron.data.tokenizer import encode_sequence
        from evo2_megatron.tasks.scoring.batching import Backoff, plan_batches
        from evo2_megatron.tasks.scoring.prediction_runner import Runner

        runner = Runner(self._loaded.model, output, precision=self._loaded.precision, layers=self.layers)
        forward = Backoff(runner, can_split=True)
        lengths = [len(sequence) for sequence in sequences]
        for indices in tqdm(
            plan_batches(lengths, max_tokens=self._max_tokens), unit="batch", disable=None, leave=False
        ):
            tokens = [encode_sequence(sequences[index].upper(), name="a window") for index in indices]
            yield indices, forward([make_sample(ids, index) for ids, index in zip(tokens, indices)])


@contextlib.contextmanager
def open_model(
    ckpt_dir: Path,
    *,
    longest: int,
    layers: Sequence[int] | Literal["all"] = (),
    max_batch_tokens: int | None = None,
) -> Iterator[Model]:
    """Load a model in this process, on the GPU if there is one.

    Args:
        ckpt_dir: Checkpoint.
        longest: Bases of the longest sequence that it will see.
        layers: For ``pooled``, and one for ``embed``: counted from 0, or from -1 backwards; later layers are not
            loaded. None: for scores.
        max_batch_tokens: Most tokens per forward pass; None: what suits the device.

    Raises:
        UserError: No such checkpoint or layer; sequences longer than those of its training; or started with several
            processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a study runs in one process; start it with python, not with torchrun")

    from evo2_megatron.checkpoint.layout import resolve_checkpoint_path
    from evo2_megatron.checkpoint.load import load_model
    from evo2_megatron.checkpoint.run_config import read_run_config
    from evo2_megatron.runtime.distributed import process_groups
    from evo2_megatron.tasks.scoring.prediction_settings import Output

    checkpoint = resolve_checkpoint_path(ckpt_dir)
    run_config = read_run_config(checkpoint)
    if longest > run_config.seq_length:
        raise UserError(
            f"sequences of {longest} bases are longer than the {run_config.seq_length} positions the checkpoint was "
            "trained for; ask for shorter ones"
        )
    pattern, overrides = run_config.pattern, {}
    wanted = tuple(range(len(pattern)) if layers == "all" else layers)
    kept = Output(embedding_layers=wanted).layers_of(len(pattern))
    if kept:
        overrides = {"num_layers": kept[-1] + 1, "hybrid_override_pattern": pattern[: kept[-1] + 1]}
    with process_groups(ParallelConfig()):
        loaded = load_model(checkpoint, parallel=ParallelConfig(), provider_overrides=overrides)
        yield Model(loaded, kept, max_batch_tokens)


def read_genome(path: Path) -> dict[str, bytes]:
    """Contigs by name, in upper case."""
    from evo2_megatron.data.fasta import read_fasta

    return {record.id: record.sequence.upper() for record in read_fasta(path, unique_ids=True)}


def lengths(genome: Mapping[str, bytes]) -> dict[str, int]:
    """Bases of each contig."""
    return {name: len(bases) for name, bases in genome.items()}


def replaced(window: bytes, at: int) -> list[bytes]:
    """The window with each of the three other bases at one place."""
    others = [base for base in BASES.encode() if base != window[at]]
    return [substituted(window, at, base) for base in others]


def substituted(window: bytes, at: int, base: int) -> bytes:
    """The window with another base, by its letter's code, at one place."""
    return window[:at] + bytes([base]) + window[at + 1 :]


def contig_of(genome: dict[str, bytes], name: str, where: str) -> bytes:
    """Bases of a contig; UserError, which names ``where`` it is asked for, if there is none."""
    if name not in genome:
        raise UserError(f"{where} names contig '{name}', which the FASTA file does not have; it has {_some(genome)}")
    return genome[name]


def _some(names: Iterable[str]) -> str:
    listed = [f"'{name}'" for name in names]
    return ", ".join(listed[:3]) + ", ..." * (len(listed) > 3)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write tab-separated values with a heading; floats get six digits. The file appears when it is complete."""
    lines = ["\t".join(columns), *("\t".join(_cell(value) for value in row) for row in rows)]
    with disk_errors(), new_files([path]) as (partial,):
        partial.write_text("\n".join(lines) + "\n")
    sys.stdout.write(f"{path}\n")


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file, which appears when it is complete, and close the figure."""
    import matplotlib.pyplot as plt

    try:
        with disk_errors(), new_files([path]) as (partial,):
            figure.savefig(partial, format="png", dpi=150)
    finally:
        plt.close(figure)
    sys.stdout.write(f"{path}\n")


def check_output_dir(path: Path) -> None:
    """Make the folder before work starts; UserError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir {path}: {error.strerror}; choose another") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"--output-dir {path}: no permission to write; choose another")


def pyplot():
    """matplotlib.pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def tidy(axes) -> None:
    """Light grid, no box."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
