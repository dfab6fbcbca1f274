# SPDX-License-Identifier: Apache-2.0
"""What a training run needs so that a resumed one computes what it would have without the interruption: on every
machine, a defect of checkpoints and one of data; where Transformer Engine or a GPU is missing, a few more. And two
defects of the curves that it leaves, and three of how it ends, by a kill, by Ctrl-C and by itself.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import signal
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from typing import Any

from evo2_megatron.runtime import megatron
from evo2_megatron.runtime.children import end_with_parent


@functools.cache
def install() -> None:
    """Put the repairs that this machine needs in place; call after ``megatron.enter_training``."""
    from megatron.bridge.data import loaders
    from megatron.bridge.training import pretrain
    from megatron.bridge.training.utils import flop_utils, train_utils
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    _repair_sample_counts(loaders)
    _repair_resumed_rates(OptimizerParamScheduler)
    _name_test_losses(pretrain)
    # Megatron Bridge 0.3.1 counts what a run with adapters computes as if the model were a Transformer. Ends when it
    # asks the model there, too
    flop_utils.num_floating_point_operations = train_utils.num_floating_point_operations = operations_of_step
    _repair_padded_buckets(distrib_optimizer.DistributedOptimizer)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _repair_torch_adam(distrib_optimizer.DistributedOptimizer)
    PersistentAsyncCaller.async_loop = staticmethod(write_checkpoints)
    _close_writer_once(PersistentAsyncCaller)
    _end_results_with_training(filesystem_async)
    _end_writers_with_training(filesystem_async.FileSystemWriterAsync)
    if not megatron.on_cuda():
        _keep_random_state_when_loading_data()


def _repair_sample_counts(loaders: Any) -> None:
    """Megatron Bridge 0.3.1 makes datasets as long as a run needs that had its settings from the first step on.

    One that is resumed with a smaller batch, or with more or longer evaluations, comes to their end before its own.

    Ends when ``get_train_valid_test_num_samples`` asks how many samples are consumed.
    """
    upstream = loaders.build_train_valid_test_data_loaders

    @functools.wraps(upstream)
    def build(
        cfg: Any, train_state: Any, build_train_valid_test_datasets_provider: Callable[..., Any], dp_group: Any
    ) -> Any:
        def build_enough(num_samples: tuple[int, int, int], config: Any) -> Any:
            train, valid, test = num_samples
            train_left, valid_left = samples_left(cfg.train, train_state.step)
            train = max(train, train_state.consumed_train_samples + train_left)
            valid = max(valid, train_state.consumed_valid_samples + valid_left)
            return build_train_valid_test_datasets_provider((train, valid, test), config)

        return upstream(cfg, train_state, build_enough, dp_group)

    loaders.build_train_valid_test_data_loaders = build


def _repair_resumed_rates(scheduler: Any) -> None:
    """Megatron Core 0.16.1 keeps the highest and lowest learning rate in the optimizer's groups, too, and reads these.

    A resumed run gets them from the checkpoint, so that other ones have no effect, even where
    ``override_opt_param_scheduler`` says that they are to be followed. No group of ours has rates of its own.

    Ends when ``OptimizerParamScheduler.load_state_dict`` changes the groups.
    """
    upstream = scheduler.load_state_dict

    @functools.wraps(upstream)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        if self.override_opt_param_scheduler:
            for group in self.optimizer.param_groups:
                group.update(max_lr=self.max_lr, min_lr=self.min_lr)
        upstream(self, state_dict)

    scheduler.load_state_dict = load_state_dict


def samples_left(train: Any, step: int) -> tuple[int, int]:
    """Training and validation samples that a run still needs after a step; there is an evaluation at the end, too."""
    evaluations = train.train_iters // train.eval_interval - step // train.eval_interval + 1
    steps = train.train_iters - step
    return steps * train.global_batch_size, evaluations * train.eval_iters * train.global_batch_size


def operations_of_step(config: Any, batch_size: int = 1) -> float:
    """Operations of an optimizer step over so many samples, all processes together, by the model's own count.

    Two thirds of it where weights are frozen: there are no gradients of weights then but for what is trained beside
    them, which does not count, as adapters do not.
    """
    whole = config.model._get_num_floating_point_operations(batch_size)
    return whole if config.peft is None else whole * 2 / 3


def _name_test_losses(pretrain: Any) -> None:
    """Megatron Bridge 0.3.1 writes the loss of the test set as validation's, at the step of the last validation.

    Ends when ``evaluate_and_print_results`` names what it writes by ``is_test``.
    """
    upstream = pretrain.evaluate_and_print_results

    @functools.wraps(upstream)
    def evaluate(state: Any, *args: Any, is_test: bool = False, **settings: Any) -> None:
        if not is_test:
            upstream(state, *args, **settings)
            return
        with (
            _renaming(state.tensorboard_logger, "add_scalar", _of_test),
            _renaming(state.wandb_logger, "log", _all_of_test),
        ):
            upstream(state, *args, is_test=True, **settings)

    pretrain.evaluate_and_print_results = evaluate


def _of_test(tag: str) -> str:
    return tag.replace(" validation", " test")


def _all_of_test(values: dict[str, Any]) -> dict[str, Any]:
    return {_of_test(tag): value for tag, value in values.items()}


@contextlib.contextmanager
def _renaming(writer: Any, method: str, renamed: Callable[[Any], Any]) -> Iterator[None]:
    """Let a writer's method rename what it is given first; most processes have no writer."""
    if writer is None:
        yield
        return
    write = getattr(writer, method)
    setattr(writer, method, lambda what, *rest: write(renamed(what), *rest))
    try:
        yield
    finally:
        setattr(writer, method, write)


def _repair_padded_buckets(cls: Any) -> None:
    """A defect of Megatron Core 0.16.1's fully reshardable optimizer checkpoints that loses weights without a word.

    It joins the buckets of a gradient buffer without the padding at their ends, but looks for each parameter at its
    place with the padding. Embeddings that two pipeline stages share have a bucket of their own, after another: where
    that one is padded, a piece of other parameters is saved as the embedding.

    Ends when Megatron subtracts the padding in ``sharded_param_state_fully_reshardable``.
    """
    upstream = cls.sharded_param_state_fully_reshardable

    @functools.wraps(upstream)
    def sharded_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        for buffer in self.buffers:
            buffer.param_index_map = without_padding(buffer)
        try:
            return upstream(self, *args, **kwargs)
        finally:
            for buffer, places in zip(self.buffers, padded):
                buffer.param_index_map = places

    cls.sharded_param_state_fully_reshardable = sharded_state


def without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """Start, end and bucket of every parameter of a gradient buffer, with its buckets joined without their padding."""
    paddings = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    before = [0, *itertools.accumulate(paddings)]
    return {
        parameter: (start - before[bucket], end - before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def _repair_torch_adam(cls: Any) -> None:
    """Three defects of Megatron Core 0.16.1's distributed optimizer around PyTorch's Adam and its counter ``step``.

    It asks a fresh optimizer for the number of steps done, before anything is loaded, and fails. It hands one counter
    to all parameters, which each then count it up. And depending on the checkpoint's format it sets the counters back,
    or looks for them among the tensors and fails.

    Ends when Megatron's tests resume without Transformer Engine.
    """
    import torch

    upstream = {
        name: getattr(cls, name)
        for name in (
            "state_dict",
            "load_state_dict",
            "_get_main_param_and_optimizer_states",
            "_set_main_param_and_optimizer_states",
        )
    }

    def state_dict(self: Any) -> Any:
        adam = self.optimizer
        if not adam.state:
            for group in adam.param_groups:
                for parameter in group["params"]:
                    # what Adam itself begins with
                    adam.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return upstream["state_dict"](self)

    def load_state_dict(self: Any, state_dict: Any) -> None:
        upstream["load_state_dict"](self, state_dict)
        # written with the settings of the groups
        (step,) = {float(group["step"]) for group in state_dict["optimizer"]["param_groups"]}
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(step)

    def get_states(self: Any, model_param: Any) -> dict[str, torch.Tensor]:
        states = upstream["_get_main_param_and_optimizer_states"](self, model_param)
        return {name: tensor for name, tensor in states.items() if name != "step"}

    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        own = upstream["_get_main_param_and_optimizer_states"](self, model_param)
        upstream["_set_main_param_and_optimizer_states"](self, model_param, {**tensors, "step": own["step"]})

    cls.state_dict, cls.load_state_dict = state_dict, load_state_dict
    cls._get_main_param_and_optimizer_states = get_states
    cls._set_main_param_and_optimizer_states = set_states


def _keep_random_state_when_loading_data() -> None:
    """Dropout on a CPU draws from the generator from which a DataLoader draws its workers' seeds, too.

    Bridge makes the loaders after it has restored the random state, so that a resumed run would go on with another.
    """
    import torch
    from torch.utils.data import DataLoader

    original = DataLoader.__iter__

    @functools.wraps(original)
    def iterate(self: DataLoader) -> Any:
        state = torch.get_rng_state()
        try:
            return original(self)
        finally:
            torch.set_rng_state(state)

    DataLoader.__iter__ = iterate


def _close_writer_once(cls: Any) -> None:
    """Megatron Core 0.16.1 closes the writer of checkpoints once more when it is forgotten, after the process groups,
    and asks for its rank then: a traceback below a run that went well.

    Ends when ``close`` looks for a process first.
    """
    upstream = cls.close

    @functools.wraps(upstream)
    def close(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.process is not None:
            upstream(self, *args, **kwargs)

    cls.close = close


def _end_writers_with_training(cls: Any) -> None:
    """Megatron Core 0.16.1 forks a process for each file of a checkpoint. Where the one that waits for them is killed,
    they wait for it: they hold its memory, and its lock of the run's folder, so that the run cannot go on.

    Ends when they end with it.
    """
    upstream = cls.write_preloaded_data

    @functools.wraps(upstream)  # Megatron looks at its signature
    def write(*args: Any, **kwargs: Any) -> None:
        end_with_parent()
        upstream(*args, **kwargs)

    cls.write_preloaded_data = staticmethod(write)


def _end_results_with_training(module: Any) -> None:
    """Nor does the process end that keeps the results of these writers."""

    def results_queue() -> Any:
        if module._results_queue is None:
            manager = SyncManager(ctx=module.mp.get_context("spawn"))
            manager.start(initializer=end_with_parent)
            module._results_queue = manager.Queue()
        return module._results_queue

    module._get_write_results_queue = results_queue


def write_checkpoints(*args: Any) -> None:
    """What Megatron's checkpoint writer, a process that starts from nothing, runs.

    A terminal sends Ctrl-C to it, too: the training process ends it, and one of them has to say so.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    if not megatron.on_cuda():
        from evo2_megatron.runtime import cuda_on_cpu

        cuda_on_cpu.install()
        FileSystemWriterAsync.preload_tensors = staticmethod(copy_tensors)
    _end_writers_with_training(FileSystemWriterAsync)
    PersistentAsyncCaller.async_loop(*args)


def copy_tensors(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    """Take the snapshot that training waits for: the tensors are in memory that it goes on to change.

    Megatron's own version copies from the GPU, which leaves tensors of the CPU where they are.
    """
    return [
        (file, key, (in_bytes, [(item, tensor.clone()) for item, tensor in tensors]))
        for file, key, (in_bytes, tensors) in write_buckets
    ]
