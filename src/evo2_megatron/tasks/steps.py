# SPDX-License-Identifier: Apache-2.0
"""Work that is done in steps, between which something else may be done."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

Result = TypeVar("Result")


def finished(steps: Generator[None, None, Result]) -> Result:
    """What a generator returns when all its steps are done."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
