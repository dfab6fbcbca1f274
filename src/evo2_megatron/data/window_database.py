# SPDX-License-Identifier: Apache-2.0
"""SQLite files of sharded training data: which windows of which contigs make up a split, and the contigs' sequences.

A window database has the tables ``metadata(key, value)`` and ``window_mappings(window_idx, sequence_id,
window_in_seq_idx)``: window number ``window_idx`` of the split begins at base ``window_in_seq_idx * stride`` of a
contig. Sequences are in ``<folder>/<sample>/glm_dataset_<sample>.sqlite``, table ``sequences(contig_id,
nt_sequence)``.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from evo2_megatron.config import UserError

_MAX_OPEN = 64  # sequence databases that a process keeps open
_TABLES = """
CREATE TABLE metadata (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE window_mappings (
    window_idx INTEGER PRIMARY KEY, sequence_id TEXT NOT NULL, window_in_seq_idx INTEGER NOT NULL
);
"""
_INDEX = "CREATE INDEX idx_sequence_id ON window_mappings (sequence_id)"


class WindowPlan(NamedTuple):
    """How contigs are cut into windows."""

    window_size: int
    """Bases."""

    stride: int
    """Bases from the start of a window to that of the next."""

    min_length: int
    """Windows with fewer bases are left out; 0 keeps all."""


class WindowTotals(NamedTuple):
    """What a window database holds."""

    num_windows: int
    num_sequences: int
    """Contigs with at least one window."""


def num_windows(length: int, plan: WindowPlan, *, drop_tails: bool = False) -> int:
    """Windows of a contig of so many bases, before short ones are left out.

    The last one holds the tail, which may be shorter than a window; ``drop_tails`` leaves out a tail that is shorter
    than a stride, as the former builder did.
    """
    beyond = max(0, length - plan.window_size)
    return 1 + (beyond // plan.stride if drop_tails else -(-beyond // plan.stride))


def write_window_database(
    path: str | os.PathLike[str], contigs: Iterable[tuple[str, int]], plan: WindowPlan, *, drop_tails: bool = False
) -> WindowTotals:
    """Cut contigs into windows and write the database, replacing an older one when it is complete.

    Args:
        path: The file.
        contigs: Names and lengths in bases; windows are numbered in this order.
        plan: How to cut.
        drop_tails: See ``num_windows``.

    Raises:
        UserError: No window is left, or the file cannot be written.
    """
    final = Path(path)
    temporary = final.with_name(f"{final.name}.tmp")
    totals = [0, 0]

    def windows() -> Iterator[tuple[int, str, int]]:
        for name, length in contigs:
            before = totals[0]
            for number in range(num_windows(length, plan, drop_tails=drop_tails)):
                # with a stride longer than a window, the last one may begin where the contig ends
                if min(plan.window_size, length - number * plan.stride) >= max(1, plan.min_length):
                    yield totals[0], name, number
                    totals[0] += 1
            totals[1] += totals[0] > before

    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as database:
            # the file gets its name when it is complete, so nothing has to be undone
            database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + _TABLES + "BEGIN;")
            database.executemany("INSERT INTO window_mappings VALUES (?, ?, ?)", windows())
            if not totals[0]:
                raise UserError(
                    f"no window has {plan.min_length} bases; lower --window-min-length-threshold, or check the lengths"
                )
            database.execute(_INDEX)
            metadata = {
                "window_size": plan.window_size,
                "stride": plan.stride,
                "window_min_length_threshold": plan.min_length,
                "total_windows": totals[0],
                "distinct_sequences": totals[1],
            }
            database.executemany("INSERT INTO metadata VALUES (?, ?)", metadata.items())
            database.execute("COMMIT")
        temporary.replace(final)
    except (OSError, sqlite3.Error, OverflowError) as error:  # a number of the plan that SQLite does not hold
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return WindowTotals(*totals)


class WindowDatabase:
    """Looks up windows by number. Can be copied to other processes, each of which opens the file anew."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the metadata.

        Raises:
            UserError: No such file, or it is no window database.
        """
        self._database = Database(path)
        try:
            metadata = dict(self._database.rows("SELECT key, value FROM metadata"))
            self.plan = WindowPlan(
                metadata["window_size"], metadata["stride"], metadata.get("window_min_length_threshold", 0)
            )
            self._num_windows = metadata["total_windows"]
        except KeyError as error:
            raise UserError(
                f"{path} does not say its {error.args[0]}; make it with bionemo_precompute_windows"
            ) from None

    def __len__(self) -> int:
        return self._num_windows

    def window(self, number: int) -> tuple[str, int]:
        """Contig and its first base, from 0, of a window.

        Raises:
            UserError: The database has no such window, although it says so.
        """
        rows = self._database.rows(
            "SELECT sequence_id, window_in_seq_idx FROM window_mappings WHERE window_idx = ?", number
        )
        if not rows:
            raise UserError(f"{self._database.path} lacks window {number} of {len(self)}; make it again")
        name, number_in_sequence = rows[0]
        return name, number_in_sequence * self.plan.stride


def open_windows(
    window_db: str | os.PathLike[str], *, stride: int | None = None, min_length: int | None = None
) -> WindowDatabase:
    """Open a window database and check it against what the user says about it.

    Raises:
        UserError: It is none, or was made in another way.
    """
    windows = WindowDatabase(window_db)
    for name, given, stored in (
        ("--stride", stride, windows.plan.stride),
        ("--window-min-length-threshold", min_length, windows.plan.min_length),
    ):
        if given is not None and given != stored:
            raise UserError(f"{window_db} was made with {name} {stored}, not {given}; leave the flag out")
    return windows


class SequenceDatabases:
    """Parts of the sequences in a folder of databases, one for each sample."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Find the databases.

        Raises:
            UserError: There are none.
        """
        self._folder = Path(folder)
        paths = sorted(self._folder.glob("*/glm_dataset_*.sqlite"))
        self._paths = {path.stem.removeprefix("glm_dataset_"): path for path in paths}
        if not self._paths:
            raise UserError(f"{folder} has no sequence database; they are <sample>/glm_dataset_<sample>.sqlite in it")
        self._open: dict[str, Database] = {}

    def bases(self, contig: str, start: int, num: int) -> str:
        """``num`` bases from ``start`` on, 0-based, or fewer at the end of the contig.

        Raises:
            UserError: No database has the contig.
        """
        database = self._database_of(contig)
        rows = database.rows(
            "SELECT CAST(substr(nt_sequence, ?, ?) AS TEXT) FROM sequences WHERE contig_id = ?", start + 1, num, contig
        )
        if not rows:
            raise UserError(f"{database.path} has no sequence '{contig}'; were the windows made from other data?")
        return rows[0][0]

    def _database_of(self, contig: str) -> Database:
        sample = next(iter(self._paths)) if len(self._paths) == 1 else _sample_of(contig)
        if sample not in self._paths:
            raise UserError(f"{self._folder} has no database for sample '{sample}' of contig '{contig}'")
        if sample not in self._open:
            if len(self._open) == _MAX_OPEN:
                del self._open[next(iter(self._open))]
            self._open[sample] = Database(self._paths[sample])
        return self._open[sample]


def _sample_of(contig: str) -> str:
    """``BCR__EXT-SAMPLE1__CT1-1`` is of ``SAMPLE1``."""
    parts = contig.split("__")
    return ".".join(parts[1].split("-")[1:]) if len(parts) > 1 else ""


class Database:
    """A SQLite file that is only read, by every process through a connection of its own."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raise UserError if there is no such file; it is opened when it is first asked."""
        self.path = Path(path).absolute()
        if not self.path.is_file():
            raise UserError(f"no such database: {path}")
        self._connection: sqlite3.Connection | None = None
        self._process = 0

    def rows(self, query: str, *values: object) -> list[tuple]:
        """Answer of a query.

        Raises:
            UserError: The file is no database, or not of this kind.
        """
        try:
            if self._connection is None or self._process != os.getpid():  # one that a fork copied must not be used
                self._connection = sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)
                self._process = os.getpid()
            return self._connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise UserError(f"cannot read {self.path}: {error}") from None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_connection": None}
