# SPDX-License-Identifier: Apache-2.0
"""Read VCF, plain, gzip or bgzip, line by line with line numbers, and write it again with more INFO fields.

Read here and not by pysam because results belong to lines: an annotated file is the input byte for byte, but for the
fields that are added, and pysam writes numbers anew. What is not VCF ends with an error that names the line; an ALT
that is no sequence is classified (``why_not_scored``). Line ends of Windows, a byte order mark, blank lines and a
missing last line break are repaired.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

from evo2_megatron.config import UserError
from evo2_megatron.data.fasta import open_fasta

FIXED_COLUMNS = (b"#CHROM", b"POS", b"ID", b"REF", b"ALT", b"QUAL", b"FILTER", b"INFO")

MAX_POSITION = 2**31 - 1
"""What BCF and htslib can hold, and more than any contig has."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_INFO = 7
_BASES = frozenset(b"ACGT")


class VcfRecord(NamedTuple):
    """The columns of a line that say what the variant is."""

    line: int
    """Line of the file, counted from 1."""

    contig: bytes
    position: int
    """POS: of the first base of REF, counted from 1; 0 is the telomere."""

    id: bytes
    ref: bytes
    """Upper case."""

    alts: tuple[bytes, ...]
    """As the file has them, but sequences in upper case."""


class VcfLine(NamedTuple):
    """A line without its end."""

    number: int
    """Counted from 1."""

    text: bytes
    columns: list[bytes] | None
    """None: of the header."""


class InfoField(NamedTuple):
    """What is added to INFO."""

    id: str
    type: str
    description: str


def read_vcf(path: str | os.PathLike[str]) -> Iterator[VcfRecord]:
    """Yield the records in the order of the file; a few lines are in memory at a time.

    Raises:
        UserError: No such file, damaged, or not VCF.
    """
    for line in read_lines(path):
        if line.columns is not None:
            yield _record(path, line)


def why_not_scored(ref: bytes, alt: bytes) -> str | None:
    """Why REF and ALT are no two different sequences of A, C, G and T; None: they are.

    ``no_alt`` (``.``), ``spanning_deletion`` (``*``), ``symbolic`` (``<DEL>``), ``breakend`` (``G[17:198[``, ``.A``),
    ``not_acgt`` (another letter in REF or ALT), ``same_as_ref``.
    """
    if alt == b".":
        return "no_alt"
    if alt == b"*":
        return "spanning_deletion"
    if b"[" in alt or b"]" in alt or alt.startswith(b".") or alt.endswith(b"."):
        return "breakend"
    if alt.startswith(b"<"):
        return "symbolic"
    if not _BASES.issuperset(ref) or not _BASES.issuperset(alt):
        return "not_acgt"
    return "same_as_ref" if ref == alt else None


def write_annotated(
    lines: Iterable[VcfLine],
    file: BinaryIO,
    fields: Sequence[InfoField],
    values: Iterator[tuple[str | None, ...]],
) -> None:
    """Write lines again, with INFO fields of one value per ALT.

    Fields of these names that are there already, and their header lines, are replaced.

    Args:
        lines: Of ``read_lines`` or ``make_lines``.
        file: Where to write.
        fields: What to add.
        values: For each record what each field is; None: nothing.
    """
    names = {field.id.encode() for field in fields}
    starts = tuple(b"##INFO=<ID=" + name + end for name in names for end in (b",", b">"))
    first = True
    for _, line, columns in lines:
        if first and not line.startswith(b"##fileformat="):
            file.write(b"##fileformat=VCFv4.2\n")
        first = False
        if line.startswith(FIXED_COLUMNS[0] + b"\t"):
            for name, kind, text in fields:
                file.write(f'##INFO=<ID={name},Number=A,Type={kind},Description="{text}">\n'.encode())
        if columns is not None:
            found = [] if columns[_INFO] == b"." else columns[_INFO].split(b";")
            kept = [item for item in found if item and item.partition(b"=")[0] not in names]
            kept += [f"{field.id}={value}".encode() for field, value in zip(fields, next(values)) if value is not None]
            columns[_INFO] = b";".join(kept) or b"."
            line = b"\t".join(columns)
        elif line.startswith(starts):
            continue
        file.write(line + b"\n")


def make_lines(records: Iterable[VcfRecord], lengths: Mapping[bytes, int]) -> Iterator[VcfLine]:
    """A file of these records: a header with the contigs and their bases, and what is not known left open."""
    header = [b"##fileformat=VCFv4.2"]
    header += [b"##contig=<ID=%s,length=%d>" % contig for contig in lengths.items()]
    header.append(b"\t".join(FIXED_COLUMNS))
    for number, text in enumerate(header, 1):
        yield VcfLine(number, text, None)
    for number, record in enumerate(records, len(header) + 1):
        position, alts = b"%d" % record.position, b",".join(record.alts)
        columns = [record.contig, position, record.id, record.ref, alts, b".", b".", b"."]
        yield VcfLine(number, b"\t".join(columns), columns)


def read_lines(path: str | os.PathLike[str]) -> Iterator[VcfLine]:
    """Every line but blank ones; the header has been checked, and that records have its columns.

    Raises:
        UserError: No such file, damaged, or not VCF.
    """
    num_columns = 0
    with open_fasta(path, kind="VCF") as stream:
        if isinstance(stream, io.RawIOBase):
            stream = io.BufferedReader(stream)
        for number, line in enumerate(stream, 1):
            line = line.rstrip(b"\r\n")
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
                _check_start(path, line)
            if not line.strip():
                continue
            if line.startswith(b"#"):
                if num_columns:
                    raise _error(path, number, "is a header line behind the column names; join files with bcftools")
                if not line.startswith(b"##"):
                    num_columns = _check_column_names(path, number, line)
                yield VcfLine(number, line, None)
                continue
            if not num_columns:
                raise _error(path, number, "comes before the line '#CHROM POS ID REF ALT ...'; a VCF file needs one")
            columns = line.split(b"\t")
            if len(columns) != num_columns:
                remedy = "separate columns by tabs" if b"\t" not in line else "is it cut off?"
                raise _error(path, number, f"has {len(columns)} columns, the header {num_columns}; {remedy}")
            yield VcfLine(number, line, columns)
    if not num_columns:
        raise UserError(f"{path} has no line '#CHROM POS ID REF ALT ...' and no records; give a VCF file")


def _check_start(path: str | os.PathLike[str], line: bytes) -> None:
    if line.startswith(b"BCF"):
        raise UserError(f"{path} is BCF; convert it: bcftools view -Oz -o variants.vcf.gz {path}")
    if b"\0" in line:
        raise UserError(f"{path} is not VCF: it is no text")


def _check_column_names(path: str | os.PathLike[str], number: int, line: bytes) -> int:
    columns = line.split(b"\t")
    if tuple(columns[: len(FIXED_COLUMNS)]) != FIXED_COLUMNS:
        names = " ".join(name.decode() for name in FIXED_COLUMNS)
        raise _error(path, number, f"must name the columns {names}, separated by tabs")
    return len(columns)


def _record(path: str | os.PathLike[str], line: VcfLine) -> VcfRecord:
    number, text, columns = line
    contig, position, name, ref, alt = columns[:5]
    if not position.isdigit():
        raise _error(path, number, f"has the position {_shown(position)}; POS is a whole number")
    digits = position.lstrip(b"0") or b"0"  # Python makes no number of more than 4,300 digits
    if len(digits) > len(str(MAX_POSITION)) or int(digits) > MAX_POSITION:
        raise _error(path, number, f"has the position {_shown(position)}; POS is at most {MAX_POSITION}")
    alts = tuple(a if a.startswith(b"<") or b"[" in a or b"]" in a else a.upper() for a in alt.split(b","))
    if not contig or not ref or b"" in alts:
        what = "CHROM" if not contig else "REF" if not ref else "ALT"
        raise _error(path, number, f"has an empty {what}; a deletion's REF and ALT share the base before it")
    if not text.isascii() and not b"\t".join(columns[:5]).isascii():
        raise _error(path, number, f"has characters other than ASCII: {_shown(b' '.join(columns[:5]))}")
    return VcfRecord(number, contig, int(digits), name, ref.upper(), alts)


def _error(path: str | os.PathLike[str], number: int, what: str) -> UserError:
    return UserError(f"{path}: line {number} {what}")


def _shown(text: bytes) -> str:
    return repr(text[:40].decode("utf-8", "backslashreplace"))
