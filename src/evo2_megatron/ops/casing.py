# SPDX-License-Identifier: Apache-2.0
"""Upper case and soft mask of token ids. A token id is the character's code point; lower case marks repeats."""

import torch
from torch import Tensor

LOWER_A, LOWER_Z = ord("a"), ord("z")
CASE_OFFSET = ord("a") - ord("A")


def is_lower(ids: Tensor) -> Tensor:
    """Bool mask of the lower-case letters a-z (ids 97 to 122). Any integer dtype, any shape."""
    return (ids >= LOWER_A) & (ids <= LOWER_Z)


def to_upper(ids: Tensor) -> Tensor:
    """The ids with a-z moved to A-Z; every other id unchanged. Any integer dtype (kept), any shape; not in place."""
    return torch.where(is_lower(ids), ids - CASE_OFFSET, ids)
