# SPDX-License-Identifier: Apache-2.0
"""Savanna's names and files; what becomes of whole checkpoints is in tests/tasks/conversion/test_convert.py."""

import torch

from checkpoint.savanna_model import savanna_state
from evo2_megatron.checkpoint.savanna import read_savanna
from evo2_megatron.checkpoint.savanna_files import SavannaFiles
from evo2_megatron.checkpoint.torch_file import JoinedFile
from tasks.conversion.conversions import TINY, WEIGHTS


def test_filters_of_long_context_are_read_row_by_row(tmp_path, monkeypatch):
    """They have as many columns as the longest sequence had tokens: 2 GB for each of the 40B."""
    columns, name = 1 << 16, "sequential.3.mixer.mixer.filter.h"
    wide = torch.randn(TINY.num_groups, columns)
    torch.save(savanna_state(WEIGHTS, TINY) | {name: wide}, tmp_path / "model.pt")
    tensor = read_savanna(SavannaFiles(((tmp_path / "model.pt",),)), TINY).theirs[name]
    lengths, read_at = [], JoinedFile.read_at

    def noting(self, position, buffer):
        lengths.append(len(buffer))
        return read_at(self, position, buffer)

    monkeypatch.setattr(JoinedFile, "read_at", noting)
    found = torch.cat([tensor.read_rows(*rows) for rows in tensor.pieces()])
    assert torch.equal(found, wide[:, :128])
    assert max(lengths) <= 4 * columns
