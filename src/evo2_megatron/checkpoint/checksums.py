# SPDX-License-Identifier: Apache-2.0
"""``SHA256SUMS`` of a checkpoint: what its weights were when they were written, for ``sha256sum -c`` and for us.

A copy with one wrong bit loads, and its scores differ a little: nothing else would show that. Files that one may edit,
such as ``run_config.yaml``, are not in it. Checkpoints of training runs, and those of other programs, have none.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from evo2_megatron.checkpoint import layout
from evo2_megatron.config import UserError

logger = logging.getLogger(__name__)

_LONG_BYTES = 2e9  # that take seconds to read
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")  # two spaces, or one and a star for files that were read as binary


def sha256_of_file(path: Path) -> str:
    """What ``sha256sum`` prints for it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write(checkpoint: Path) -> None:
    """Read all weights, and keep what they are beside them."""
    files = [checkpoint / layout.WEIGHTS_INDEX, *sorted(checkpoint.glob("*.distcp"))]
    files = [path for path in files if path.exists()]
    num_bytes = sum(path.stat().st_size for path in files)
    if num_bytes > _LONG_BYTES:
        logger.info("Reading what was written, %.1f GB, for %s", num_bytes / 1e9, layout.CHECKSUMS)
    lines = [f"{sha256_of_file(path)}  {path.name}\n" for path in files]
    (checkpoint / layout.CHECKSUMS).write_text("".join(lines))


def read(checkpoint: Path) -> dict[str, str]:
    """Name and SHA-256 of the files with weights; empty if nobody has kept them.

    Raises:
        UserError: The file is not in the format of ``sha256sum``.
    """
    path = checkpoint / layout.CHECKSUMS
    if not path.exists():
        return {}
    matches = [_LINE.fullmatch(line) for line in path.read_text(errors="replace").splitlines()]
    if not all(matches):
        raise UserError(f"{path} is damaged; copy it again, or remove it to do without")
    return {match[2]: match[1] for match in matches}


def compare(checkpoint: Path, found: Mapping[str, str]) -> None:
    """Raise UserError if files are others than those that were written.

    Args:
        checkpoint: Folder of an iteration.
        found: Name and SHA-256 of the files that are there.
    """
    for name, expected in read(checkpoint).items():
        if name not in found:
            raise UserError(f"{checkpoint} lacks {name}; copy it again")
        if found[name] != expected:
            raise UserError(
                f"{checkpoint / name} is not the file that was written: its SHA-256 is another one than in "
                f"{layout.CHECKSUMS}; copy it again"
            )


def verify(checkpoint: Path) -> bool:
    """Read all weights and ``compare``; returns whether there was something to compare with."""
    expected = read(checkpoint)
    compare(checkpoint, {name: sha256_of_file(checkpoint / name) for name in expected if (checkpoint / name).exists()})
    return bool(expected)
