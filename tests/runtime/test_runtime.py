# SPDX-License-Identifier: Apache-2.0
"""The gate to Megatron: what it changes without a GPU, and that nothing changes before it is entered."""

import os
import subprocess
import sys

import pytest
import torch

from evo2_megatron.config import ParallelConfig, UserError

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are only for machines without CUDA")


def test_importing_the_package_changes_nothing():
    code = (
        "import torch; before = (torch.empty, torch.cuda.Stream, torch.Tensor.type, torch.nn.Module.cuda)\n"
        "import evo2_megatron.runtime.megatron, evo2_megatron.runtime.distributed, evo2_megatron.runtime.cuda_on_cpu\n"
        "assert before == (torch.empty, torch.cuda.Stream, torch.Tensor.type, torch.nn.Module.cuda)\n"
        "import sys; assert not [m for m in sys.modules if m.split('.')[0] == 'megatron']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_scoring_loads_neither_the_training_loop_nor_the_models_of_others():
    """They would take as long again as everything else that a command loads, and half as much memory."""
    code = (
        "from evo2_megatron.runtime import megatron; megatron.enter()\n"
        "import evo2_megatron.checkpoint.load, evo2_megatron.model.head, evo2_megatron.model.provider, sys\n"
        "import evo2_megatron.tasks.scoring.predict, evo2_megatron.tasks.generation.decoding\n"
        "from evo2_megatron.runtime.precision import precision_settings; precision_settings('bf16_mixed')\n"
        "names = 'modelopt', 'datasets', 'transformers', 'sklearn', 'wandb.sdk', 'megatron.bridge.training.train'\n"
        "print([name for name in names if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=True, stdout=-1, text=True)
    assert ended.stdout == "[]\n"


def test_what_loads_on_demand_is_all_there_when_asked_for(megatron):
    import wandb
    from megatron.bridge import AutoBridge

    assert callable(wandb.init)
    assert "LlamaForCausalLM" in AutoBridge.list_supported_models()
    with pytest.raises(AttributeError, match="no_such_name"):
        wandb.no_such_name  # noqa: B018


@without_gpu
def test_cuda_devices_become_the_cpu(megatron):
    cpu = torch.device("cpu")
    assert not torch.cuda.is_available()
    assert torch.zeros(2, device="cuda").device == cpu
    assert torch.tensor([1.0], device=torch.device("cuda", 0)).device == cpu
    assert torch.ones(1).cuda().device == torch.ones(1).to("cuda:0").device == cpu
    assert torch.nn.Linear(1, 1, device="cpu").to("cuda").weight.device == cpu
    assert torch.empty(1, device="meta").device.type == "meta"
    assert torch.ones(1, dtype=torch.float32).to(torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"


@without_gpu
def test_events_measure_time_and_memory_is_the_process_own(megatron):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.randn(200, 200) @ torch.randn(200, 200)
    end.record()
    assert start.elapsed_time(end) > 0
    before = torch.cuda.memory_allocated()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert torch.cuda.memory_allocated() - before > 0.9 * len(block)
    assert torch.cuda.max_memory_allocated() >= torch.cuda.memory_allocated()


@without_gpu
def test_random_states_fork_and_come_back(one_process):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    with get_cuda_rng_tracker().fork():
        forked = torch.rand(3)
    assert torch.equal(torch.rand(3), want) and not torch.equal(forked, want)


@without_gpu
def test_a_forked_child_computes(megatron):
    torch.set_num_threads(2)
    torch.randn(512, 512) @ torch.randn(512, 512)  # the parent has used its threads
    child = os.fork()
    if child == 0:
        (torch.ones(1 << 20) * 2).sum()
        os._exit(0 if torch.get_num_threads() == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_transformer_engine_is_not_believed_to_be_there(megatron):
    import importlib.util

    from evo2_megatron.runtime.megatron import have_transformer_engine

    installed = importlib.util.find_spec("transformer_engine") is not None
    assert have_transformer_engine() == (installed and torch.cuda.is_available())
    assert installed or "transformer_engine" not in sys.modules


def test_a_gpu_prepares_no_attention_for_each_number_of_keys(megatron, monkeypatch):
    from evo2_megatron.runtime import megatron as gate

    monkeypatch.setattr(gate, "on_cuda", lambda: True)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        gate.enter.__wrapped__()
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("count, rank, told", [(4, None, True), (1, None, False), (4, "0", False)])
def test_idle_gpus_are_told_of(monkeypatch, caplog, count, rank, told):
    from evo2_megatron.runtime import distributed, megatron

    monkeypatch.setattr(megatron, "on_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with caplog.at_level("INFO"):
        distributed.tell_of_idle_gpus()
    assert ("One of 4 GPUs is used; commands use all with --devices auto" in caplog.text) is told


def test_a_world_size_that_does_not_fit_is_refused(monkeypatch):
    from evo2_megatron.runtime.distributed import process_groups

    monkeypatch.setenv("WORLD_SIZE", "3")
    message = "3 processes do not fit tensor 2 x pipeline 1 x context 1 = 2"
    with pytest.raises(UserError, match=message), process_groups(ParallelConfig(tensor=2)):
        pass


def test_a_master_that_a_job_names_is_not_for_a_process_alone(megatron, monkeypatch):
    """It may be another machine, or one where nobody listens."""
    from evo2_megatron.runtime import distributed

    class Began(Exception):
        pass

    def begin(backend, **settings):
        raise Began(settings["world_size"], "store" in settings)

    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(Began) as began, distributed.process_groups(ParallelConfig()):
        pass
    assert began.value.args == (1, True)
    distributed.be_alone_without_torchrun()
    assert (os.environ["MASTER_ADDR"], os.environ["RANK"]) == ("127.0.0.1", "0")
    with pytest.raises(Began) as began, distributed.process_groups(ParallelConfig()):
        pass
    assert began.value.args == (1, False)


def test_processes_wait_for_one_that_writes_for_hours(one_process):
    """With torch's own patience of ten minutes for NCCL, the files of a genome would never be finished."""
    from megatron.core import parallel_state

    groups = [torch.distributed.group.WORLD, parallel_state.get_data_parallel_group()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for group in (*groups, parallel_state.get_model_parallel_group()):
        assert group._get_backend(device).options._timeout.days >= 14


@pytest.mark.parametrize("error, stay", [(UserError, True), (GeneratorExit, False), (None, False)])
def test_nobody_waits_for_the_others_before_it_says_what_is_wrong(one_process, monkeypatch, error, stay):
    """NCCL's communicators end when all processes of a machine end them."""
    from megatron.core import parallel_state

    from evo2_megatron.runtime import distributed, megatron

    ended = []
    monkeypatch.setattr(parallel_state, "destroy_model_parallel", lambda: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: ended.append(True))
    monkeypatch.setattr(megatron, "on_cuda", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed._end_groups(error)
    assert ended == ([] if stay else [True])


_TWO_COPIES = """
import multiprocessing, sys
import torch
from evo2_megatron.runtime.distributed import share_random_state

def copy(rank, queue):
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
    torch.manual_seed(0)
    torch.rand(3 + rank)  # dropout of batches of different lengths
    if rank == 0:
        expected = torch.get_rng_state()
    share_random_state()
    assert rank == 1 or torch.equal(torch.get_rng_state(), expected)
    queue.put(torch.rand(4).tolist())
    torch.distributed.destroy_process_group()

context = multiprocessing.get_context("fork")
queue = context.Queue()
copies = [context.Process(target=copy, args=(rank, queue)) for rank in (0, 1)]
[process.start() for process in copies]
drawn = [queue.get(timeout=60) for _ in copies]
[process.join() for process in copies]
assert drawn[0] == drawn[1] and not any(process.exitcode for process in copies)
"""


@without_gpu
def test_copies_draw_the_same(tmp_path):
    subprocess.run([sys.executable, "-c", _TWO_COPIES, str(tmp_path / "store")], check=True, timeout=120)
