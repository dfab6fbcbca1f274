# SPDX-License-Identifier: Apache-2.0
"""FASTA to Megatron's indexed datasets, in one pass and a few blocks of memory, without torch or NumPy."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from evo2_megatron.config import UserError
from evo2_megatron.data.base_counts import BaseCounts
from evo2_megatron.data.documents import DocumentMaker
from evo2_megatron.data.indexed_dataset import IndexedDatasetWriter, TokenCounter, is_whole
from evo2_megatron.data.preprocess_config import PreprocessConfig, load_preprocess_configs

Watch = Callable[[int, int], None]
"""Called with the bytes read of all input files together and the bases found in them, a few times per second."""

_WATCH_SECONDS = 0.2


class PreprocessSummary(NamedTuple):
    """What was read and written for one dataset."""

    label: str
    num_records: int
    num_skipped: int
    """Records and windows that a filter removed, or that are in no list of names."""

    counts: BaseCounts
    """What was read."""

    num_carriage_returns: int
    """Lines that ended as on Windows."""

    num_documents: dict[str, int]
    """By split."""

    num_tokens: dict[str, int]
    """By split."""

    seconds: float
    notes: list[str]
    """What the user should know about the input."""

    def __str__(self) -> str:
        counts = self.counts
        splits = ", ".join(f"{num} {split}" for split, num in self.num_documents.items())
        skipped = f" ({self.num_skipped} skipped)" if self.num_skipped else ""
        rate = counts.bases / 1e6 / self.seconds
        return (
            f"{self.label}: {self.num_records} records, {counts.bases} bases{skipped}: {counts.soft_masked} "
            f"soft-masked, {counts.unknown} N, {counts.ambiguous} IUPAC, {counts.other} other -> documents: {splits}; "
            f"{sum(self.num_tokens.values())} tokens in {self.seconds:.2f} s ({rate:.0f} MB/s)"
        )

    def table(self) -> str:
        """The counts, one a line, for a dry run."""
        counts = self.counts
        rows = {
            "records": self.num_records,
            "skipped": self.num_skipped,
            "bases": counts.bases,
            "  soft-masked": counts.soft_masked,
            "  N": counts.unknown,
            "  IUPAC": counts.ambiguous,
            "  other": counts.other,
            "Windows line ends": self.num_carriage_returns,
        }
        lines = [f"{self.label}: dry run, nothing written", *(f"  {name:<18}{num:>16}" for name, num in rows.items())]
        lines.append(f"  {'split':<18}{'documents':>16}{'tokens':>16}")
        for split, num in self.num_documents.items():
            lines.append(f"  {split:<18}{num:>16}{self.num_tokens[split]:>16}")
        return "\n".join(lines)


class CheckedConfigs(NamedTuple):
    """Datasets that can be made, and notes for the user."""

    configs: list[PreprocessConfig]
    notes: list[str]


def check(config_path: Path) -> CheckedConfigs:
    """Read the YAML file and check inputs and outputs of every dataset before anything is written.

    A dataset whose six files are whole and newer than its inputs and the YAML file is done: a note says so.

    Raises:
        UserError: Something in the file cannot be done, an input is missing, or another file is in the way.
    """
    configs, notes = load_preprocess_configs(config_path)
    owners: set[Path] = set()
    waiting = []
    for config in configs:
        config.vocab_size()
        config.split_names()
        for path in config.datapaths:
            if Path(path).is_dir():
                raise UserError(f"{path} is a folder; list its FASTA files")
            if not Path(path).exists():
                raise UserError(f"no such FASTA file: {path} (relative paths start at {Path.cwd()})")
        for prefix in config.output_prefixes.values():
            if prefix in owners:
                raise UserError(f"two datasets write {prefix}.bin; give each its own output_prefix or output_dir")
            owners.add(prefix)
        if not config.overwrite and _is_done(config, config_path):
            notes.append(
                f"{config.label} is done: its files are newer than its inputs; set overwrite to true to redo it"
            )
        else:
            waiting.append(config)
    return CheckedConfigs(waiting, notes)


def _is_done(config: PreprocessConfig, config_path: Path) -> bool:
    """Whether an earlier run of the same command made this dataset.

    Files that are all there, whole, and newer than everything they come from are its work. If it was ended while it
    gave them their names, the rest still has temporary ones: they are made again.

    Raises:
        UserError: Another file is in the way.
    """
    paths = [Path(f"{prefix}{end}") for prefix in config.output_prefixes.values() for end in (".bin", ".idx")]
    existing = [path for path in paths if path.exists()]
    if not existing:
        return False
    lists = (config.train_contigs, config.valid_contigs, config.test_contigs)
    sources = [config_path, *config.datapaths, *(names for names in lists if isinstance(names, str))]
    newest = max(Path(path).stat().st_mtime_ns for path in sources)
    if all(path.stat().st_mtime_ns >= newest for path in existing):
        if all(is_whole(prefix) for prefix in config.output_prefixes.values()):
            return True
        if all(path in existing or Path(f"{path}.tmp").exists() for path in paths) and existing != paths:
            return False
    raise UserError(f"{existing[0]} exists; set overwrite to true, or choose another output_prefix")


def preprocess(config: PreprocessConfig, *, watch: Watch | None = None) -> PreprocessSummary:
    """Make one dataset. All six files appear at the end, or none.

    The files depend on the config and the sequences only.

    Raises:
        UserError: A sequence cannot be tokenized, there are too few records for the splits, or a path fails.
    """
    start = time.perf_counter()
    writers: dict[str, IndexedDatasetWriter] = {}
    folder, is_made = config.output_prefixes["train"].parent, False  # a prefix may name folders, too
    try:
        is_there = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        is_made = not is_there
        for split, prefix in config.output_prefixes.items():
            writers[split] = IndexedDatasetWriter(prefix, config.indexed_dataset_dtype)
        maker = DocumentMaker(config, writers, temporary_dir=config.output_dir or ".")
        _read(config, maker, watch)
        for writer in writers.values():
            writer.finish()
        for writer in writers.values():
            writer.publish()
    except OSError as error:
        raise UserError(f"{error.filename or config.output_dir or '.'}: {error.strerror}") from error
    finally:
        for writer in writers.values():
            writer.discard()
        if is_made and not any(folder.iterdir()):
            folder.rmdir()
    return _summary(config, maker, writers, time.perf_counter() - start)


def count(config: PreprocessConfig, *, watch: Watch | None = None) -> PreprocessSummary:
    """Find out what ``preprocess`` would make, and write nothing.

    Raises:
        UserError: As ``preprocess``.
    """
    start = time.perf_counter()
    counters = {split: TokenCounter() for split in config.output_prefixes}
    maker = DocumentMaker(config, counters, temporary_dir=None)
    _read(config, maker, watch)
    return _summary(config, maker, counters, time.perf_counter() - start)


def _read(config: PreprocessConfig, maker: DocumentMaker, watch: Watch | None) -> None:
    num_bytes, next_watch = 0, 0.0
    for path in config.datapaths:
        for _ in maker.add_file(path):
            if watch is not None and (now := time.monotonic()) >= next_watch:
                watch(num_bytes + maker.state.position, maker.counts.bases)
                next_watch = now + _WATCH_SECONDS
        num_bytes += maker.state.position
    if watch is not None:
        watch(num_bytes, maker.counts.bases)
    maker.splitter.check_complete()


def _summary(
    config: PreprocessConfig, maker: DocumentMaker, writers: dict[str, TokenCounter], seconds: float
) -> PreprocessSummary:
    notes = []
    if maker.counts.other:
        notes.append(
            f"{config.label}: {maker.counts.other} characters are no IUPAC codes and became tokens as they are; the "
            f"first is {maker.counts.first_other}"
        )
    if maker.unused_lineages:
        names = ", ".join(map(repr, list(maker.unused_lineages)[:3]))
        notes.append(
            f"{config.label}: {len(maker.unused_lineages)} of {len(config.taxonomy_data)} keys of taxonomy_data gave "
            f"no record a tag, such as {names}: the first key that is part of a record's name, the first word after "
            "'>', counts"
        )
    if maker.names_unchecked:
        notes.append(f"{config.label}: duplicate names were looked for only among the first records of each file")
    return PreprocessSummary(
        label=config.label,
        num_records=maker.num_records,
        num_skipped=maker.num_skipped,
        counts=maker.counts,
        num_carriage_returns=maker.state.num_carriage_returns,
        num_documents={split: writer.num_documents for split, writer in writers.items()},
        num_tokens={split: writer.num_tokens for split, writer in writers.items()},
        seconds=seconds,
        notes=notes,
    )


@contextlib.contextmanager
def progress_bar(config: PreprocessConfig) -> Iterator[Watch | None]:
    """A bar on stderr: how much of the input is read, and bases per second. None where there is no terminal."""
    if not os.isatty(2):
        yield None
        return
    from tqdm import tqdm  # takes as long to load as 20 MB to read

    total = sum(Path(path).stat().st_size for path in config.datapaths)
    start = time.monotonic()
    # tqdm by itself shows nothing on a terminal that does not tell its size
    size = shutil.get_terminal_size(fallback=(120, 24))
    form = "{desc} {percentage:3.0f}% |{bar}|{postfix}"
    with tqdm(total=total, desc=config.label, bar_format=form, ncols=size.columns, nrows=size.lines) as bar:

        def watch(num_bytes: int, num_bases: int) -> None:
            rate = num_bases / max(time.monotonic() - start, 1e-3)
            bar.set_postfix_str(f"{num_bases / 1e6:,.0f} Mbases, {rate / 1e6:,.0f} Mbases/s", refresh=False)
            bar.update(num_bytes - bar.n)

        yield watch
