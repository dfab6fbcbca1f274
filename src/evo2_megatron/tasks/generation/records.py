# SPDX-License-Identifier: Apache-2.0
"""What generation writes: one record per continuation, as JSON Lines, FASTA or a table.

* JSON Lines hold everything.
* FASTA: the header has the name, then ``key=value`` for each of seed, finish_reason, numbers of tokens, score and
  mean log-probability of guided generation and, if log-probabilities were asked for, their sum and mean in nat; the
  sequence has lines of 60.
* text: a table with tabs, a heading first; a column has the score of guided generation; the last, if asked for, has
  the log-probabilities, with commas between.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from evo2_megatron.config import UserError
from evo2_megatron.runtime.file_lock import lock_alone
from evo2_megatron.tasks.generation.completion import Generation
from evo2_megatron.tasks.generation.prompts import FASTA_SUFFIXES, Prompt, file_suffix
from evo2_megatron.tasks.transfer import file_behind

logger = logging.getLogger(__name__)

Record = dict[str, Any]
"""One continuation, as a line of JSON has it."""

FORMATS = ("jsonl", "fasta", "text")
LINE_BASES = 60
"""Of FASTA, as samtools and Biopython write it."""

_TEXT_SUFFIXES = (".txt", ".tsv")


def make_record(
    prompt: Prompt, generation: Generation, *, num_prompt_tokens: int, seed: int, sample: int | None
) -> Record:
    """The record of one continuation; ``sample`` is its number where a prompt has several, else None."""
    num_new = len(generation.token_ids)
    record: Record = {"id": prompt.id}
    if sample is not None:
        record["sample"] = sample
    record |= {"prompt": prompt.text, "completion": generation.text, "finish_reason": generation.finish_reason}
    if generation.stop_string is not None:
        record["stop_string"] = generation.stop_string
    record["usage"] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new,
        "total_tokens": num_prompt_tokens + num_new,
    }
    record["seed"] = seed
    if generation.log_probs is not None:
        record["logprobs"] = {"completion_logprobs": generation.log_probs}
    return record


def format_of(path: Path) -> str:
    """One of FORMATS, by the suffix of an output file; JSON Lines unless it says otherwise."""
    suffix = file_suffix(path)
    if suffix in FASTA_SUFFIXES:
        return "fasta"
    return "text" if suffix in _TEXT_SUFFIXES else "jsonl"


def sequence_name(prompt_id: str, sample: int | None) -> str:
    """Name in FASTA and text: white space becomes ``_``; the sample's number comes after a dot."""
    name = "_".join(prompt_id.split())
    return name if sample is None else f"{name}.{sample}"


def check_format(format_name: str, names: Sequence[str], *, include_prompt: bool) -> None:
    """Raise UserError unless records of these names can be written so."""
    if include_prompt and format_name == "jsonl":
        raise UserError(
            "every record of JSON Lines has its prompt; leave out --include-prompt, or write FASTA or text"
        )
    if format_name == "fasta":
        _check_names(names)


def _check_names(names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if not name:
            raise UserError("a prompt has an empty id, and a FASTA record needs a name; give it one, or write .jsonl")
        if name in seen:
            raise UserError(f"two FASTA records would be named {name!r}; give each prompt its own id, or write .jsonl")
        seen.add(name)


def write_as(
    format_name: str, records: Iterable[Record], *, include_prompt: bool = False, heading: bool = True
) -> str:
    """Text of all records.

    Args:
        format_name: One of FORMATS.
        records: What to write.
        include_prompt: In FASTA and text, the prompt stands before the completion.
        heading: Begin a table with the names of its columns.

    Raises:
        UserError: A sequence has a character that FASTA or a table cannot hold.
    """
    if format_name == "jsonl":
        return "".join(f"{json.dumps(record)}\n" for record in records)
    if format_name == "fasta":
        return "".join(_fasta(record, include_prompt) for record in records)
    rows = list(records)
    return _heading(rows) * heading + "".join(_row(record, include_prompt) for record in rows)


def _heading(records: Sequence[Record]) -> str:
    # scores and log-probabilities have a column if the records have them
    columns = ["id", "seed", "finish_reason", *["score"] * any("score" in record for record in records), "sequence"]
    return "\t".join(columns + ["log_probs"] * any("logprobs" in record for record in records)) + "\n"


def _row(record: Record, include_prompt: bool) -> str:
    cells = [_name(record), str(record["seed"]), record["finish_reason"]]
    if "score" in record:
        cells.append(f"{record['score']:.6g}")
    cells.append(_sequence(record, include_prompt, also=" >"))
    if "logprobs" in record:
        cells.append(",".join(f"{x:.6g}" for x in record["logprobs"]["completion_logprobs"]))
    return "\t".join(cells) + "\n"


def _fasta(record: Record, include_prompt: bool) -> str:
    values = {"seed": record["seed"], "finish_reason": record["finish_reason"], **record["usage"]}
    if "score" in record:
        values["score"] = f"{record['score']:.6g}"
        if record["log_prob_mean"] is not None:
            values["log_prob_mean"] = f"{record['log_prob_mean']:.6g}"
    if "logprobs" in record:
        log_probs = record["logprobs"]["completion_logprobs"]
        total = math.fsum(log_probs)
        values["log_prob_sum"] = f"{total:.6g}"
        if log_probs:
            values["log_prob_mean"] = f"{total / len(log_probs):.6g}"
    header = " ".join([_name(record), *(f"{key}={value}" for key, value in values.items())])
    sequence = _sequence(record, include_prompt)
    lines = [sequence[i : i + LINE_BASES] for i in range(0, len(sequence), LINE_BASES)]
    return "".join(f"{line}\n" for line in (f">{header}", *lines))


def _name(record: Record) -> str:
    return sequence_name(record["id"], record.get("sample"))


def _sequence(record: Record, include_prompt: bool, *, also: str = "") -> str:
    """Sequence of a record; UserError unless it is printable ASCII without ``>`` and spaces, or ``also``."""
    sequence = record["prompt"] * include_prompt + record["completion"]
    bad = [c for c in sequence if (not "!" <= c <= "~" or c == ">") and c not in also]
    if bad:
        raise UserError(
            f"the sequence of {_name(record)!r} has {bad[0]!r}, which this format cannot hold; draw with --alphabet "
            "ACGT, or write .jsonl"
        )
    return sequence


def part_of(path: Path, number: int | None = None) -> Path:
    """Where the finished records of a file are until all are, or those of an earlier run that did not end."""
    return path.with_name(f"{path.name}.part" if number is None else f"{path.name}.part.{number}")


class RecordFile:
    """A file of records that takes its name only when it is complete; a context manager.

    Records are added to ``<path>.part`` as JSON Lines as they finish, in any order, so that an interrupted run leaves
    what it has; ``finish`` writes them in the order of the prompts and in the format asked for.
    """

    def __init__(self, path: Path, *, format_name: str | None = None, include_prompt: bool = False) -> None:
        """Open the ``.part`` file, in a folder made if need be; UserError if that cannot be.

        ``format_name``: one of FORMATS; None: by the suffix.
        """
        self._path = file_behind(Path(path))
        self._format = format_name or format_of(Path(path))
        self._include_prompt = include_prompt
        self._part = part_of(self._path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._begin()
        except OSError as error:
            raise UserError(f"Output file {path} cannot be written: {error.strerror}; choose another path") from error

    def _begin(self) -> TextIO:
        """The empty ``.part`` file, for this process alone; what an earlier run left in it gets another name."""
        stream = self._part.open("a", encoding="utf-8")
        with contextlib.ExitStack() as closing:
            closing.callback(stream.close)
            lock_alone(stream, self._path, choose="file")
            if not stream.tell():
                closing.pop_all()
                return stream
            kept = next(path for n in itertools.count(1) if not (path := part_of(self._path, n)).exists())
            self._part.rename(kept)
            logger.warning("What an earlier run had finished of %s is kept in %s", self._path, kept)
        return self._begin()

    def add(self, records: Iterable[Record]) -> None:
        """Append finished records and hand them to the operating system; UserError if it refuses them."""
        with self._disk_errors():
            self._stream.write(write_as("jsonl", records))
            self._stream.flush()

    def finish(self, records: Iterable[Record]) -> None:
        """Replace what was added by all records in their final order, and give the file its name.

        A name that ends in ``.gz`` is compressed.

        Raises:
            UserError: A sequence does not fit the format, or the disk is full; the ``.part`` file keeps the records.
        """
        try:
            content = write_as(self._format, records, include_prompt=self._include_prompt).encode()
        except UserError as error:
            raise UserError(f"{error}; the records are kept as JSON Lines in {self._part}") from None
        ordered = self._path.with_name(f"{self._path.name}.ordered")
        compressed = self._path.suffix.lower() == ".gz"
        try:
            with self._disk_errors():
                ordered.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
                ordered.replace(self._path)
        finally:
            ordered.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"Output file {self._path} cannot be written: {error.strerror}; make room. What was written before is "
                f"in {self._part}"
            ) from error

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close; a ``.part`` file without a record goes."""
        self._stream.close()
        if self._part.exists() and not self._part.stat().st_size:
            self._part.unlink()
