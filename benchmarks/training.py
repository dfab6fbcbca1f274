# SPDX-License-Identifier: Apache-2.0
"""Speed of training through ``tasks.training.train``: tokens per second, and where the time of a step goes.

Trains on phage lambda from indexed data, float32, two threads in all, on one process and on two. The clock is around
the calls themselves: the wait for data, Megatron's forward and backward step, every call into a process group and
every wait for one, the optimizer with zeroing, checking and clipping of gradients. A call inside another counts for
the inner one alone, so the parts add up to the time of the loop. The first steps are not counted.

    python benchmarks/training.py [--sizes evo2_tiny hidden_512] [--lengths 1024 8192] [--recompute none full]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evo2_megatron.architectures import ARCHITECTURES

GENOME = Path(__file__).resolve().parents[1] / "examples" / "data" / "lambda_phage.fa"
SIZES = ("evo2_tiny", "hidden_512")
NUM_THREADS = 2
"""Of all processes together."""

STEPS = {("evo2_tiny", 1_024): 30, ("evo2_tiny", 8_192): 8, ("hidden_512", 1_024): 8, ("hidden_512", 8_192): 3}
"""Model size and length in tokens: steps that are timed."""

WARM_UP_STEPS = 2
SAMPLES_PER_STEP = {1_024: 4, 8_192: 2}
"""By length in tokens; the micro-batches have one sample each."""

PARTS = ("data", "forward", "backward", "optimizer", "communication", "other")

_COLLECTIVES = (
    "_allgather_base", "_reduce_scatter_base", "all_gather_single", "all_gather_single_coalesced", "all_to_all_single",
    "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce", "allreduce_coalesced",
    "alltoall", "alltoall_base", "barrier", "broadcast", "gather", "monitored_barrier", "recv", "recv_anysource",
    "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "scatter", "send",
)  # fmt: skip


class Clock:
    """Seconds by part of the program; a part inside another interrupts it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._parts, self._since = ["other"], time.perf_counter()

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._parts[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time spent in the block belongs to ``name``."""
        self._switch()
        self._parts.append(name)
        try:
            yield
        finally:
            self._switch()
            self._parts.pop()

    def restart(self) -> None:
        """Count from now on."""
        self._switch()
        self.seconds.clear()

    def read(self) -> dict[str, float]:
        """Seconds of every part until now."""
        self._switch()
        return {name: self.seconds[name] for name in PARTS}

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count the calls of a function or method for ``part``."""
        function: Callable = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        setattr(owner, name, timed)


def install(clock: Clock) -> None:
    """Put the clock around the parts of a training step."""
    from torch._C import _distributed_c10d as c10d

    from evo2_megatron.runtime import megatron

    for name in _COLLECTIVES:
        clock.watch(c10d.ProcessGroup, name, "communication")
    clock.watch(c10d.Work, "wait", "communication")
    megatron.enter_training()
    from megatron.bridge.training import train as bridge
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import ChainedOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.pipeline_parallel import schedules

    from evo2_megatron.model import forward_step

    clock.watch(forward_step, "get_batch", "data")
    clock.watch(schedules, "forward_step", "forward")
    clock.watch(schedules, "backward_step", "backward")
    for name in ("zero_grad_buffer", "start_grad_sync", "finish_grad_sync", "scale_gradients"):
        clock.watch(DistributedDataParallel, name, "optimizer")
    for optimizer in (DistributedOptimizer, ChainedOptimizer):
        clock.watch(optimizer, "step", "optimizer")
        clock.watch(optimizer, "zero_grad", "optimizer")
    upstream, steps = bridge.train_step, 0

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        if steps == WARM_UP_STEPS:
            clock.restart()
        steps += 1
        return upstream(*args, **kwargs)

    bridge.train_step = train_step


def add_hidden_512() -> None:
    """Let the larger model be trained under its name."""
    from hidden_512 import ARCHITECTURE

    ARCHITECTURES["hidden_512"] = ARCHITECTURE


def prepare(folder: Path) -> Path:
    """Make an indexed dataset of the genome, both strands; returns the YAML of a blend."""
    from evo2_megatron.data.preprocess_config import PreprocessConfig
    from evo2_megatron.tasks.preparation.preprocess import preprocess

    preprocess(
        PreprocessConfig(
            datapaths=[str(GENOME)],
            output_dir=str(folder),
            output_prefix="phage",
            train_split=0.8,
            valid_split=0.2,
            test_split=0.0,
            split_window_length=1000,
            embed_reverse_complement=True,
            seed=0,
        )
    )
    prefix = folder / "phage_nucleotide_fast_tokenizer_256"
    blend = folder / "blend.yaml"
    blend.write_text(
        f"- {{dataset_split: train, dataset_weight: 1.0, dataset_prefix: {prefix}_train}}\n"
        f"- {{dataset_split: validation, dataset_weight: 1.0, dataset_prefix: {prefix}_val}}\n"
        f"- {{dataset_split: test, dataset_weight: 1.0, dataset_prefix: {prefix}_val}}\n"
    )
    return blend


def options(folder: Path, run_dir: Path, size: str, length: int, recompute: str, steps: int) -> dict[str, Any]:
    """Arguments of ``tasks.training.train.train``; what is not here is the recipe's."""
    return {
        "dataset_config": folder / "blend.yaml",
        "result_dir": run_dir,
        "model_size": size,
        "seq_length": length,
        "recompute": recompute,
        "micro_batch_size": 1,
        "global_batch_size": SAMPLES_PER_STEP[length],
        "max_steps": steps,
        "eval_interval": steps,
        "eval_iters": 1,
        "lr": 1e-3,
    }


def worker(folder: Path, run_dir: Path, size: str, length: int, recompute: str, timed: int) -> None:
    """Train on this process; rank 0 writes what its clock shows of ``timed`` steps."""
    import torch

    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(NUM_THREADS // world)
    add_hidden_512()
    clock = Clock()
    install(clock)
    from megatron.bridge.training import train as bridge

    from evo2_megatron.tasks.training.train import train

    upstream, calls = bridge.checkpoint_and_decide_exit, 0

    def end_of_step(*args: Any, **kwargs: Any) -> Any:
        # evaluation and checkpoint come after the last step
        nonlocal calls
        calls += 1
        if calls == WARM_UP_STEPS + timed and os.environ.get("RANK", "0") == "0":
            (folder / "clock.json").write_text(json.dumps(clock.read()))
        return upstream(*args, **kwargs)

    bridge.checkpoint_and_decide_exit = end_of_step
    # one step more, so that the last that counts is like the others
    train(**options(folder, run_dir, size, length, recompute, WARM_UP_STEPS + timed + 1))


def measure(folder: Path, size: str, length: int, recompute: str, *, processes: int, timed: int) -> dict[str, float]:
    """Seconds by part of the timed steps, of the first process."""
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command += [
        __file__,
        "--worker",
        str(folder),
        tempfile.mkdtemp(dir=folder),
        size,
        str(length),
        recompute,
        str(timed),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(NUM_THREADS // processes)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"training {size} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads((folder / "clock.json").read_text())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, choices=(1_024, 8_192), default=(1_024, 8_192))
    parser.add_argument("--recompute", nargs="+", choices=("none", "full"), default=("none",))
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    parser.add_argument("--steps", type=int, help="steps to time (default: fewer the larger they are)")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        folder, run_dir, size, length, recompute, timed = args.worker
        worker(Path(folder), Path(run_dir), size, int(length), recompute, int(timed))
        return
    print(f"training, float32, {NUM_THREADS} threads in all; share of the time of a step")
    columns = " ".join(f"{part:>{max(8, len(part))}}" for part in PARTS)
    print(f"{'':10} {'tokens':>6} {'processes':>9} {'recompute':>9} {'tokens/s':>8} {columns}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for size in args.sizes:
            for length in args.lengths:
                for recompute in args.recompute:
                    for processes in args.processes:
                        timed = args.steps or STEPS[size, length]
                        seconds = measure(folder, size, length, recompute, processes=processes, timed=timed)
                        total = sum(seconds.values())
                        rate = timed * SAMPLES_PER_STEP[length] * length / total
                        shares = " ".join(f"{seconds[p] / total:{max(8, len(p))}.1%}" for p in PARTS)
                        print(f"{size:10} {length:6,} {processes:9} {recompute:>9} {rate:8,.0f} {shares}", flush=True)


if __name__ == "__main__":
    main()
