# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the checkpoint commands on a random model, beside ``cp`` of as many bytes.

``python benchmarks/convert.py [--model-size evo2_1b_base] [--folder DIR] [--repeat 3]``

Each command runs as a process of its own. Its time is that of moving the weights, as it logs it, without the start of
Python, torch and Megatron, which the column "whole command" includes. Memory is the process's peak, start included.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from evo2_megatron.architectures import architecture
from evo2_megatron.checkpoint import distcp
from evo2_megatron.checkpoint.names import parameter_shapes
from evo2_megatron.checkpoint.tensors import StoredTensor, as_dtype
from evo2_megatron.checkpoint.torch_file import write_torch_file
from evo2_megatron.checkpoint.translate import to_theirs
from evo2_megatron.data.tokenizer import tokenizer_dir

_SECONDS = re.compile(r" GB in ([\d.]+) s")


class Step(NamedTuple):
    seconds: float
    whole: float
    peak_bytes: int


def random_weights(model_size: str, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Small random numbers under our names, made while they are written."""

    def rows(shape: tuple[int, ...], below_zero: bool) -> StoredTensor:
        def read_rows(start: int, stop: int) -> torch.Tensor:
            values = torch.randn(stop - start, *shape[1:]).mul_(0.02).to(dtype)
            return values - 1 if below_zero else values

        return StoredTensor(shape, dtype, read_rows)

    shapes = parameter_shapes(architecture(model_size), vocab_size=512)
    return {name: rows(shape, name.endswith(".gamma")) for name, shape in shapes.items()}


def copy_seconds(source: Path) -> float:
    """Time of ``cp``."""
    target = source.with_name("copy")
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def run(command: str, module: str, *arguments: object) -> Step:
    """One command: seconds that it logs, seconds in all, peak resident memory."""
    code = f"from evo2_megatron.cli.{module} import main; main()"
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        whole = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise RuntimeError(f"{command} failed:\n{text}")
    return Step(float(_SECONDS.findall(text)[-1]), whole, usage.ru_maxrss * 1024)


def prepare(folder: Path, model_size: str) -> Path:
    """A Savanna file, and a NeMo 2 and a training checkpoint of the same size; returns the file."""
    weights = random_weights(model_size, torch.bfloat16)
    savanna = folder / "savanna.pt"
    write_torch_file(to_theirs(weights, architecture(model_size), "savanna"), savanna)
    (folder / "nemo2/weights").mkdir(parents=True)
    distcp.write_tensors({f"module.{name}": x for name, x in weights.items()}, folder / "nemo2/weights")
    return savanna


def add_optimizer(checkpoint: Path, model_size: str) -> None:
    """Put a first moment in float32 beside the weights, as training does; it is never read."""
    index = distcp.read_index(checkpoint)
    names = {name: name for name in distcp.tensor_entries(index)}
    tensors = distcp.stored_tensors(checkpoint, index, names)
    moments = {
        f"optimizer.state.exp_avg.{name}": as_dtype(x, torch.float32)
        for name, x in random_weights(model_size, torch.bfloat16).items()
    }
    partial = checkpoint.with_name("with_optimizer")
    partial.mkdir()
    distcp.write_tensors(tensors | moments, partial)
    for path in partial.iterdir():
        os.replace(path, checkpoint / path.name)
    partial.rmdir()


def measure(folder: Path, model_size: str, repeat: int) -> None:
    """Print a table."""
    savanna = prepare(folder, model_size)
    size = ["--model-size", model_size]
    made = [*size, "--tokenizer-path", tokenizer_dir(512)]
    out, bridge = folder / "out", folder / "bridge"
    run("prepare", "convert_savanna", "--savanna-ckpt-path", savanna, "--mbridge-ckpt-dir", bridge, *made)
    vortex = folder / "vortex/model.pt"
    run("prepare", "export_vortex", "--mbridge-ckpt-dir", bridge, "--output-path", vortex, *size)
    trained = folder / "trained"
    shutil.copytree(bridge, trained)
    add_optimizer(trained / "iter_0000001", model_size)
    bridged = ["--mbridge-ckpt-dir", out, *made]
    commands = {
        "evo2_convert_savanna_to_mbridge": ["convert_savanna", "--savanna-ckpt-path", savanna, *bridged],
        "evo2_convert_nemo2_to_mbridge": [
            *("convert_nemo2", "--nemo2-ckpt-dir", folder / "nemo2", *bridged, "--seq-length", 8192)
        ],
        "evo2_convert_vortex_to_mbridge": ["convert_vortex", "--vortex-ckpt-path", vortex, *bridged],
        "evo2_export_mbridge_to_vortex": [
            *("export_vortex", "--mbridge-ckpt-dir", bridge, "--output-path", out / "model.pt", *size)
        ],
        "evo2_remove_optimizer": ["remove_optimizer", "--src-ckpt-dir", trained, "--dst-ckpt-dir", out],
    }
    print(
        f"{model_size}, {savanna.stat().st_size / 1e9:.2f} GB of weights, {repeat} runs, medians, in {folder.parent}"
    )
    print(f"{'':34}{'weights, s':>12}{'cp, s':>8}{'x cp':>7}{'whole command, s':>18}{'peak memory, MB':>17}")
    for command, arguments in commands.items():
        copies, steps = [], []
        for _ in range(repeat):
            copies.append(copy_seconds(savanna))
            steps.append(run(command, *arguments))
            shutil.rmtree(out)
        seconds, copied = statistics.median(step.seconds for step in steps), statistics.median(copies)
        whole, peak = statistics.median(s.whole for s in steps), max(s.peak_bytes for s in steps)
        figures = f"{seconds:12.2f}{copied:8.2f}{seconds / copied:7.2f}{whole:18.1f}{peak / 2**20:17.0f}"
        print(f"{command:34}{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", default="evo2_1b_base")
    parser.add_argument(
        "--folder", type=Path, help="where to put the files, some 20 bytes a parameter (default: /tmp)"
    )
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(Path(folder), args.model_size, args.repeat)


if __name__ == "__main__":
    main()
