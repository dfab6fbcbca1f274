# SPDX-License-Identifier: Apache-2.0
"""Fixtures: the runtime, a process group of one; and what keeps one test's surroundings from another's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# what torchrun sets: a test run started inside somebody's job is still a run of its own
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)
os.environ |= {
    "HF_HUB_OFFLINE": "1",  # nothing here may wait for a network
    "WANDB_MODE": "disabled",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: kernels then run without a GPU, slowly
if "PYTEST_XDIST_WORKER" in os.environ:
    # one worker per core: torch, not imported yet, and the processes that tests start would each take all of them
    os.environ["OMP_NUM_THREADS"] = "1"


class _AnyDevice:
    """Tests marked ``any_device`` run on the GPU where there is one, and then count as ``gpu``."""

    @pytest.hookimpl(tryfirst=True)  # before -m takes its choice
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        on_any = [item for item in items if item.get_closest_marker("any_device")]
        if on_any and Path("/dev/nvidiactl").exists():
            for item in on_any:
                item.add_marker("gpu")


def pytest_configure(config: pytest.Config) -> None:
    """Two hooks of one name need an object for one of them."""
    config.pluginmanager.register(_AnyDevice())


@pytest.hookimpl(trylast=True)  # after -m has taken its choice: only then is torch imported for the question
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is none."""
    items.sort(key=lambda item: "tasks" not in item.path.parts)  # long files first: workers then end together
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _own_environment():
    """Undo a test's changes to the environment variables."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ |= before


@pytest.fixture(scope="module")
def one_thread():
    """For small tensors: their products take many times as long where two threads wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def megatron():
    """Megatron Bridge, importable on this machine."""
    from evo2_megatron.runtime.megatron import enter_training

    enter_training()


@pytest.fixture(scope="module")
def one_process(megatron):
    """Process groups of a single process, for tests that build models; not for tests of tasks that start their own."""
    from evo2_megatron.config import ParallelConfig
    from evo2_megatron.runtime.distributed import process_groups

    with process_groups(ParallelConfig(), seed=1):
        yield
