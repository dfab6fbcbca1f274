# SPDX-License-Identifier: Apache-2.0
"""FASTA to Megatron's indexed datasets, in one pass and a few blocks of memory, without torch or NumPy."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from evo2_megatron.config import UserError
from evo2_megatron.data.fasta import BLOCK_BYTES, read_pieces, record_id
from evo2_megatron.data.indexed_dataset import IndexedDatasetWriter
from evo2_megatron.data.nucleotides import BACK_TRANSCRIBE, COMPLEMENT, TRANSCRIBE
from evo2_megatron.data.preprocess_config import PreprocessConfig, load_preprocess_configs
from evo2_megatron.data.splits import Splitter
from evo2_megatron.data.tokenizer import EOD, PAD, SEQUENCE_TOKENS, encode, encode_sequence

_MEMORY_BYTES = 1 << 23  # a record that has to be read more than once goes to a temporary file beyond this
_EOD_BYTE = bytes([EOD])


class PreprocessSummary(NamedTuple):
    """What was read and written for one dataset."""

    label: str
    num_records: int
    num_skipped: int
    """Records and windows that a filter removed."""

    num_bases: int
    """Bases read."""

    num_documents: dict[str, int]
    """By split."""

    num_tokens: int
    seconds: float

    def __str__(self) -> str:
        documents = ", ".join(f"{num} {split}" for split, num in self.num_documents.items())
        skipped = f" ({self.num_skipped} skipped)" if self.num_skipped else ""
        rate = self.num_bases / 1e6 / self.seconds
        return (
            f"{self.label}: {self.num_records} records, {self.num_bases} bases{skipped} -> documents: {documents}; "
            f"{self.num_tokens} tokens in {self.seconds:.2f} s ({rate:.0f} MB/s)"
        )


class CheckedConfigs(NamedTuple):
    """Datasets that can be made, and notes for the user."""

    configs: list[PreprocessConfig]
    notes: list[str]


def check(config_path: Path) -> CheckedConfigs:
    """Read the YAML file and check inputs and outputs of every dataset before anything is written.

    Raises:
        UserError: Something in the file cannot be done, an input is missing, or an output exists.
    """
    configs, notes = load_preprocess_configs(config_path)
    owners: dict[Path, str] = {}
    for config in configs:
        config.vocab_size()
        for path in config.datapaths:
            if not Path(path).exists() or Path(path).is_dir():
                raise UserError(f"no such FASTA file: {path} (relative paths start at {Path.cwd()})")
        for prefix in config.output_prefixes.values():
            if prefix in owners:
                raise UserError(f"two datasets write {prefix}.bin; give each its own output_prefix or output_dir")
            owners[prefix] = config.label
            for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")):
                if path.exists() and not config.overwrite:
                    raise UserError(f"{path} exists; set overwrite to true, or choose another output_prefix")
    return CheckedConfigs(configs, notes)


def preprocess(config: PreprocessConfig) -> PreprocessSummary:
    """Make one dataset. All six files appear at the end, or none.

    The files depend on the config and the sequences only.

    Raises:
        UserError: A sequence cannot be tokenized, there are too few records for the splits, or a path fails.
    """
    start = time.perf_counter()
    writers: dict[str, IndexedDatasetWriter] = {}
    try:
        Path(config.output_dir or ".").mkdir(parents=True, exist_ok=True)
        for split, prefix in config.output_prefixes.items():
            writers[split] = IndexedDatasetWriter(prefix, config.indexed_dataset_dtype)
        maker = _DocumentMaker(config, writers)
        for path in config.datapaths:
            maker.add_file(path)
        maker.splitter.check_complete()
        for writer in writers.values():
            writer.finish()
        for writer in writers.values():
            writer.publish()
    except OSError as error:
        raise UserError(f"{error.filename or config.output_dir or '.'}: {error.strerror}") from error
    finally:
        for writer in writers.values():
            writer.discard()
    return PreprocessSummary(
        label=config.label,
        num_records=maker.num_records,
        num_skipped=maker.num_skipped,
        num_bases=maker.num_bases,
        num_documents={split: writer.num_documents for split, writer in writers.items()},
        num_tokens=sum(writer.num_tokens for writer in writers.values()),
        seconds=time.perf_counter() - start,
    )


class _DocumentMaker:
    """Turns records into documents of the three writers."""

    def __init__(self, config: PreprocessConfig, writers: dict[str, IndexedDatasetWriter]) -> None:
        self._config = config
        self._writers = writers
        self._vocab_size = config.vocab_size()
        self._forward = _token_table(config)
        self._reverse = COMPLEMENT.translate(self._forward)
        # one stream of random numbers per purpose, so that one option does not change what another one draws
        seed = config.seed or 0
        self.splitter = Splitter(config.split_weights, seed)
        self._strand_rng = random.Random(f"{seed}/strand")
        self._lineage_rng = random.Random(f"{seed}/lineage")
        self.num_records = self.num_skipped = self.num_bases = 0

    def add_file(self, path: str) -> None:
        """Read one FASTA file to its end."""
        config = self._config
        if (
            config.embed_reverse_complement
            or config.random_reverse_complement
            or config.nnn_filter
            or config.split_window_length
            or config.taxonomy_data
        ):
            for record in _kept_records(path, config.output_dir or "."):
                self.num_records += 1
                self.num_bases += record.num_bases
                if record.num_bases:
                    self._add_windows(record)
                else:
                    self._add_empty(str(record))
        else:
            self._add_in_one_pass(path)

    def _add_in_one_pass(self, path: str) -> None:
        """Every record is one document, forward and without a tag: write its bases as they come."""
        writer, name = None, ""
        for header, bases in read_pieces(path):
            if header is not None:
                if writer is not None:
                    self._end_document(writer, name)
                self.num_records += 1
                name = f"record '{record_id(header)}' of {path}"
                if not bases:
                    self._add_empty(name)
                    writer = None
                    continue
                writer = self._writers[self.splitter.assign_record()]
            self.num_bases += len(bases)
            writer.write_bytes(encode_sequence(bases, self._forward, name=name))
        if writer is not None:
            self._end_document(writer, name)

    def _add_empty(self, name: str) -> None:
        if not self._config.drop_empty_sequences:
            raise UserError(f"{name} has no bases; set drop_empty_sequences to true to skip such records")
        self.num_skipped += 1

    def _add_windows(self, record: _KeptRecord) -> None:
        """Write the windows of a record, or the whole of it, on the strands asked for."""
        config = self._config
        length = config.split_window_length or record.num_bases
        windows = [(at, min(at + length, record.num_bases)) for at in range(0, record.num_bases, length)]
        if config.nnn_filter:
            kept = [window for window in windows if not _contains_nnn(record.forward(*window))]
            self.num_skipped += len(windows) - len(kept)
            windows = kept
        if not windows:
            return
        for window, split in zip(windows, self.splitter.assign_windows(len(windows)), strict=True):
            first = (record.forward, self._forward), (record.backward, self._reverse)
            if config.random_reverse_complement and self._strand_rng.random() < config.random_reverse_complement:
                first = first[::-1]
            for read, table in first if config.embed_reverse_complement else first[:1]:
                self._write(self._writers[split], record, read(*window), table)

    def _write(self, writer: IndexedDatasetWriter, record: _KeptRecord, pieces: Iterable[bytes], table: bytes) -> None:
        """Write one document from its bases and the table that makes tokens of them."""
        tokens = (encode_sequence(piece, table, name=str(record)) for piece in pieces)
        tag = self._tag(record.id)
        if tag is None:
            for piece in tokens:
                writer.write_bytes(piece)
        else:
            _write_tagged(writer, tokens, encode(tag, self._vocab_size), self._config.prompt_spacer_length)
        self._end_document(writer, str(record))

    def _end_document(self, writer: IndexedDatasetWriter, name: str) -> None:
        if self._config.append_eod:
            writer.write_bytes(_EOD_BYTE)
        wanted = self._config.enforce_sample_length
        if wanted is not None:
            if writer.document_length > wanted:
                raise UserError(f"{name} makes {writer.document_length} tokens; enforce_sample_length is {wanted}")
            writer.write_bytes(bytes([PAD]) * (wanted - writer.document_length))
        writer.end_document()

    def _tag(self, name: str) -> str | None:
        for key, lineage in self._config.taxonomy_data.items():
            if key in name:
                return lineage.tag(self._config.random_lineage_dropout, self._lineage_rng)
        return None


def _token_table(config: PreprocessConfig) -> bytes:
    """256-byte table from what a FASTA file says to token ids."""
    table = SEQUENCE_TOKENS
    if config.force_uppercase:
        table = table.upper()
    if config.transcribe is not None:
        table = table.translate(TRANSCRIBE if config.transcribe == "transcribe" else BACK_TRANSCRIBE)
    return table


def _write_tagged(writer: IndexedDatasetWriter, tokens: Iterable[bytes], tag: list[int], period: int) -> None:
    """Write tokens with the tag at every multiple of ``period``."""
    room = 0
    for piece in tokens:
        at = 0
        while at < len(piece):
            if not room:
                writer.write_ids(tag)
                room = period - len(tag)
            part = piece[at : at + room]
            writer.write_bytes(part)
            at += len(part)
            room -= len(part)


def _contains_nnn(pieces: Iterable[bytes]) -> bool:
    end = b""
    for piece in pieces:
        if b"NNN" in (end + piece).upper():
            return True
        end = (end + piece)[-2:]
    return False


class _KeptRecord:
    """One record that can be read in any order: in memory, or in a temporary file if it is long."""

    def __init__(self, path: str, name: str) -> None:
        self._path, self.id = path, name
        self._pieces: list[bytes] = []
        self._file = None
        self.num_bases = 0

    def __str__(self) -> str:
        return f"record '{self.id}' of {self._path}"

    def append(self, bases: bytes, folder: str) -> None:
        """Add the bases that follow; ``folder`` is where a temporary file may be."""
        self._pieces.append(bases)
        self.num_bases += len(bases)
        if self._file is None and self.num_bases > _MEMORY_BYTES:
            import tempfile  # loads a third of what this module does; short records do without

            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the record)
        if self._file is not None:
            self._file.writelines(self._pieces)
            self._pieces.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def forward(self, start: int, end: int) -> Iterator[bytes]:
        """Bases from start to end, in pieces."""
        for at in range(start, end, BLOCK_BYTES):
            yield self._read(at, min(at + BLOCK_BYTES, end))

    def backward(self, start: int, end: int) -> Iterator[bytes]:
        """The same bases from last to first, not complemented."""
        for at in range(end, start, -BLOCK_BYTES):
            yield self._read(max(at - BLOCK_BYTES, start), at)[::-1]

    def _read(self, start: int, end: int) -> bytes:
        if self._file is not None:
            self._file.seek(start)
            return self._file.read(end - start)
        if len(self._pieces) > 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0][start:end]


def _kept_records(path: str, folder: str) -> Iterator[_KeptRecord]:
    """Records of a file, each to be used before the next one is asked for."""
    record = None
    for header, bases in read_pieces(path):
        if header is not None:
            if record is not None:
                yield record
                record.close()
            record = _KeptRecord(path, record_id(header))
        record.append(bases, folder)
    yield record
    record.close()
