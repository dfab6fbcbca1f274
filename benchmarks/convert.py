# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the checkpoint commands on a random model, beside ``cp`` of as many bytes.

``python benchmarks/convert.py [--model-size evo2_1b_base] [--folder DIR] [--repeat 3]``

Each command runs in a process of its own, and so does ``cp``: twice, and the second time counts. A virtual machine
gives memory that was free for seconds back to its host and gets it again at a tenth of the speed of writing a file;
the first run would measure that. The time is that of moving the weights, as the command logs it, without the start of
Python, torch and Megatron. Memory is the process's peak, start included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from evo2_megatron.architectures import architecture
from evo2_megatron.checkpoint import distcp
from evo2_megatron.checkpoint.names import parameter_shapes
from evo2_megatron.checkpoint.tensors import StoredTensor, as_dtype
from evo2_megatron.checkpoint.torch_file import write_torch_file
from evo2_megatron.checkpoint.translate import to_theirs
from evo2_megatron.checkpoint.vortex import vortex_tensors
from evo2_megatron.data.tokenizer import tokenizer_dir

_SECONDS = re.compile(r" GB in ([\d.]+) s")


class Step(NamedTuple):
    """One run of one command."""

    seconds: float
    peak_bytes: int


def random_weights(model_size: str) -> dict[str, StoredTensor]:
    """Small random numbers in bfloat16 under our names, made while they are written."""

    def random(shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(
            shape, torch.bfloat16, lambda start, stop: torch.randn(stop - start, *shape[1:]).mul_(0.02).bfloat16()
        )

    shapes = parameter_shapes(architecture(model_size), vocab_size=512)
    return {name: random(shape) for name, shape in shapes.items()}


def copy_seconds(source: Path) -> float:
    """Time of ``cp``."""
    target = source.with_name("copy")
    for _ in range(2):
        target.unlink(missing_ok=True)
        start = time.perf_counter()
        subprocess.run(["cp", source, target], check=True)
        seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def run(module: str, out: Path, *arguments: object) -> Step:
    """One command: seconds that it logs, and peak resident memory."""
    code = f"import shutil; from evo2_megatron.cli.{module} import main; main(); shutil.rmtree({str(out)!r}); main()"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise RuntimeError(f"{module} failed:\n{text}")
    return Step(float(_SECONDS.findall(text)[-1]), usage.ru_maxrss * 1024)


def make_savanna(folder: Path, model_size: str) -> None:
    """``savanna.pt``."""
    theirs = to_theirs(random_weights(model_size), architecture(model_size), "savanna")
    write_torch_file(theirs, folder / "savanna.pt")


def make_nemo2(folder: Path, model_size: str) -> None:
    """``source/weights``."""
    (folder / "source/weights").mkdir(parents=True)
    tensors = {f"module.{name}": x for name, x in random_weights(model_size).items()}
    distcp.write_tensors(tensors, folder / "source/weights")


def make_bridge(folder: Path, model_size: str) -> None:
    """``source/iter_0000001``."""
    arguments = ["--savanna-ckpt-path", folder / "savanna.pt", "--mbridge-ckpt-dir", folder / "source"]
    size = ["--model-size", model_size]
    run("convert_savanna", folder / "source", *arguments, *size, "--tokenizer-path", tokenizer_dir(512))


def make_vortex(folder: Path, model_size: str) -> None:
    """``source/model.pt``."""
    theirs = vortex_tensors(random_weights(model_size), architecture(model_size))
    (folder / "source").mkdir()
    write_torch_file(theirs, folder / "source/model.pt")


def make_trained(folder: Path, model_size: str) -> None:
    """``source/iter_0000001`` with a first moment in float32, which is never read, beside the weights."""
    make_bridge(folder, model_size)
    checkpoint, weights = folder / "source/iter_0000001", random_weights(model_size)
    moments = {f"optimizer.state.exp_avg.{name}": as_dtype(x, torch.float32) for name, x in weights.items()}
    for path in (*checkpoint.glob("*.distcp"), checkpoint / ".metadata"):
        path.unlink()
    distcp.write_tensors(weights | moments, checkpoint)


def measure(folder: Path, model_size: str, repeat: int) -> None:
    """Print a table."""
    in_a_process(make_savanna, folder, model_size)
    savanna, source, out = folder / "savanna.pt", folder / "source", folder / "out"
    size = ["--model-size", model_size]
    bridged = ["--mbridge-ckpt-dir", out, *size, "--tokenizer-path", tokenizer_dir(512), "--seq-length", 8192]
    commands = [
        (None, "convert_savanna", "--savanna-ckpt-path", savanna, *bridged),
        (make_nemo2, "convert_nemo2", "--nemo2-ckpt-dir", source, *bridged),
        (make_vortex, "convert_vortex", "--vortex-ckpt-path", source / "model.pt", *bridged),
        (make_bridge, "export_vortex", "--mbridge-ckpt-dir", source, "--output-path", out / "model.pt", *size),
        (make_trained, "remove_optimizer", "--src-ckpt-dir", source, "--dst-ckpt-dir", out),
    ]
    print(f"{model_size}, {savanna.stat().st_size / 1e9:.2f} GB, medians of {repeat} runs, in {folder.parent}")
    print(f"{'':18}{'weights, s':>12}{'cp, s':>8}{'x cp':>7}{'peak memory, MB':>17}")
    for make, *command in commands:
        if make is not None:
            in_a_process(make, folder, model_size)
        copies, steps = [], []
        for _ in range(repeat):
            os.sync()  # what is still to be written to disk slows down whoever writes next
            copies.append(copy_seconds(savanna))
            os.sync()
            steps.append(run(command[0], out, *command[1:]))
            shutil.rmtree(out)
        shutil.rmtree(source, ignore_errors=True)
        seconds, copied = statistics.median(step.seconds for step in steps), statistics.median(copies)
        peak = max(step.peak_bytes for step in steps)
        figures = f"{seconds:12.2f}{copied:8.2f}{seconds / copied:7.2f}{peak / 2**20:17.0f}"
        print(f"{command[0]:18}{figures}", flush=True)


def in_a_process(make: Callable[[Path, str], None], folder: Path, model_size: str) -> None:
    """Prepare in a process that then ends: a child's peak memory begins with what its parent holds."""
    process = multiprocessing.get_context("spawn").Process(target=make, args=(folder, model_size))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{make.__name__} failed")


def main() -> None:
    """Parse arguments, measure, and remove the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", default="evo2_1b_base")
    parser.add_argument("--folder", type=Path, help="where to put files, 12 bytes a parameter (default: /tmp)")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(Path(folder), args.model_size, args.repeat)


if __name__ == "__main__":
    main()
