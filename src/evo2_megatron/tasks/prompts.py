# SPDX-License-Identifier: Apache-2.0
"""The two JSON Lines files of generation: prompts in, records out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from evo2_megatron.config import UserError

Record = dict[str, Any]
"""One line of the output file."""


class Prompt(NamedTuple):
    """One sequence to continue."""

    id: str
    """Name that its record carries."""

    text: str
    """Bases and lineage tags, one character per token; case matters."""


def read_prompts(path: Path) -> list[Prompt]:
    """Read one prompt per line: a JSON object with ``prompt``, and ``id`` if its line number from 0 will not do.

    Blank lines are skipped, but counted; other keys are ignored.

    Raises:
        UserError: The file cannot be read, or a line is no such object; the message counts lines from 1.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"Prompt file {path} cannot be read: {error.strerror}; check --prompt-file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"Prompt file {path} is not UTF-8 text; convert it") from error
    # not splitlines(), which also breaks at characters that JSON allows inside a string
    lines = enumerate(text.split("\n"))
    return [_parse(line, number, path) for number, line in lines if line.strip()]


def _parse(line: str, number: int, path: Path) -> Prompt:
    where = f"{path} line {number + 1}"
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f'{where} is not JSON ({error.msg}); write {{"id": "...", "prompt": "..."}}') from error
    if not isinstance(record, dict):
        raise UserError(f'{where} is not a JSON object; write {{"id": "...", "prompt": "..."}}')
    if "prompt" not in record:
        raise UserError(f"{where}: missing required 'prompt' field")
    if not isinstance(record["prompt"], str):
        raise UserError(f"{where}: 'prompt' is {record['prompt']!r}; it must be a string")
    return Prompt(str(record.get("id", number)), record["prompt"])


class RecordFile:
    """JSON Lines file that takes its name only when it is complete; a context manager.

    Records are added to ``<path>.part`` as they finish, in any order, so that an interrupted run leaves what it has;
    ``finish`` writes them in the order of the prompts.
    """

    def __init__(self, path: Path) -> None:
        """Open the ``.part`` file, in a folder made if need be; UserError if that cannot be."""
        self._path = Path(path)
        self._part = self._path.with_name(f"{self._path.name}.part")
        if self._path.is_dir():
            raise UserError(f"Output file {path} is a folder; give a file name")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._part.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"Output file {path} cannot be written: {error.strerror}; choose another path") from error

    def add(self, records: Iterable[Record]) -> None:
        """Append finished records and hand them to the operating system."""
        self._stream.writelines(f"{json.dumps(record)}\n" for record in records)
        self._stream.flush()

    def finish(self, records: Iterable[Record]) -> None:
        """Replace what was added by all records in their final order, and give the file its name."""
        ordered = self._path.with_name(f"{self._path.name}.ordered")
        ordered.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
        ordered.replace(self._path)
        self._part.unlink()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close; a ``.part`` file without a record goes."""
        self._stream.close()
        if self._part.exists() and not self._part.stat().st_size:
            self._part.unlink()
