# SPDX-License-Identifier: Apache-2.0
"""What a prediction head tells of bases, in files that genome browsers open: one for each output.

Shape legend: N bases of all sequences, C outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import numpy as np

from evo2_megatron.config import UserError
from evo2_megatron.data.labelled import Labelled
from evo2_megatron.data.labels import Labels
from evo2_megatron.tasks.heads.head_tables import Values, value_columns
from evo2_megatron.tasks.scoring.prediction_tables import Bases
from evo2_megatron.tasks.scoring.prediction_tracks import check_num_contigs, write_bedgraph, write_bigwig
from evo2_megatron.tasks.transfer import check_no_input

Kind = Literal["bedgraph", "bigwig"]

_BASES_AT_ONCE = 1 << 20


def check_tracks(kind: Kind | None, table: Path, labels: Labels, rows: Labelled, source: Path) -> None:
    """Raise UserError for what has no tracks: whole sequences, and bases of sequences without names of their own.

    Args:
        kind: What is to be written; None: nothing.
        table: The tracks are written beside it.
        labels, rows: What was learnt, and the sequences.
        source: What these were read from.
    """
    if kind is None:
        return
    if not labels.per_base:
        raise UserError("--tracks have a value for each base, and this head tells of whole sequences; leave it out")
    names = Counter(rows.names)
    unfit = next((name for name, count in names.items() if count > 1 or len(name.split()) != 1), None)
    if unfit is not None:
        raise UserError(f"--tracks: {unfit!r} names several sequences, or has spaces; give each a name of its own")
    if kind == "bigwig":
        check_num_contigs(len(names))
    check_no_input([path for _, path in _files(kind, table, labels)], [source])


def write_tracks(
    kind: Kind, table: Path, labels: Labels, rows: Labelled, outputs_NC: np.ndarray, values: Values
) -> None:
    """Write one file for each output beside a table, ``TABLE.probability_exon.bigwig``.

    Args:
        kind: What to write.
        table: A file of ``head_tables``.
        labels, rows, outputs_NC, values: As for ``head_tables.write``, of bases.
    """
    in_order = range(len(rows.ids))
    by_name = sorted(in_order, key=lambda row: rows.names[row].encode())  # as readers of bigWig expect
    for number, (column, path) in enumerate(_files(kind, table, labels)):
        if kind == "bigwig":
            lengths = {rows.names[row]: len(rows.ids[row]) for row in by_name}
            write_bigwig(path, column, lengths, _bases(rows, by_name, column, number, outputs_NC, values))
        else:
            write_bedgraph(path, column, _bases(rows, in_order, column, number, outputs_NC, values))


def _files(kind: Kind, table: Path, labels: Labels) -> list[tuple[str, Path]]:
    """Of each output, its name without characters that files do not have, and its file."""
    columns = [quote(name, safe="") for name in value_columns(labels)]
    return [(column, table.with_name(f"{table.stem}.{column}.{kind}")) for column in columns]


def _bases(
    rows: Labelled, order: Sequence[int], column: str, number: int, outputs_NC: np.ndarray, values: Values
) -> Iterator[Bases]:
    """Values of output ``number``, a part of a sequence at a time."""
    ends = rows.ends
    for row in order:
        ids = rows.ids[row]
        for start in range(0, len(ids), _BASES_AT_ONCE):
            letters = ids[start : start + _BASES_AT_ONCE]
            first = ends[row] - len(ids) + start
            of_part = values(outputs_NC[first : first + len(letters)])[:, number].astype(np.float32)
            yield Bases(rows.names[row], np.arange(start, start + len(letters)) + 1, letters, {column: of_part})
