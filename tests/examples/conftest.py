# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/studies as modules."""

from __future__ import annotations

import importlib

import pytest

from helpers import STUDIES


@pytest.fixture
def study(monkeypatch):
    """Import a file of examples/studies."""
    monkeypatch.syspath_prepend(STUDIES)
    return importlib.import_module
