# SPDX-License-Identifier: Apache-2.0
"""Real gffread: the one on the PATH, or Debian's package unpacked into a folder, which needs no root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("gffread", "libgclib3")


class NoGffreadError(Exception):
    """gffread is neither installed nor to be had, with the reason."""


class Gffread:
    """Runs gffread."""

    def __init__(self) -> None:
        """Find it, or unpack it beside the packages of this environment, where the next run finds it.

        Raises:
            NoGffreadError: It is not installed, and Debian's packages cannot be downloaded.
        """
        self.environment = dict(os.environ)
        installed = shutil.which("gffread")
        if installed:
            self.program = Path(installed)
            return
        folder = Path(sys.prefix, "gffread")
        if not folder.exists():
            _unpack(folder)
        self.program = folder / "usr/bin/gffread"
        libraries = ":".join(str(path.parent) for path in folder.glob("usr/lib/*/libgclib.so*"))
        self.environment["LD_LIBRARY_PATH"] = libraries

    def transcripts(self, fasta: Path, gtf: Path, output: Path) -> dict[str, str]:
        """Sequence of each transcript by its identifier, as ``gffread -w`` writes them."""
        self.run("-w", output, "-g", fasta, gtf)
        records = (record.split("\n", 1) for record in output.read_text().split(">")[1:])
        return {header.split()[0]: bases.replace("\n", "") for header, bases in records}

    def run(self, *arguments: object) -> None:
        """Run it with these arguments."""
        subprocess.run([self.program, *map(str, arguments)], env=self.environment, check=True, capture_output=True)


def _unpack(folder: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise NoGffreadError("gffread is not installed, and this is not a Debian system")
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        for path in ("state/lists/partial", "cache/archives/partial", "root"):
            Path(work, path).mkdir(parents=True)
        # lists of its own: the system's may be missing, and only root may fetch those
        settings = (f"State={work}/state", "State::status=/var/lib/dpkg/status", f"Cache={work}/cache")
        apt = ["apt-get", *(f"-oDir::{setting}" for setting in settings)]
        for command in ([*apt, "update"], [*apt, "download", *PACKAGES]):
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NoGffreadError(
                    f"gffread is not installed, and its Debian package is not to be had: {done.stderr}"
                )
        for package in Path(work).glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, f"{work}/root"], check=True)
        with contextlib.suppress(OSError):  # another process was faster
            Path(work, "root").rename(folder)
