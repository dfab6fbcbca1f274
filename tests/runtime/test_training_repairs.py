# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from processes import is_running, until


@pytest.fixture(scope="module")
def repairs(megatron):
    from evo2_megatron.runtime import megatron as gate
    from evo2_megatron.runtime import training_repairs

    if gate.have_transformer_engine():
        pytest.skip("nothing to repair with a GPU and Transformer Engine")
    training_repairs.install()
    return training_repairs


def test_loading_data_leaves_dropout_alone(repairs):
    loader = torch.utils.data.DataLoader([1, 2, 3])
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    assert [int(x) for x in loader] == [1, 2, 3]
    assert torch.equal(torch.rand(4), expected)


def test_snapshot_is_not_what_training_goes_on_to_change(repairs):
    weights = torch.zeros(3)
    ((file, key, (in_bytes, ((item, copy),))),) = repairs.copy_tensors([("file", "key", (["b"], [("item", weights)]))])
    weights += 1
    assert torch.equal(copy, torch.zeros(3))
    assert (file, key, in_bytes, item) == ("file", "key", ["b"], "item")


def test_operations_beside_frozen_weights(repairs):
    """Bridge's own count is of a Transformer with the layers that it knows the letters of."""
    from megatron.bridge.training.utils import flop_utils, train_utils

    from evo2_megatron.model.lora import Evo2LoRA
    from evo2_megatron.model.provider import provider_for

    model = provider_for("evo2_tiny", vocab_size=512, seq_length=64)
    for peft, share in ((None, 1), (Evo2LoRA(), 2 / 3)):
        for module in (flop_utils, train_utils):
            found = module.num_floating_point_operations(SimpleNamespace(model=model, peft=peft), 3)
            assert found == pytest.approx(share * model._get_num_floating_point_operations(3))


def test_a_writer_that_has_ended_is_forgotten_in_silence(repairs):
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    assert not torch.distributed.is_initialized()
    PersistentAsyncCaller().close()


_KILLED_WHILE_SAVING = """
import fcntl, multiprocessing, os, signal, sys, types
from evo2_megatron.runtime import training_repairs

def write(queue):
    queue.put(os.getpid())
    signal.pause()  # Megatron's waits for a parent that is dead

class Writer:
    write_preloaded_data = staticmethod(write)

if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    module = types.SimpleNamespace(mp=multiprocessing, _results_queue=None)
    training_repairs._end_results_with_training(module)
    results = module._get_write_results_queue()
    assert module._get_write_results_queue() is results
    lock = open(sys.argv[1], "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    training_repairs._end_writers_with_training(Writer)
    queue = fork.Queue()
    fork.Process(target=Writer.write_preloaded_data, args=(queue,)).start()
    print(queue.get(), results._manager._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_saving_leaves_no_process(tmp_path):
    """One that stays would hold the lock of the run's folder."""
    (tmp_path / "killed.py").write_text(_KILLED_WHILE_SAVING)
    script = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "lock")]
    # not a pipe, which would be at its end only when the last of them has ended
    with (tmp_path / "pids").open("w") as pids:
        done = subprocess.run(script, stdout=pids, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    children = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    try:
        assert len(children) == 2
        until(lambda: not any(map(is_running, children)), 5)
        with (tmp_path / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        for pid in filter(is_running, children):
            os.kill(pid, signal.SIGKILL)


def test_writers_of_checkpoints_are_the_repaired_ones(repairs):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer = filesystem_async.FileSystemWriterAsync
    for function in (writer.write_preloaded_data, filesystem_async._get_write_results_queue):
        assert function.__code__.co_filename == repairs.__file__


class UpstreamOptimizer:
    """The methods that are repaired, as Megatron Core 0.16.1's distributed optimizer has them."""

    def __init__(self, *parameters: torch.Tensor) -> None:
        self.optimizer = torch.optim.AdamW(parameters, lr=0.1)

    def state_dict(self):
        (step,) = {float(state["step"]) for state in self.optimizer.state.values()}
        return {"optimizer": {"param_groups": [{"step": step}]}}

    def load_state_dict(self, state_dict):
        step = torch.tensor(state_dict["optimizer"]["param_groups"][0]["step"])
        for state in self.optimizer.state.values():
            state["step"] = step

    def _get_main_param_and_optimizer_states(self, parameter):
        return {"param": parameter, **self.optimizer.state[parameter]}

    def _set_main_param_and_optimizer_states(self, parameter, tensors):
        for name, tensor in self._get_main_param_and_optimizer_states(parameter).items():
            tensor.copy_(tensors[name])


def test_resumed_adam_counts_every_step_once(repairs):
    class Repaired(UpstreamOptimizer):
        pass

    repairs._repair_torch_adam(Repaired)
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    fresh = Repaired(*parameters)
    assert fresh.state_dict()["optimizer"]["param_groups"] == [{"step": 0.0}]
    fresh.load_state_dict({"optimizer": {"param_groups": [{"step": 7}]}})
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    fresh.optimizer.step()
    assert [float(state["step"]) for state in fresh.optimizer.state.values()] == [8.0, 8.0, 8.0]


def test_first_step_is_that_of_plain_adam(repairs):
    class Repaired(UpstreamOptimizer):
        pass

    repairs._repair_torch_adam(Repaired)
    ours, plain = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    repaired, reference = Repaired(ours), SimpleNamespace(optimizer=torch.optim.AdamW([plain], lr=0.1))
    repaired.state_dict()
    for parameter, owner in ((ours, repaired), (plain, reference)):
        parameter.grad = torch.tensor([0.5, -2.0])
        owner.optimizer.step()
    assert torch.equal(ours, plain)


def test_step_is_not_among_the_tensors_of_a_checkpoint(repairs):
    class Repaired(UpstreamOptimizer):
        pass

    repairs._repair_torch_adam(Repaired)
    parameter = torch.zeros(2)
    optimizer = Repaired(parameter)
    optimizer.state_dict()
    optimizer.load_state_dict({"optimizer": {"param_groups": [{"step": 7}]}})
    stored = {name: torch.full((2,), 3.0) for name in optimizer._get_main_param_and_optimizer_states(parameter)}
    assert stored.keys() == {"param", "exp_avg", "exp_avg_sq"}
    optimizer._set_main_param_and_optimizer_states(parameter, stored)
    assert torch.equal(parameter, torch.full((2,), 3.0))
    state = optimizer.optimizer.state[parameter]
    assert float(state["step"]) == 7.0 and torch.equal(state["exp_avg"], torch.full((2,), 3.0))


def test_places_after_a_padded_bucket(repairs):
    def bucket(numel, numel_unpadded):
        return SimpleNamespace(grad_data=torch.empty(numel), numel_unpadded=numel_unpadded)

    # as Megatron lays them out: b begins at a multiple of 64, every bucket ends at one of 128
    buffer = SimpleNamespace(
        buckets=[bucket(256, 140), bucket(128, 100), bucket(128, 128)],
        param_index_map={"a": (0, 60, 0), "b": (64, 140, 0), "c": (256, 356, 1), "d": (384, 512, 2)},
    )
    want = {"a": (0, 60, 0), "b": (64, 140, 0), "c": (140, 240, 1), "d": (240, 368, 2)}
    assert repairs.without_padding(buffer) == want


def test_samples_that_a_run_still_needs(repairs):
    train = SimpleNamespace(train_iters=10, eval_interval=4, eval_iters=3, global_batch_size=5)
    # evaluations after steps 4 and 8, and at the end
    assert repairs.samples_left(train, 0) == (50, 45)
    assert repairs.samples_left(train, 4) == (30, 30)
    assert repairs.samples_left(train, 10) == (0, 15)


def test_data_of_a_run_that_is_resumed_with_other_settings(repairs):
    from megatron.bridge.data import loaders

    asked = []

    def build(num_samples, config):
        asked.append(num_samples)
        raise InterruptedError

    train = SimpleNamespace(train_iters=10, train_samples=None, eval_interval=2, eval_iters=3, global_batch_size=2)
    config = SimpleNamespace(train=train, dataset=None)
    for consumed in ((0, 0), (40, 60)):
        state = SimpleNamespace(step=8, consumed_train_samples=consumed[0], consumed_valid_samples=consumed[1])
        with pytest.raises(InterruptedError):
            loaders.build_train_valid_test_data_loaders(config, state, build, None)
    assert asked == [(20, 36, 6), (44, 72, 6)]


def test_a_resumed_run_follows_the_learning_rates_it_is_given(repairs):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    def scheduler(max_lr, min_lr):
        optimizer = SimpleNamespace(param_groups=[{"max_lr": 3e-4, "min_lr": 3e-5, "wd_mult": 1.0}])
        return OptimizerParamScheduler(
            optimizer, 0.0, max_lr, min_lr, lr_warmup_steps=1, lr_decay_steps=10, lr_decay_style="cosine",
            start_wd=0.1, end_wd=0.1, wd_incr_steps=10, wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True,
        )  # fmt: skip

    begun = scheduler(3e-4, 3e-5)
    begun.step(increment=4)
    resumed = scheduler(1e-5, 1e-6)  # its optimizer's groups are those of the checkpoint
    resumed.load_state_dict(begun.state_dict())
    assert 1e-6 < resumed.optimizer.param_groups[0]["lr"] < 1e-5
