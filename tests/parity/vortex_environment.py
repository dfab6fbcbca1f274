# SPDX-License-Identifier: Apache-2.0
"""Real Vortex in an environment of its own: installed from the package index, run as a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

VORTEX = "vtx==1.1.0"
RUN_VORTEX = Path(__file__).with_name("run_vortex.py")


class VortexEnvironment:
    """A virtual environment with Vortex and, of this one, only what Vortex needs."""

    def __init__(self, folder: Path) -> None:
        """Make it in a folder that does not exist; needs the package index, as building .venv does."""
        self._python = folder / "bin/python"
        uv = [Path(sysconfig.get_path("scripts"), "uv"), "--quiet"]
        environment = dict(os.environ)
        if "PIP_INDEX_URL" in environment:  # uv reads none of pip's settings
            environment.setdefault("UV_DEFAULT_INDEX", environment["PIP_INDEX_URL"])
        for command in (
            [*uv, "venv", "--python", sys.executable, folder],
            # without its requirements: flash-attn and Transformer Engine want a GPU's compiler
            [*uv, "pip", "install", "--python", self._python, "--no-deps", VORTEX],
        ):
            subprocess.run(command, env=environment, check=True)
        self._site_packages = next(folder.glob("lib/python3*/site-packages"))
        # torch, numpy and so on, looked for after Vortex itself; an editable install is not lent
        (self._site_packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(
        self, weights: Path, sequences: list[Tensor], prompts: list[Tensor], num_new: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Let Vortex load a file and compute.

        Args:
            weights: A ``.pt`` file in Vortex's format, with its YAML file beside it.
            sequences: Tokens [B, L].
            prompts: Tokens [1, L].
            num_new: Number of tokens to generate after each prompt, always the likeliest.

        Returns:
            For each sequence, logits [B, L, V], float32; for each prompt, the new tokens [1, num_new].
        """
        tokens, output = weights.with_name("tokens.pt"), weights.with_name("logits.pt")
        torch.save((sequences, prompts), tokens)
        files = {"weights": weights, "config": weights.with_suffix(".yml"), "tokens": tokens, "output": output}
        command = [self._python, RUN_VORTEX, "--generate", str(num_new)]
        for name, path in files.items():
            command += [f"--{name}", path]
        done = subprocess.run(command, capture_output=True, text=True, cwd=weights.parent, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        result = torch.load(output, weights_only=True)
        assert Path(result["vortex"]).parent == self._site_packages
        return result["logits"], result["generated"]
