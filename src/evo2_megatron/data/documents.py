# SPDX-License-Identifier: Apache-2.0
"""Records of FASTA files to documents of tokens, divided between splits, without torch or NumPy."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping

from evo2_megatron.config import UserError
from evo2_megatron.data.base_counts import BaseCounts
from evo2_megatron.data.fasta import BLOCK_BYTES, ReadState, read_pieces, record_id, same_name
from evo2_megatron.data.indexed_dataset import TokenCounter
from evo2_megatron.data.nucleotides import BACK_TRANSCRIBE, COMPLEMENT, COMPLEMENT_UPPER_DNA, TRANSCRIBE
from evo2_megatron.data.preprocess_config import PreprocessConfig
from evo2_megatron.data.splits import Splitter
from evo2_megatron.data.tokenizer import EOD, PAD, encode

_MEMORY_BYTES = 1 << 22  # a record that has to be read more than once goes to a temporary file beyond this
_MAX_NAMES = 1 << 18  # names of a file among which duplicates are looked for: about 17 MB
_PADDING_BYTES = 1 << 20  # at a time
_EOD_BYTE = bytes([EOD])
_IDENTITY = bytes(range(256))


class DocumentMaker:
    """Turns records into documents for one writer per split, and counts on the way."""

    def __init__(
        self, config: PreprocessConfig, writers: Mapping[str, TokenCounter], *, temporary_dir: str | None
    ) -> None:
        """Set up.

        Args:
            config: What to make.
            writers: Where documents go, by split. If they only count, bases are not looked at more than once.
            temporary_dir: Folder for long records that have to be read more than once; None: the system's.
        """
        self._config = config
        self._writers = writers
        self._counts_only = all(type(writer) is TokenCounter for writer in writers.values())
        self._temporary_dir = temporary_dir
        self._vocab_size = config.vocab_size()
        complement = COMPLEMENT_UPPER_DNA if config.complement_upper_case_only else COMPLEMENT
        self._forward = _letters(config)
        self._reverse = complement.translate(self._forward)
        # one stream of random numbers per purpose, so that one option does not change what another one draws
        seed = config.seed or 0
        self.splitter = Splitter(
            config.split_weights, seed, names=config.split_names(), whole_records=config.split_by == "contig"
        )
        self._strand_rng = random.Random(f"{seed}/strand")
        self._lineage_rng = random.Random(f"{seed}/lineage")
        self._names: set[int] = set()
        self.counts = BaseCounts()
        self.state = ReadState()
        self.num_records = self.num_skipped = 0
        self.unused_lineages = dict.fromkeys(config.taxonomy_data)
        """Keys of ``taxonomy_data`` that have not given a record its tag yet."""

        self.names_unchecked = False
        """Whether a file had too many records to look for duplicate names among all of them."""

    def add_file(self, path: str) -> Iterator[None]:
        """Read one FASTA file to its end; yields after every piece, for whoever shows progress.

        Raises:
            UserError: The file, or a record of it, cannot be used.
        """
        config = self._config
        self._names.clear()
        if (
            config.embed_reverse_complement
            or config.random_reverse_complement
            or config.nnn_filter
            or config.split_window_length
            or config.taxonomy_data
        ):
            return self._add_records(path)
        return self._add_in_one_pass(path)

    def _add_in_one_pass(self, path: str) -> Iterator[None]:
        """Every record is one document, forward and without a tag: write its bases as they come."""
        writer, name = None, ""
        table = None if self._forward == _IDENTITY else self._forward
        add = self.counts.add
        for header, bases in read_pieces(path, threads=self._config.workers, state=self.state):
            if header is not None:
                if writer is not None:
                    self._end_document(writer, name, path)
                name = self._begin_record(header, path)
                writer = self._writer_for(name, path, bases)
            add(bases, name, path)
            if writer is not None:
                writer.write_bytes(bases if table is None else bases.translate(table))
            yield
        if writer is not None:
            self._end_document(writer, name, path)

    def _begin_record(self, header: bytes, path: str) -> str:
        name = record_id(header)
        self.num_records += 1
        if len(self._names) < _MAX_NAMES:
            key = hash(name)
            if key in self._names:
                raise same_name(path, name)
            self._names.add(key)
        else:
            self.names_unchecked = True
        return name

    def _writer_for(self, name: str, path: str, bases: bytes) -> TokenCounter | None:
        if not bases:
            self._skip_empty(name, path)
            return None
        split = self.splitter.assign_record(name)
        if split is None:
            self.num_skipped += 1
            return None
        return self._writers[split]

    def _skip_empty(self, name: str, path: str) -> None:
        if not self._config.drop_empty_sequences:
            raise UserError(
                f"record '{name}' of {path} has no bases; set drop_empty_sequences to true to skip such records"
            )
        self.num_skipped += 1

    def _add_records(self, path: str) -> Iterator[None]:
        """Keep each record until it is complete, then write its windows."""
        record = None
        # what only counts needs no bases, unless it filters by them
        keep = not self._counts_only or self._config.nnn_filter
        try:
            for header, bases in read_pieces(path, threads=self._config.workers, state=self.state):
                if header is not None:
                    if record is not None:
                        self._add_windows(record, path)
                        record.close()
                    record = _KeptRecord(self._begin_record(header, path), self._temporary_dir if keep else None, keep)
                self.counts.add(bases, record.name, path)
                record.append(bases)
                yield
            self._add_windows(record, path)
        finally:
            if record is not None:
                record.close()

    def _add_windows(self, record: _KeptRecord, path: str) -> None:
        """Write the windows of a record, or the whole of it, on the strands asked for."""
        if not record.num_bases:
            self._skip_empty(record.name, path)
            return
        config = self._config
        length = config.split_window_length or record.num_bases
        windows = [(at, min(at + length, record.num_bases)) for at in range(0, record.num_bases, length)]
        if config.nnn_filter:
            kept = [window for window in windows if not _contains_nnn(record.forward(*window))]
            self.num_skipped += len(windows) - len(kept)
            windows = kept
        if not windows:
            return
        splits = self.splitter.assign_windows(record.name, len(windows))
        self.num_skipped += len(windows) - len(splits)
        both, chance = config.embed_reverse_complement, config.random_reverse_complement
        for (start, end), split in zip(windows, splits):
            reverse_first = bool(chance) and self._strand_rng.random() < chance
            for reverse in (reverse_first, not reverse_first) if both else (reverse_first,):
                self._write(self._writers[split], record, (start, end), reverse)
                self._end_document(self._writers[split], record.name, path)

    def _write(self, writer: TokenCounter, record: _KeptRecord, window: tuple[int, int], reverse: bool) -> None:
        """Write one document from a part of a record."""
        tag = self._tag(record.name)
        ids = encode(tag, self._vocab_size) if tag else []
        if self._counts_only:
            num = window[1] - window[0]
            num_tags = -(-num // (self._config.prompt_spacer_length - len(ids))) if ids else 0
            writer.document_length += num + num_tags * len(ids)
            return
        pieces, table = (
            (record.backward(*window), self._reverse) if reverse else (record.forward(*window), self._forward)
        )
        if table != _IDENTITY:
            pieces = (piece.translate(table) for piece in pieces)
        if ids:
            _write_tagged(writer, pieces, ids, self._config.prompt_spacer_length)
        else:
            for piece in pieces:
                writer.write_bytes(piece)

    def _end_document(self, writer: TokenCounter, name: str, path: str) -> None:
        if self._config.append_eod:
            writer.write_bytes(_EOD_BYTE)
        wanted = self._config.enforce_sample_length
        if wanted is not None:
            if writer.document_length > wanted:
                raise UserError(
                    f"record '{name}' of {path} makes {writer.document_length} tokens; enforce_sample_length is "
                    f"{wanted}; raise it, or set split_window_length"
                )
            padding = bytes([PAD]) * min(wanted - writer.document_length, _PADDING_BYTES)
            while writer.document_length < wanted:
                writer.write_bytes(padding[: wanted - writer.document_length])
        writer.end_document()

    def _tag(self, name: str) -> str | None:
        for key, lineage in self._config.taxonomy_data.items():
            if key in name:
                self.unused_lineages.pop(key, None)
                return lineage.tag(self._config.random_lineage_dropout, self._lineage_rng)
        return None


def _letters(config: PreprocessConfig) -> bytes:
    """256-byte table from what a FASTA file says to token ids, which are characters too."""
    table = _IDENTITY
    if config.force_uppercase:
        table = table.upper()
    if config.transcribe is not None:
        table = table.translate(TRANSCRIBE if config.transcribe == "transcribe" else BACK_TRANSCRIBE)
    return table


def _write_tagged(writer: TokenCounter, pieces: Iterable[bytes], tag: list[int], period: int) -> None:
    """Write tokens with the tag at every multiple of ``period``."""
    room = 0
    for piece in pieces:
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

    def __init__(self, name: str, folder: str | None, keep: bool) -> None:
        """``folder``: where a temporary file may be; None: the system's. ``keep``: False only counts."""
        self.name = name
        self._folder, self._keep = folder, keep
        self._pieces: list[bytes] = []
        self._file = None
        self.num_bases = 0

    def append(self, bases: bytes) -> None:
        """Add the bases that follow."""
        self.num_bases += len(bases)
        if not self._keep:
            return
        self._pieces.append(bases)
        if self._file is None and self.num_bases > _MEMORY_BYTES:
            import tempfile  # loads a third of what this module does; short records do without

            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed with the record)
        if self._file is not None:
            self._file.writelines(self._pieces)
            self._pieces.clear()

    def close(self) -> None:
        """Remove what was kept."""
        if self._file is not None:
            self._file.close()
        self._pieces.clear()

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
