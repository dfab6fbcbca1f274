# SPDX-License-Identifier: Apache-2.0
"""The thread that owns the model: takes jobs from a bounded queue, batches what goes together, and answers."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from evo2_megatron.checkpoint.load import LoadedModel, tensor_shapes
from evo2_megatron.config import Fp8Choice, ParallelConfig, UserError, WeightFormat
from evo2_megatron.runtime import distributed, megatron
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.forward import OUTPUT_NOT_FINITE
from evo2_megatron.tasks.generation.cache_memory import memory_limit
from evo2_megatron.tasks.generation.generation_model import (
    GenerationCheckpoint,
    decoder_of,
    find_checkpoint,
    layout_of_generation,
    log_memory,
)
from evo2_megatron.tasks.scoring import allele_scoring
from evo2_megatron.tasks.scoring.allele_scoring import SharedContext
from evo2_megatron.tasks.scoring.batching import Backoff, RunsBatches, batch_tokens, plan_batches
from evo2_megatron.tasks.scoring.prediction_runner import Runner
from evo2_megatron.tasks.scoring.prediction_settings import Output
from evo2_megatron.tasks.scoring.variant_windows import plan_groups
from evo2_megatron.tasks.server.attempt import RETRY_SECONDS, attempt
from evo2_megatron.tasks.server.generations import Generations
from evo2_megatron.tasks.server.jobs import GenerateJob, Job, LayersJob, PassJob, Refused, VariantsJob, Vectors
from evo2_megatron.tasks.server.layer_outputs import layer_outputs, module_names
from evo2_megatron.tasks.server.turns import Turn, Turns

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

logger = logging.getLogger(__name__)

_DONE = object()
_MOST_RETRY_SECONDS = 60
_REMEMBERED = 32  # finished jobs whose times tell how fast the queue moves


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """Which model is served, and how much at a time."""

    ckpt_dir: Path
    base_ckpt_dir: Path | None = None
    precision: str | None = None
    fp8: Fp8Choice = "as_asked"
    provider_overrides: Mapping[str, Any] = field(default_factory=dict)
    with_self_test: bool = False
    tensor_parallel_size: int = 1
    """Processes that share a copy of the model; the rest of the processes are further copies."""

    max_seq_length: int | None = None
    """Most tokens of a sequence, prompt and completion together; None: what the checkpoint was trained for and memory
    allows."""

    max_batch_size: int = 16
    """Most sequences that are generated at a time."""

    max_queue: int = 128
    """Most requests that wait; further ones are refused."""

    @property
    def parallel(self) -> ParallelConfig:
        """The layout of a copy."""
        return ParallelConfig(tensor=self.tensor_parallel_size)


class ModelInfo(NamedTuple):
    """What is known of a loaded model."""

    checkpoint: Path
    num_layers: int
    hidden_size: int
    num_parameters: int
    pattern: str
    vocab_size: int
    precision: str
    quantize_weights: WeightFormat
    device: str
    max_seq_length: int
    module_names: frozenset[str]
    num_copies: int
    """Of the model, each with its own queue."""


class Engine:
    """Runs in a thread of its own; ``submit``, ``info`` and ``stop`` may be used from others.

    Of processes that share a copy of the model each has one, and only the first gets jobs.
    """

    def __init__(self, settings: ModelSettings, *, on_ready: Callable[[ModelInfo], None] | None = None) -> None:
        """Look at the checkpoint, but load nothing yet; ``on_ready`` is called in the engine's thread.

        Raises:
            UserError: There is no such checkpoint.
        """
        self.settings = settings
        self.info: ModelInfo | None = None
        """None until the model is loaded."""
        self._on_ready = on_ready
        self._checkpoint: GenerationCheckpoint = find_checkpoint(settings.ckpt_dir, settings.base_ckpt_dir)
        self._condition = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._stopped = False
        self._num_submitted = 0
        self._generations: Generations | None = None
        self._answering: Sequence[Job] = []
        self._passes: Iterator[None] = iter(())  # through which they go, a batch at each item
        self._finished: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_generating(self) -> int:
        return 0 if self._generations is None else self._generations.num_sequences

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for a result."""
        return not (self._waiting or self.num_generating or self._answering)

    def submit(self, job: Job) -> None:
        """Put a job into the queue; ``Refused`` if it is full or nobody will look at it."""
        with self._condition:
            if self._stopped:
                raise Refused(503, "the server has stopped")
            if self.info is None:
                raise still_loading()
            if len(self._waiting) >= self.settings.max_queue:
                raise Refused(
                    503,
                    f"{len(self._waiting)} requests wait already, as many as --max-queue allows; try again",
                    retry_after=self._retry_after(),
                )
            self._num_submitted += 1
            job.number = self._num_submitted
            self._waiting.append(job)
            self._condition.notify()

    def _retry_after(self) -> int:
        """Seconds in which, at the pace of the last jobs, half of the queue is done."""
        if len(self._finished) < 2:
            return 1
        pace = (time.monotonic() - self._finished[0]) / len(self._finished)
        return min(max(math.ceil(pace * len(self._waiting) / 2), 1), _MOST_RETRY_SECONDS)

    def stop(self) -> None:
        """End ``run`` at its next look; who still waits gets a 503."""
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def run(self) -> None:
        """Load the model and work until ``stop`` of the first process's engine.

        Raises:
            UserError: The model cannot be loaded here, or memory ran out for one of several processes.
        """
        turn: Turn | None = None
        try:
            with distributed.process_groups(self.settings.parallel):
                turns = Turns()
                model = _Model.load(self._checkpoint, self.settings)
                self._generations = Generations(model.decoder, self.settings.max_batch_size)
                self.info = model.info
                log_memory("After model setup")
                turns.all_are_ready()
                if self._on_ready is not None:
                    self._on_ready(model.info)
                while (turn := self._next(turns)) is not None:
                    self._work(turn, model, self._generations)
        finally:
            self.stop()
            refused = Refused(503, "the server has stopped")
            if self._generations is not None:
                self._generations.fail(refused)
            taken = () if turn is None else (*turn.generate, *turn.other)
            for job in (*taken, *self._answering, *self._waiting):  # one that is told twice reads the first
                job.reply.put(refused)
            self._answering, self._waiting = [], deque()

    def _next(self, turns: Turns) -> Turn | None:
        """Wait for something to do; None at the end."""
        if not turns.is_first:
            return turns.receive()
        with self._condition:
            while self.is_idle and not self._stopped:
                self._condition.wait()
            turn = None if self._stopped else self._take()
        turns.send(turn)
        return turn

    def _work(self, turn: Turn, model: _Model, generations: Generations) -> None:
        """Begin what is new, and advance what runs."""
        for job in self._under_way():
            job.dropped = job.number in turn.dropped
        if turn.generate:
            generations.admit(turn.generate)
        self._finished += [time.monotonic()] * generations.advance()
        if turn.other:
            self._answering, self._passes = turn.other, _answer(turn.other, model)
        if self._answering and all(job.dropped for job in self._answering):
            self._passes, self._answering = iter(()), []
        if self._answering and next(self._passes, _DONE) is _DONE:
            self._finished += [time.monotonic()] * len(self._answering)
            self._answering = []

    def _under_way(self) -> list[Job]:
        return [*self._answering, *(self._generations.jobs if self._generations is not None else ())]

    def _take(self) -> Turn:
        """Generations for which there is room; and of the rest the oldest job, with others that go with it, unless
        there are some already."""
        room = self.settings.max_batch_size - self.num_generating
        generate: list[GenerateJob] = []
        other: list[Any] = []
        num_tokens = 0
        stay: deque[Job] = deque()
        for job in self._waiting:
            if job.reply.cancelled:
                continue
            if isinstance(job, GenerateJob) and len(generate) < room:
                generate.append(job)
            elif self._answering:
                stay.append(job)
            elif not isinstance(job, GenerateJob) and (not other or _go_together(other[0], job, num_tokens)):
                other.append(job)
                num_tokens += job.num_tokens if isinstance(job, PassJob) else 0
            else:
                stay.append(job)
        self._waiting = stay
        return Turn(generate, other, frozenset(job.number for job in self._under_way() if job.reply.cancelled))


def still_loading() -> Refused:
    """Why nothing is answered yet."""
    return Refused(503, "the model is being loaded; try again", retry_after=RETRY_SECONDS)


class _Model:
    """A loaded model, and the two ways to use it."""

    def __init__(self, loaded: LoadedModel, decoder: StripedHyenaModel, info: ModelInfo) -> None:
        self.loaded, self.decoder, self.info = loaded, decoder, info

    @classmethod
    def load(cls, checkpoint: GenerationCheckpoint, settings: ModelSettings) -> _Model:
        loaded = self_test.load_model_checked(
            checkpoint.path,
            with_self_test=settings.with_self_test,
            parallel=layout_of_generation(settings.parallel),
            precision=settings.precision,
            provider_overrides=settings.provider_overrides,
            base_ckpt_dir=settings.base_ckpt_dir,
            fp8=settings.fp8,
        )
        decoder = decoder_of(loaded)
        limit = settings.max_seq_length
        if limit is None:
            limit = checkpoint.seq_length
            fits = memory_limit(decoder, settings.max_batch_size, layers_move=True)
            if fits < 2:
                raise UserError(
                    f"there is no memory for the caches of {settings.max_batch_size} sequences; lower --max-batch-size"
                )
            if fits < limit:
                logger.warning(
                    "The caches of %d sequences have memory for %d tokens each, fewer than the %d of training; "
                    "a lower --max-batch-size allows longer ones", settings.max_batch_size, fits, limit,
                )  # fmt: skip
                limit = fits
        info = ModelInfo(
            checkpoint=checkpoint.path,
            num_layers=loaded.provider.num_layers,
            hidden_size=loaded.provider.hidden_size,
            num_parameters=_num_parameters(decoder, checkpoint),
            pattern=loaded.run_config.pattern,
            vocab_size=checkpoint.vocab_size,
            precision=loaded.precision,
            quantize_weights=loaded.provider.quantize_weights,
            device=megatron.device_name(),
            max_seq_length=limit,
            module_names=frozenset(module_names(decoder, whole_only=settings.tensor_parallel_size > 1)),
            num_copies=distributed.data_parallel_size(),
        )
        return cls(loaded, decoder, info)

    def runner(self, output: Output) -> Runner:
        layers = output.layers_of(self.info.num_layers)
        return Runner(self.loaded.model, output, precision=self.loaded.precision, layers=layers)


def _num_parameters(decoder: StripedHyenaModel, checkpoint: GenerationCheckpoint) -> int:
    """Of the whole model, of which this process may have a part."""
    whole = tensor_shapes(checkpoint.base) | tensor_shapes(checkpoint.path)
    # the layer that an adapter stands beside is inside it, and is stored by its own name
    shapes = {name.replace(".to_wrap", ""): parameter.shape for name, parameter in decoder.named_parameters()}
    return sum(math.prod(whole.get(name, shape)) for name, shape in shapes.items())


def _go_together(first: Job, job: Job, num_tokens: int) -> bool:
    """Whether a job joins those taken; not more than a batch at a time, so that generations go on meanwhile."""
    if not (isinstance(first, PassJob) and isinstance(job, PassJob)):
        return False
    return job.output == first.output and num_tokens + job.num_tokens <= batch_tokens()


def _answer(jobs: Sequence[PassJob] | Sequence[LayersJob] | Sequence[VariantsJob], model: _Model) -> Iterator[None]:
    """Run one batch at each item, so that generations go on between them; answer when all is done."""
    if isinstance(jobs[0], PassJob):
        work = _run_passes(jobs, model)
    else:
        work = (_run_layers if isinstance(jobs[0], LayersJob) else _run_variants)(jobs[0], model)
    while (refused := attempt(next, work, _DONE)) is None:
        yield
    if refused is _DONE:
        return
    if len(jobs) == 1:
        jobs[0].reply.put(refused)
        return
    for job in jobs:  # the fault of one is not that of the others
        yield from _answer([job], model)


def _run_passes(jobs: Sequence[PassJob], model: _Model) -> Iterator[None]:
    run = _with_backoff(model.runner(jobs[0].output))
    sequences = [(job, place) for job in jobs for place in range(len(job.items))]
    lengths = [len(job.items[place]["tokens"]) for job, place in sequences]
    for job in jobs:
        job.rows = [{} for _ in job.items]
    for batch in plan_batches(lengths, max_tokens=batch_tokens()):
        mine = [index for index in batch if not sequences[index][0].dropped]
        if not mine:
            continue
        result = yield from run.in_pieces([sequences[index][0].items[sequences[index][1]] for index in mine])
        for row, index in enumerate(mine):
            job, place = sequences[index]
            job.rows[place] = {name: _own(values[row], lengths[index], job.output) for name, values in result.items()}
    for job in jobs:
        finite = all(np.isfinite(values).all() for row in job.rows for values in row.values())
        job.reply.put(Vectors(job.rows) if finite else Refused(500, OUTPUT_NOT_FINITE))


def _run_variants(job: VariantsJob, model: _Model) -> Iterator[None]:
    most = allele_scoring.batch_tokens()
    run = _with_backoff(SharedContext(model.runner(Output(log_probs="sum")), max_tokens=most))
    rows: list[dict[str, np.ndarray]] = [{} for group in job.groups for _ in group.jobs]
    for batch in plan_groups(job.groups, max_tokens=most):
        if job.dropped:
            return
        result = yield from run.in_pieces([job.items[index] for index in batch])
        numbers = [number for index in batch for number in job.groups[index].jobs]
        for place, number in enumerate(numbers):
            rows[number] = {name: values[place].numpy() for name, values in result.items()}
    finite = all(np.isfinite(values).all() for row in rows for values in row.values())
    job.reply.put(Vectors(rows) if finite else Refused(500, OUTPUT_NOT_FINITE))


def _with_backoff(run: RunsBatches) -> Backoff | RunsBatches:
    """Where memory runs out for one of several processes that share a model, the others could not follow."""
    return Backoff(run, can_split=True) if distributed.is_one_process_per_copy() else run


def _own(values: Tensor, length: int, output: Output) -> np.ndarray:
    """What is a sequence's own, without padding; log-probabilities have one place fewer than tokens."""
    per_token = values.dim() > 0 and output.pooling is None
    return (values[:length] if per_token else values).numpy().copy()


def _run_layers(job: LayersJob, model: _Model) -> Iterator[None]:
    try:
        job.reply.put(Vectors([layer_outputs(model.runner(Output()), model.decoder, job.item, job.modules)]))
    except UserError as error:
        job.reply.put(Refused(422, str(error)))
    except Refused as refused:
        job.reply.put(refused)
    yield
