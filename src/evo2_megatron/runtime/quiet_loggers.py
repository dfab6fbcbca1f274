# SPDX-License-Identifier: Apache-2.0
"""Libraries' log lines that say nothing to a user."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

RERUNS = "megatron.core.rerun_state_machine"
"""Tells its mode at the start and at every evaluation."""


@contextlib.contextmanager
def silenced(*names: str) -> Iterator[None]:
    """Let loggers of these names say nothing while a block runs."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before):
            logger.disabled = disabled


@contextlib.contextmanager
def without_tracebacks(name: str) -> Iterator[None]:
    """Let a logger leave out lines that repeat the traceback of an error, which says what there is to say itself."""
    logger = logging.getLogger(name)
    logger.addFilter(_has_no_traceback)
    try:
        yield
    finally:
        logger.removeFilter(_has_no_traceback)


def _has_no_traceback(record: logging.LogRecord) -> bool:
    return "Traceback (most recent call last)" not in record.getMessage()
