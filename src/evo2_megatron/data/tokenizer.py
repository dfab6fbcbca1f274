# SPDX-License-Identifier: Apache-2.0
"""The nucleotide tokenizer as a table, and where its Hugging Face folders are.

A token is a character and its id is the character's code point, except that ids 0 to 4 are special tokens. Because
the vocabularies of 256 and 512 agree below 256, data made with one can be read with the other.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from evo2_megatron.config import UserError

SPECIAL_TOKENS = ("<EOS>", "<PAD>", "<BOS>", "<SEP>", "<UNK>")
"""Special tokens; the id of each is its position. ``<EOS>`` also ends a document (EOD)."""

EOD, PAD, BOS, SEP, UNK = range(len(SPECIAL_TOKENS))
VOCAB_SIZES = (256, 512)
DEFAULT_VOCAB_SIZE = 256

INVALID = 0xFF
_NOT_IN_SEQUENCES = b"<>&"
SEQUENCE_TOKENS = bytes(INVALID if i < 32 or i >= 127 or i in _NOT_IN_SEQUENCES else i for i in range(256))
"""256-byte table from the bytes of a sequence file to token ids. ``INVALID`` marks what a sequence may not hold: what
does not print in ASCII, among it the ids of special tokens; ``<``, which begins their names; ``>``, which is a header
whose line break is missing; ``&``, which begins what a web page writes for them."""

_FOLDER = Path(__file__).parents[1] / "tokenizers"
_SPECIAL_PATTERN = re.compile("(" + "|".join(SPECIAL_TOKENS) + ")")
_LOW_TO_UNK = bytes(UNK if i <= UNK else i for i in range(256))


def tokenizer_dir(vocab_size: int = DEFAULT_VOCAB_SIZE) -> Path:
    """Folder of the Hugging Face tokenizer that ships with this package.

    Raises:
        UserError: There is none with this vocabulary size.
    """
    if vocab_size not in VOCAB_SIZES:
        raise UserError(f"no nucleotide tokenizer has {vocab_size} tokens; choose from {VOCAB_SIZES}")
    return _FOLDER / f"nucleotide_fast_tokenizer_{vocab_size}"


def vocabulary(vocab_size: int) -> dict[str, int]:
    """Token to id, in the order of ids."""
    return {token: i for i, token in enumerate(SPECIAL_TOKENS)} | {
        chr(i): i for i in range(len(SPECIAL_TOKENS), vocab_size)
    }


def read_vocab_size(folder: str | os.PathLike[str]) -> int:
    """Vocabulary size of a tokenizer folder, after checking that it is this tokenizer.

    Raises:
        UserError: The folder holds no tokenizer, or one whose ids are not code points.
    """
    path = Path(folder, "tokenizer.json")
    try:
        model = json.loads(path.read_bytes())["model"]
        vocab = dict(model["vocab"])
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); a nucleotide tokenizer is {tokenizer_dir()}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not define a tokenizer; a nucleotide tokenizer is {tokenizer_dir()}") from None
    if vocab != vocabulary(len(vocab)):
        raise UserError(f"the tokenizer in {folder} is not one token per character; use {tokenizer_dir()}")
    return len(vocab)


def fetch_tokenizer(name: str) -> Path:
    """Folder of a tokenizer of the Hugging Face hub, downloaded if it is not in the local cache.

    Raises:
        UserError: There is none of this name, or it cannot be had.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json")).parent
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot get the tokenizer {name} from the hub: {reason}; a nucleotide tokenizer is {tokenizer_dir()}"
        ) from None


def encode(text: str, vocab_size: int = DEFAULT_VOCAB_SIZE) -> list[int]:
    """Ids of a text; nothing is added at either end.

    A special token's literal name gives its id. Characters U+0000 to U+0004 and those from code point ``vocab_size``
    on give ``UNK``; ``outside_vocabulary`` finds them beforehand.
    """
    if "<" not in text:
        return _encode_plain(text, vocab_size)
    ids: list[int] = []
    for part in _SPECIAL_PATTERN.split(text):
        ids += [SPECIAL_TOKENS.index(part)] if part in SPECIAL_TOKENS else _encode_plain(part, vocab_size)
    return ids


def _encode_plain(text: str, vocab_size: int) -> list[int]:
    if text.isascii() and vocab_size >= 128:
        return list(text.encode("ascii").translate(_LOW_TO_UNK))
    return [i if UNK < i < vocab_size else UNK for i in map(ord, text)]


def decode(ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
    """Text of ids; special tokens appear by their names, or not at all.

    Raises:
        ValueError: An id is negative or beyond Unicode.
    """
    if skip_special_tokens:
        ids = [i for i in ids if i > UNK or i < 0]
    return "".join(SPECIAL_TOKENS[i] if 0 <= i <= UNK else chr(i) for i in ids)


def outside_vocabulary(text: str, vocab_size: int = DEFAULT_VOCAB_SIZE) -> list[str]:
    """Characters that have no token of their own, each once, in order of first occurrence."""
    return [c for c in dict.fromkeys(text) if not UNK < ord(c) < vocab_size]


def encode_sequence(bases: bytes, *, name: str) -> bytes:
    """Ids of a sequence, one byte each, by ``SEQUENCE_TOKENS``; a hundred times faster than text.

    Args:
        bases: As read from a file.
        name: What to call the sequence in an error.

    Raises:
        UserError: The sequence holds a byte that the table does not allow.
    """
    tokens = bases.translate(SEQUENCE_TOKENS)
    if INVALID in tokens:
        bad = bases[tokens.index(INVALID)]
        raise UserError(f"{name} contains {bytes([bad])!r}, which no sequence may hold; {_advice(bad)}")
    return tokens


def _advice(character: int) -> str:
    if character == ord(">"):
        return "a header must begin a line: is a line break missing before it?"
    if character == ord("\r"):
        return "line ends are lone carriage returns: convert the file, for example with mac2unix"
    return "a FASTA file is plain text of bases: is it damaged, or of another kind?"
