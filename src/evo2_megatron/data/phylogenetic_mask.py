# SPDX-License-Identifier: Apache-2.0
"""Which tokens belong to lineage tags (``|d__Bacteria;...|``) and are not to be scored.

A sample begins and ends anywhere, so a tag may be cut at either end. The rules decide from pipes alone which regions
are tags; they are those that the Evo 2 models were trained with, and are kept exactly.
"""

from __future__ import annotations

import numpy as np

PIPE = ord("|")
CONTROL_TAGS = "@#"
"""Joins: ``@`` between the pieces of a stitched transcript, ``#`` between contigs."""

MAX_TAG_LENGTH = 2048
"""Tokens; a region that would be a tag is taken for DNA from this length on."""


def id_table(characters: str) -> np.ndarray:
    """Boolean table [512] over token ids: which belong to one of the characters."""
    table = np.zeros(512, dtype=bool)
    table[[ord(c) for c in characters]] = True
    return table


_VALID = id_table("-ABCDGHKMNRSTUVWYabcdghkmnrstuvwy" + CONTROL_TAGS)
_TAG_CHARACTERS = id_table("|_; ")
_TAG_START = id_table("DdRr;")


def phylogenetic_tag_mask(tokens: np.ndarray, *, eod: int = 0, max_tag_length: int = MAX_TAG_LENGTH) -> np.ndarray:
    """Mark the tokens that are DNA.

    Documents, which end with ``eod``, are judged one by one. In a document without pipes, one token that is neither
    an IUPAC code, a gap nor a control tag makes the whole of it a tag if it is shorter than ``max_tag_length``.
    Otherwise the text between pipes alternates between DNA and tag, and what follows the first pipe tells which of
    the two the text before it is. Outside tags, every token that is not a valid one is masked as well.

    Args:
        tokens: Ids below 512, [length] or [rows, length], any integer dtype.
        eod: Id that separates documents; always marked True.
        max_tag_length: See ``MAX_TAG_LENGTH``.

    Returns:
        Boolean array of the same shape: True for DNA, False for tags and for what is no base.
    """
    if tokens.size == 1:  # a single token cannot be told from context
        return ~_TAG_CHARACTERS[tokens]
    if tokens.ndim == 2:
        rows = [_mask_row(row, eod, max_tag_length) for row in tokens]
        return np.stack(rows) if rows else np.ones(tokens.shape, dtype=bool)
    return _mask_row(tokens, eod, max_tag_length)


def _mask_row(tokens: np.ndarray, eod: int, max_tag_length: int) -> np.ndarray:
    valid = _VALID[tokens]
    is_eod = tokens == eod
    mask = valid.copy()
    ends = np.append(np.flatnonzero(is_eod), len(tokens))
    starts = np.append(0, ends[:-1] + 1)
    # prefix sums let documents without a pipe, nearly all of them, be judged at once
    num_invalid = np.append(0, np.cumsum(~valid & ~is_eod))
    num_pipes = np.append(0, np.cumsum(tokens == PIPE))
    has_pipe = num_pipes[ends] > num_pipes[starts]
    all_tag = ~has_pipe & (num_invalid[ends] > num_invalid[starts]) & (ends - starts < max_tag_length)
    for start, end in zip(starts[all_tag], ends[all_tag], strict=True):
        mask[start:end] = False
    for start, end in zip(starts[has_pipe], ends[has_pipe], strict=True):
        mask[start:end] &= _mask_piped(tokens[start:end], valid[start:end], max_tag_length)
    mask[is_eod] = True
    return mask


def _mask_piped(tokens: np.ndarray, valid: np.ndarray, max_tag_length: int) -> np.ndarray:
    """Mask of one document that contains a pipe."""
    mask = np.ones(len(tokens), dtype=bool)
    pipes = np.flatnonzero(tokens == PIPE)
    first, after = pipes[0], tokens[pipes[0] + 1 : pipes[0] + 3]
    if len(after) == 0:
        mask[:first] = first >= max_tag_length or valid[:first].all()
        mask[first] = False
        return mask
    starts_tag = _TAG_START[after[0]] if len(after) == 1 else after[1] == ord("_") or after[0] == ord(";")
    in_tag = not starts_tag
    start = 0
    for end in (*pipes, len(tokens)):
        if in_tag:
            if end - start < max_tag_length:
                mask[start:end] = False
            else:
                in_tag = False
        in_tag = not in_tag
        start = end + 1
    mask[pipes] = False
    return mask
