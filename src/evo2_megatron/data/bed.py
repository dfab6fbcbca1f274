# SPDX-License-Identifier: Apache-2.0
"""Intervals of a genome from BED: contig, start and end between tabs; 0-based, end excluded.

Read here and not by a library, so that what is wrong ends with an error that names the line. Header lines of browsers
(``track``, ``browser``) and comments are passed over.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from evo2_megatron.config import UserError
from evo2_megatron.data.fasta import open_fasta

_WHOLE_NUMBER = re.compile("[0-9]{1,18} *")


class Interval(NamedTuple):
    """0-based, end excluded, on the forward strand."""

    contig: str
    start: int
    end: int
    name: str = ""
    """Fourth column; empty where the file has none."""

    strand: str = "+"
    """``+`` or ``-``; ``+`` where the file does not say."""


def read_bed(path: str | os.PathLike[str], *, named: bool = False) -> list[Interval]:
    """Lines of a BED file, plain, gzip or bgzip.

    Args:
        path: File.
        named: Each line must have a name in the fourth column.

    Raises:
        UserError: No such file; a line that is none; or no interval at all.
    """
    has = "contig, start, end and name between tabs" if named else "contig, start and end between tabs"
    try:
        with open_fasta(path, kind="BED") as stream:
            lines = stream.read().decode().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"cannot read BED file {path}: it is not text") from None
    except OSError as error:
        raise UserError(f"cannot read BED file {path}: {error.strerror}") from None
    intervals = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#") or line.split(None, 1)[0] in ("track", "browser"):
            continue
        fields = line.split("\t")
        if len(fields) < 3 + named or not all(map(_WHOLE_NUMBER.fullmatch, fields[1:3])):
            raise UserError(f"{path}, line {number}: BED has {has}")
        name = fields[3] if len(fields) > 3 else ""
        strand = "-" if len(fields) > 5 and fields[5].strip() == "-" else "+"
        interval = Interval(fields[0], int(fields[1]), int(fields[2]), name, strand)
        if interval.start >= interval.end:
            raise UserError(f"{path}, line {number}: start {interval.start} is not before end {interval.end}")
        intervals.append(interval)
    if not intervals:
        raise UserError(f"{path} has no intervals; BED has {has}")
    return intervals


def check_within(intervals: Iterable[Interval], lengths: Mapping[str, int], path: str | os.PathLike[str]) -> None:
    """Raise UserError for an interval that lies outside the genome, whose contigs have ``lengths`` bases."""
    for interval in intervals:
        if interval.contig not in lengths:
            raise UserError(f"{path} names contig '{interval.contig}', which the FASTA file does not have")
        if interval.end > lengths[interval.contig]:
            raise UserError(
                f"{path}: '{interval.name or interval.contig}' ends at {interval.end}, beyond the "
                f"{lengths[interval.contig]} bases of {interval.contig}; are both files of the same assembly?"
            )
