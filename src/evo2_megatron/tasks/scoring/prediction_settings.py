# SPDX-License-Identifier: Apache-2.0
"""What a prediction computes, from which sequences, by which model, and where results go."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from evo2_megatron.checkpoint.run_config import RunConfig
from evo2_megatron.config import Fp8Choice, UserError, WeightFormat
from evo2_megatron.data.record_windows import Windows

LogProbs = Literal["sum", "mean", "per_token"]

BaseValue = Literal["log_prob", "entropy"]

Format = Literal["pt", "tsv", "parquet", "npz", "safetensors", "bedgraph", "bigwig"]

TRACKS = ("bedgraph", "bigwig")
"""Formats of genome browsers, with one number per base."""


class Window(NamedTuple):
    """Bases of a sequence, counted from 1, both ends included."""

    first: int
    last: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """What is computed for each sequence: logits, unless log-probabilities or embeddings are asked for."""

    log_probs: LogProbs | None = None
    """Log-likelihood of the sequence, its mean over scored tokens, or with both of these one value per token."""

    base_values: tuple[BaseValue, ...] | None = None
    """With ``per_token``: the log-probability of each base, the entropy of the prediction of this base, or both; None:
    the first."""

    embedding_layers: tuple[int, ...] = ()
    """Residual stream after these layers, counted from 0, or from -1 backwards; before the final norm."""

    pooling: Literal["mean", "last"] | Window | None = None
    """One vector per sequence and layer instead of one per base: the mean over its bases or over some of them, or that
    of the last."""

    def __post_init__(self) -> None:
        if self.log_probs is not None and self.embedding_layers:
            raise UserError(
                "Cannot use --output-log-prob-seqs with --embedding-layer: hidden states have no probabilities; "
                "leave one of the two out"
            )
        if self.base_values is not None and self.log_probs != "per_token":
            raise UserError(
                "--per-base-values says what there is for each base; add --output-log-prob-seqs "
                "--log-prob-collapse-option per_token"
            )
        if self.pooling is not None and not self.embedding_layers:
            raise UserError("--pooling says how to pool hidden states; add --embedding-layer")
        if isinstance(self.pooling, Window) and not 1 <= self.pooling.first <= self.pooling.last:
            raise UserError(
                f"--pooling-window {self.pooling.first}:{self.pooling.last}: give the first and the last base, "
                "counted from 1"
            )

    @property
    def columns(self) -> tuple[BaseValue, ...]:
        """Names of the values of each base."""
        return self.base_values or ("log_prob",)

    def layers_of(self, num_layers: int) -> list[int]:
        """The embedding's layers counted from 0, ascending, each once; UserError where there is no such layer."""
        for layer in self.embedding_layers:
            if not -num_layers <= layer < num_layers:
                raise UserError(
                    f"Invalid embedding_layer {layer}: the model has {num_layers} layers; "
                    f"choose {-num_layers} to {num_layers - 1}"
                )
        return sorted({layer % num_layers for layer in self.embedding_layers})

    def hidden_name(self, layer: int) -> str:
        """What the hidden states after a layer, counted from 0, are called in results: ``hidden_embeddings``, with
        ``_layer_N`` where several layers are asked for."""
        return "hidden_embeddings" if len(self.embedding_layers) == 1 else f"hidden_embeddings_layer_{layer}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Where results go, in which files."""

    output_dir: Path | None = None
    """None: everything is computed, and nothing is written."""

    formats: tuple[Format, ...] = ("pt",)

    write_interval: Literal["epoch", "batch"] = "epoch"
    """Whether there is one ``.pt`` file per copy of the model, or one per batch."""

    files_per_subdir: int | None = None

    def __post_init__(self) -> None:
        if self.write_interval == "batch" and "pt" not in self.formats:
            raise UserError("--write-interval batch is about .pt files; add pt to --output-format, or leave it out")
        if self.files_per_subdir is not None and self.write_interval != "batch":
            raise UserError(
                "--files-per-subdir needs --write-interval batch: in epoch mode there is one file per rank"
            )
        if self.output_dir is not None:
            folder = self.output_dir.absolute()
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            if not existing.is_dir():
                raise UserError(f"--output-dir {self.output_dir}: {existing} is a file; give a folder")
            if not os.access(existing, os.W_OK | os.X_OK):
                raise UserError(f"--output-dir {self.output_dir}: no permission to write in {existing}")

    def check_can_hold(self, output: Output, sequences: Sequences) -> None:
        """Raise UserError for a format that such results are not written in."""
        if output.log_probs is not None:
            kind, possible = "log-probabilities", ("pt", "tsv", "parquet")
        elif output.embedding_layers:
            kind, possible = "embeddings", ("pt", "parquet", "npz", "safetensors")
        else:
            kind, possible = "logits", ("pt", "npz", "safetensors")
        if output.log_probs == "per_token":
            possible += TRACKS
        if sequences.window_length is not None:  # a row of a .pt file is what one pass gave
            kind, possible = f"{kind} of windows", possible[1:]
        elif sequences.both_strands and output.log_probs == "per_token":  # nor has one a place for the first base
            kind, possible = f"{kind} of bases on both strands", possible[1:]
        for name in self.formats:
            if name in TRACKS and output.log_probs in ("sum", "mean"):
                raise UserError(
                    f"--output-format {name} has a value for each base; add --log-prob-collapse-option per_token"
                )
            if name not in possible:
                raise UserError(f"{kind} are not written as --output-format {name}; choose from {', '.join(possible)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelChanges:
    """How the model differs from the one in the checkpoint; None: not at all."""

    num_layers: int | None = None
    """Keep only the first layers."""

    hybrid_override_pattern: str | None = None
    """The same, as the pattern of the layers to keep."""

    seq_len_interpolation_factor: float | None = None
    """Divide positions by this before the rotary embedding; lengthens the position range in proportion."""

    vortex_style_fp8: bool | None = None
    use_subquadratic_ops: bool | None = None
    quantize_weights: WeightFormat | None = None
    fp8: Fp8Choice = "as_asked"
    """What to do about 8-bit input projections."""

    def pattern(self, run_config: RunConfig) -> str:
        """Pattern of the layers to keep."""
        whole = run_config.pattern
        pattern = self.hybrid_override_pattern
        if pattern is None:
            pattern = whole[: self.num_layers]
        if not pattern or not whole.startswith(pattern) or self.num_layers not in (None, len(pattern)):
            raise UserError(
                f"--num-layers {self.num_layers} and --hybrid-override-pattern {self.hybrid_override_pattern} do not "
                f"name the first layers of the checkpoint's pattern {whole}; give a number up to {len(whole)}"
            )
        return pattern

    def overrides(self, pattern: str) -> dict[str, Any]:
        """Fields of the provider, for a model with the layers of ``pattern``."""
        values = {
            "num_layers": len(pattern),
            "hybrid_override_pattern": pattern,
            "seq_len_interpolation_factor": self.seq_len_interpolation_factor,
            "vortex_style_fp8": self.vortex_style_fp8,
            "use_subquadratic_ops": self.use_subquadratic_ops,
            "quantize_weights": self.quantize_weights,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """How records become samples, and samples batches."""

    prepend_bos: bool = False
    """Put the end-of-document token, id 0, in front, as in training; then the first base is scored, too."""

    mask_phylogenetic_tags: bool = False
    """Do not score lineage tags (``|d__Bacteria;...|``) inside sequences."""

    keep_tag_case: bool = False
    """Show them to the model as they are, and not in upper case as in training."""

    both_strands: bool = False
    """Take the mean of the results of a sequence and of its reverse complement."""

    max_seq_length: int | None = None
    """Most tokens to accept; None: what the checkpoint was trained for."""

    micro_batch_size: int | None = None
    """Most sequences per forward pass; None: as ``max_batch_tokens`` allows."""

    max_batch_tokens: int | None = None
    """Most tokens per forward pass, padding included; None: what suits the device. Less if memory runs out."""

    min_length: int = 1
    """Tokens that every batch is padded to, at least."""

    chunk_length: int | None = None
    """Longer sequences go through the model in pieces of this many tokens. None: what suits the device."""

    window_length: int | None = None
    """Score longer records in windows of this many bases, each by itself; None: whole."""

    window_overlap: int | None = None
    """Bases of context before what a window scores; None: half of the window."""

    def __post_init__(self) -> None:
        if self.window_length is None:
            if self.window_overlap is not None:
                raise UserError("--window-overlap says how windows overlap; add --window-length")
            return
        length, overlap = self._windows
        if overlap >= length:
            raise UserError(
                f"--window-overlap {overlap} leaves no base to score in windows of {length}; give at most {length - 1}"
            )
        if not overlap and not self.prepend_bos:
            raise UserError(
                f"windows of {length} bases that overlap by 0 have nothing before their first base, which so has no "
                "score; give --window-overlap of at least 1, or --prepend-bos"
            )
        if self.mask_phylogenetic_tags:
            raise UserError(
                "--mask-phylogenetic-tags is about lineage tags, which records cut into windows do not have; leave it "
                "or --window-length out"
            )

    @property
    def _windows(self) -> Windows:
        overlap = self.window_length // 2 if self.window_overlap is None else self.window_overlap
        return Windows(self.window_length, overlap)

    def windows(self, trained_for: int) -> Windows | None:
        """Where records are cut; None: nowhere.

        Args:
            trained_for: Tokens that the model was trained for.

        Raises:
            UserError: A window has more.
        """
        if self.window_length is None:
            return None
        check_window_length(self.window_length, (self.max_seq_length or trained_for) - self.prepend_bos)
        return self._windows

    def check_can_make(self, output: Output) -> None:
        """Raise UserError where results of two strands have no mean, or those of windows cannot be joined."""
        if self.both_strands and output.log_probs is None and output.pooling != "mean":
            raise UserError(
                "--both-strands takes the mean of two results: use it with --pooling mean, or with "
                "--output-log-prob-seqs"
            )
        if self.window_length is not None and output.log_probs is None:
            raise UserError("--window-length is about log-probabilities; add --output-log-prob-seqs, or leave it out")


def check_window_length(length: int, limit: int) -> None:
    """Raise UserError for a window of more bases than ``limit``."""
    if length > limit:
        raise UserError(
            f"--window-length {length} is more than the {limit} bases the checkpoint was trained for; lower it, "
            "or accept worse scores with --max-seq-length"
        )
