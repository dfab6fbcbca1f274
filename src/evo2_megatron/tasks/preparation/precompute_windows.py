# SPDX-License-Identifier: Apache-2.0
"""Cut the contigs that a Parquet file lists into windows for training."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

from evo2_megatron.config import UserError
from evo2_megatron.data.window_database import WindowPlan, WindowTotals, write_window_database
from evo2_megatron.tasks.transfer import check_no_input, file_behind

logger = logging.getLogger(__name__)

_COLUMNS = ("contig_id", "length")


def precompute_windows(table_path: Path, output: Path, plan: WindowPlan, *, drop_tails: bool = False) -> WindowTotals:
    """Make a window database for one split.

    Args:
        table_path: Parquet with the columns ``contig_id`` (text) and ``length`` (bases).
        output: The database.
        plan: How to cut.
        drop_tails: Leave out what follows a contig's last whole stride, as the former builder did.

    Raises:
        UserError: The table or the plan is wrong, or the output cannot be written.
    """
    if plan.window_size < 1 or plan.stride < 1 or plan.min_length < 0:
        raise UserError("--window-size and --stride must be 1 or more, --window-min-length-threshold 0 or more")
    check_no_input([output], [table_path])
    if plan.stride > plan.window_size:
        logger.warning(
            "--stride %d is longer than --window-size %d: %d bases after each window are in none",
            plan.stride,
            plan.window_size,
            plan.stride - plan.window_size,
        )
    return write_window_database(file_behind(output), _contigs(table_path), plan, drop_tails=drop_tails)


def _contigs(path: Path) -> list[tuple[str, int]]:
    """Names and lengths, in the order of the names."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot read {path} as Parquet: {reason}") from None
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {' and no '.join(missing)}; it has {', '.join(table.column_names)}")
    names, lengths = (table.column(name).to_pylist() for name in _COLUMNS)
    for row, (name, length) in enumerate(zip(names, lengths, strict=True), 1):
        if not isinstance(name, str) or not isinstance(length, int) or length < 1:
            raise UserError(f"{path}, row {row}: contig_id is {name!r} and length {length!r}; text and bases, above 0")
    contigs = sorted(zip(names, lengths, strict=True))
    for (name, _), (other, _) in pairwise(contigs):
        if name == other:
            raise UserError(f"{path} lists contig '{name}' twice; keep one")
    return contigs
