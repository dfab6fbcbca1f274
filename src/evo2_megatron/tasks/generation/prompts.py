# SPDX-License-Identifier: Apache-2.0
"""Sequences to continue, from JSON Lines, FASTA or plain text, each plain or gzip.

The file's suffix decides. Under another name, what stands first does: ``>`` begins FASTA, ``{`` JSON Lines, and
anything else is text with one prompt per line.
"""

from __future__ import annotations

import gzip
import json
import string
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evo2_megatron.config import UserError
from evo2_megatron.data import tokenizer
from evo2_megatron.data.fasta import FastaRecord, read_fasta
from evo2_megatron.data.nucleotides import look_for_no_dna

FASTA_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".fas", ".frn")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")

_GZIP_MAGIC = b"\x1f\x8b"
_UPPER = {ord(letter): ord(letter.upper()) for letter in string.ascii_lowercase}


class Prompt(NamedTuple):
    """One sequence to continue."""

    id: str
    """Name that its record carries."""

    text: str
    """Bases and lineage tags, one character per token."""

    seed: int | None = None
    """Decides its random numbers; None: made from the run's seed and its number."""


def file_suffix(path: Path) -> str:
    """Last suffix in lower case, not counting ``.gz``."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts in the order of the file; an empty file has none.

    * JSON Lines: an object with ``prompt``, and if wanted ``id`` and ``seed``; other keys are ignored.
    * FASTA: the id is the first word of the header, the prompt is the sequence in its case.
    * Text: one prompt per line, without the white space around it.

    Where no id is given, it is the number of the line from 0. Blank lines are skipped, but counted.

    Raises:
        UserError: The file cannot be read, or something in it is no prompt; the message counts lines from 1.
    """
    path = Path(path)
    content = _read(path)
    suffix, start = file_suffix(path), content.lstrip()[:1]
    if not start:
        return []
    if suffix in FASTA_SUFFIXES or (suffix not in JSONL_SUFFIXES and start == b">"):
        return [_of_fasta(record, path) for record in read_fasta(path, content=content)]
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"Prompt file {path} is not UTF-8 text; convert it") from error
    # not splitlines(), which also breaks at characters that JSON allows inside a string
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n")) if line.strip()]
    if suffix in JSONL_SUFFIXES or start == b"{":
        return [_of_json(line, number, path) for number, line in lines]
    if start == b"@" and len(lines) > 2 and lines[2][1].startswith("+"):
        raise UserError(f"Prompt file {path} is FASTQ, whose lines are not all sequences; make FASTA of it")
    return [Prompt(str(number), line) for number, line in lines]


def encode_prompt(prompt: Prompt, vocab_size: int, *, keep_case: bool = False) -> list[int]:
    """Token ids of a prompt, in upper case unless ``keep_case``: what models read in training was.

    Raises:
        UserError: It is empty or has a character that is no token.
    """
    if not prompt.text:
        raise UserError(f"Prompt {prompt.id!r} is empty; give at least one character")
    outside = tokenizer.outside_vocabulary(prompt.text, vocab_size)
    if outside:
        raise UserError(
            f"Prompt {prompt.id!r} has {outside[0]!r} at character {prompt.text.index(outside[0]) + 1}, which is not "
            f"among the tokenizer's {vocab_size} tokens; remove it"
        )
    ids = tokenizer.encode(prompt.text, vocab_size)
    return ids if keep_case else [_UPPER.get(i, i) for i in ids]


def warn_of_no_dna(prompts: Sequence[Prompt]) -> None:
    """Log one line if prompts have letters that no DNA has: of a protein, U, or those of another kind of file."""
    texts = (prompt.text.encode("utf-8", "surrogatepass") for prompt in prompts)
    look_for_no_dna((prompt.id for prompt in prompts), texts, "prompts")


def _read(path: Path) -> bytes:
    """The whole file, decompressed, without a byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"Prompt file {path} cannot be read: {error.strerror}; check --prompt-file") from error
    if content.startswith(_GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"Prompt file {path} is damaged or cut off: {error}; decompress it with gunzip to check"
            ) from None
    return content.removeprefix(b"\xef\xbb\xbf")


def _of_fasta(record: FastaRecord, path: Path) -> Prompt:
    ids = tokenizer.encode_sequence(record.sequence, name=f"record {record.id!r} of {path}")
    return Prompt(record.id, tokenizer.decode(ids))


def _of_json(line: str, number: int, path: Path) -> Prompt:
    where = f"{path} line {number + 1}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(":")[0].partition(";")[0]
        raise UserError(f'{where} is not JSON ({reason}); write {{"id": "...", "prompt": "..."}}') from error
    if not isinstance(record, dict):
        raise UserError(f'{where} is not a JSON object; write {{"id": "...", "prompt": "..."}}')
    if "prompt" not in record:
        raise UserError(f"{where}: missing required 'prompt' field")
    if not isinstance(record["prompt"], str):
        raise UserError(f"{where}: 'prompt' is {record['prompt']!r}; it must be a string")
    seed = record.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise UserError(f"{where}: 'seed' is {seed!r}; it must be a whole number of 0 or more")
    name = record.get("id")
    if isinstance(name, (dict, list)) or not _is_text(str(name)):
        raise UserError(f"{where}: 'id' is {name!r}; it must be a string or a number")
    return Prompt(str(number if name is None else name), record["prompt"], seed)


def _is_text(text: str) -> bool:
    """Whether it can be written: JSON can name halves of characters, which are none."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
