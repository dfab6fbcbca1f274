# SPDX-License-Identifier: Apache-2.0
"""Schema of the YAML file of ``preprocess_evo2``: a list with one mapping per dataset."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evo2_megatron.config import UserError
from evo2_megatron.data.indexed_dataset import DTYPES
from evo2_megatron.data.lineage import Lineage
from evo2_megatron.data.tokenizer import DEFAULT_VOCAB_SIZE, fetch_tokenizer, read_vocab_size, tokenizer_dir
from evo2_megatron.data.yaml_schema import check_fields, expand_home, read_yaml_list

_DEAD_KEYS = ("include_sequence_id", "pretrained_tokenizer_model", "special_tokens", "fast_hf_tokenizer")
_POOL_KEYS = ("preproc_concurrency", "chunksize")
_IDLE_KEYS = {
    "ftfy": "what a sequence may hold is plain ASCII, which it leaves as it is",
    "hf_tokenizer_trust_remote_code": "no code is loaded, for ids come from a table",
}


_MOST = 2**31 - 1
"""Tokens of a document, as its index counts them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """One dataset: FASTA files in, six Megatron files out. Field names are the keys of the YAML."""

    datapaths: list[str] = field(default_factory=list)
    """FASTA files, plain, gzip or bgzip, relative to the current directory; all go into one dataset."""

    output_dir: str | None = None
    """Created if missing; None: the current directory."""

    output_prefix: str | None = None
    """First part of the output names, ``{output_prefix}_{tokenizer}_{split}``; None: they start with the tokenizer."""

    train_split: float = 0.7
    """Relative weight."""

    valid_split: float = 0.2
    """Relative weight."""

    test_split: float = 0.1
    """Relative weight."""

    split_window_length: int | None = None
    """Cut every record into windows of this many bases, each a document, before dividing them between splits; the
    windows of a record that go to one split are contiguous. None: a record is a document and goes to one split."""

    split_by: str = "window"
    """How ``split_window_length`` and the weights meet. ``window``: see there; ``contig``: all windows of a record go
    to one split."""

    train_contigs: list[str] | str | None = None
    """Names of the records for training, or a text file with one per line. A split with a list gets these records and
    no others; the weights divide what is in no list between the splits without one."""

    valid_contigs: list[str] | str | None = None
    """The same for validation."""

    test_contigs: list[str] | str | None = None
    """The same for testing."""

    overwrite: bool = False
    """Replace output files that exist. Otherwise a dataset whose files are newer than its inputs is left alone, and
    any other file in the way is an error."""

    embed_reverse_complement: bool = False
    """Write both strands, as two documents of the same split."""

    random_reverse_complement: float = 0.0
    """Probability of replacing a document by its reverse complement, before ``embed_reverse_complement``."""

    complement_upper_case_only: bool = False
    """Complement A, C, G and T only, as the former recipe did: soft-masked bases and IUPAC codes are reversed but keep
    their letters. For data that must equal what that recipe made; it is no reverse complement."""

    random_lineage_dropout: float = 0.0
    """Probability of blanking each rank of a lineage tag."""

    transcribe: str | None = None
    """``transcribe``: T to U; ``back_transcribe``: U to T; None: neither."""

    force_uppercase: bool = False
    """Upper-case the bases; otherwise soft-masking (lower case) is kept."""

    indexed_dataset_dtype: str = "uint8"
    """Integer type of the token ids."""

    append_eod: bool = True
    """End every document with token 0."""

    enforce_sample_length: int | None = None
    """Pad every document to this many tokens with token 1; a longer one is an error."""

    ftfy: bool = False
    """No effect: what a sequence may hold is plain ASCII, which ``ftfy`` leaves as it is."""

    hf_tokenizer_model_path: str | None = None
    """Folder of a nucleotide tokenizer; None: the one of 256 tokens that ships with this package."""

    hf_tokenizer_model_name: str | None = None
    """A nucleotide tokenizer on the Hugging Face hub; if no path is given."""

    hf_tokenizer_trust_remote_code: bool = False
    """No effect: no code is loaded, for ids come from a table."""

    workers: int = 1
    """Threads that decompress bgzip files; the output is the same for any number. One process does the rest, at the
    speed of a disk."""

    preproc_concurrency: int = 100000
    """No effect: memory does not depend on the number of sequences."""

    chunksize: int = 1
    """No effect: there is no pool of processes."""

    drop_empty_sequences: bool = False
    """Skip records without bases; otherwise one is an error."""

    nnn_filter: bool = False
    """Skip documents that contain NNN in any case."""

    seed: int | None = None
    """Seed of the splits, strands and lineage dropout; None means 0: the same config always gives the same files."""

    taxonomy_data: dict[str, Lineage] = field(default_factory=dict)
    """Lineage by a part of the sequence id; the first key that occurs anywhere in an id applies."""

    prompt_spacer_length: int = 131072
    """A lineage tag stands at every multiple of this many tokens."""

    def __post_init__(self) -> None:
        for name in ("random_reverse_complement", "random_lineage_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is a probability between 0 and 1")
        for name in ("split_window_length", "enforce_sample_length", "prompt_spacer_length", "workers"):
            if getattr(self, name) is not None and not 1 <= getattr(self, name) <= _MOST:
                raise UserError(f"{name} is {getattr(self, name)}; it must be from 1 to {_MOST}")
        weights = self.split_weights.values()
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
            raise UserError(
                "train_split, valid_split and test_split are "
                f"{', '.join(f'{weight:g}' for weight in weights)}; none may be negative and one must be above 0"
            )
        if not self.datapaths:
            raise UserError("datapaths is empty; list one or more FASTA files")
        if self.transcribe not in (None, "transcribe", "back_transcribe"):
            raise UserError(f"transcribe is '{self.transcribe}'; use transcribe, back_transcribe or null")
        if self.indexed_dataset_dtype not in DTYPES:
            raise UserError(f"indexed_dataset_dtype is '{self.indexed_dataset_dtype}'; use one of {', '.join(DTYPES)}")
        if self.split_by not in ("window", "contig"):
            raise UserError(f"split_by is '{self.split_by}'; use window or contig")
        for key, lineage in self.taxonomy_data.items():
            lineage.check_fits(self.prompt_spacer_length, key=key)

    def idle_settings(self) -> dict[str, str]:
        """What was set and does nothing for want of another setting, and why."""
        both = self.embed_reverse_complement or self.random_reverse_complement
        idle = {
            "split_by": self.split_by == "contig" and self.split_window_length is None,
            "random_lineage_dropout": self.random_lineage_dropout and not self.taxonomy_data,
            "complement_upper_case_only": self.complement_upper_case_only and not both,
        }
        why = {
            "split_by": "without split_window_length each record is one document, in one split",
            "random_lineage_dropout": "without taxonomy_data there are no lineage tags",
            "complement_upper_case_only": "without embed_reverse_complement or random_reverse_complement no strand is "
            "reversed",
        }
        return {name: why[name] for name, is_idle in idle.items() if is_idle}

    @property
    def split_weights(self) -> dict[str, float]:
        """Weight by the name that the split has in file names."""
        return {"train": self.train_split, "val": self.valid_split, "test": self.test_split}

    def split_names(self) -> dict[str, list[str]]:
        """Record names by split, for the splits that have a list.

        Raises:
            UserError: A file of names cannot be read, a list is empty, or a name is in two.
        """
        given = {"train": self.train_contigs, "val": self.valid_contigs, "test": self.test_contigs}
        lists = {split: _read_names(value) for split, value in given.items() if value is not None}
        owners: dict[str, str] = {}
        for split, names in lists.items():
            if not names:
                raise UserError(
                    f"the list of names for {split} is empty; leave it out, or set the split's weight to 0"
                )
            for name in names:
                if owners.setdefault(name, split) != split:
                    raise UserError(f"'{name}' is in the lists for {owners[name]} and {split}; it can be in one")
        return lists

    @property
    def output_prefixes(self) -> dict[str, Path]:
        """Path of each split's files without ``.bin`` and ``.idx``."""
        folder = Path(self.hf_tokenizer_model_path or tokenizer_dir())
        tokenizer = folder.name or folder.resolve().name
        if self.hf_tokenizer_model_path is None and self.hf_tokenizer_model_name is not None:
            tokenizer = self.hf_tokenizer_model_name.replace("/", "--").replace(":", "--")
        tokenizer = tokenizer.lower().replace(" ", "")
        stem = tokenizer if self.output_prefix is None else f"{self.output_prefix}_{tokenizer}"
        return {split: Path(self.output_dir or ".", f"{stem}_{split}") for split in self.split_weights}

    @property
    def label(self) -> str:
        """What to call this dataset in messages."""
        return self.output_prefix or Path(self.datapaths[0]).name

    def vocab_size(self) -> int:
        """Number of tokens of the tokenizer.

        Raises:
            UserError: It is not a nucleotide tokenizer, or cannot be had.
        """
        if self.hf_tokenizer_model_path is not None:
            return read_vocab_size(self.hf_tokenizer_model_path)
        if self.hf_tokenizer_model_name is not None:
            return read_vocab_size(fetch_tokenizer(self.hf_tokenizer_model_name))
        return DEFAULT_VOCAB_SIZE


def _read_names(value: list[str] | str) -> list[str]:
    """Names from a list, or from a file with one per line."""
    if isinstance(value, list):
        return value
    try:
        lines = Path(value).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read the names in {value}: {error.strerror}; a single name is a list too: [name]"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{value} is not a text file of names") from None
    return [line.strip() for line in lines if line.strip()]


def load_preprocess_configs(path: str | os.PathLike[str]) -> tuple[list[PreprocessConfig], list[str]]:
    """Read and check the file.

    Returns:
        The datasets, and notes for the user about keys that have no effect.

    Raises:
        UserError: The file is missing, is not YAML, or says something that cannot be done.
    """
    entries = read_yaml_list(path)
    notes = []
    configs = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, dataset {number}"
        for key in _DEAD_KEYS:
            if key in entry:
                notes.append(f"{where}: {key} has no effect")
        notes += [f"{where}: {key} has no effect; one process does all the work" for key in _POOL_KEYS if key in entry]
        notes += [f"{where}: {key} has no effect: {why}" for key, why in _IDLE_KEYS.items() if entry.get(key) is True]
        known = {key: value for key, value in entry.items() if key not in _DEAD_KEYS}
        try:
            values = check_fields(PreprocessConfig, known)
            _expand_home(values)
            values["taxonomy_data"] = _lineages(values.get("taxonomy_data", {}))
            configs.append(PreprocessConfig(**values))
            idle = configs[-1].idle_settings()
            notes += [f"{where}: {name} has no effect: {why}" for name, why in idle.items()]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return configs, notes


def _expand_home(values: dict[str, Any]) -> None:
    """Put the home folder in place of ``~`` in what is a path."""
    values["datapaths"] = [expand_home(path) for path in values.get("datapaths", [])]
    for key in ("output_dir", "hf_tokenizer_model_path", "train_contigs", "valid_contigs", "test_contigs"):
        if isinstance(values.get(key), str):
            values[key] = expand_home(values[key])


def _lineages(entries: dict[Any, Any]) -> dict[str, Lineage]:
    lineages = {}
    for key, ranks in entries.items():
        if not isinstance(ranks, dict):
            raise UserError(f"taxonomy_data, '{key}': {ranks!r} is not a mapping of ranks to names")
        try:
            lineages[str(key)] = Lineage(**check_fields(Lineage, ranks))
        except UserError as error:
            raise UserError(f"taxonomy_data, '{key}': {error}") from None
    return lineages
