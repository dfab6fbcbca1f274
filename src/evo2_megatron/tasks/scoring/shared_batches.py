# SPDX-License-Identifier: Apache-2.0
"""Batches that the copies of a model share, and that outlast a job that is killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from evo2_megatron.checkpoint.load import LoadedModel
from evo2_megatron.runtime import distributed, megatron
from evo2_megatron.tasks.scoring import prediction_parts
from evo2_megatron.tasks.scoring.batch_progress import BatchProgress, Words
from evo2_megatron.tasks.scoring.prediction_files import RESULTS, ResultNames
from evo2_megatron.tasks.scoring.prediction_manifest import versions
from evo2_megatron.tasks.scoring.prediction_parts import Batch, Parts


class SharedBatches:
    """All batches of a run, which the copies of the model take in turn."""

    def __init__(self, batches: Sequence[Sequence[int]], words: Words) -> None:
        """The same on all processes.

        Args:
            batches: Numbers of the results that each batch gives.
            words: For the log.
        """
        self._batches, self._words = batches, words
        distributed.tell_of_idle_gpus()
        self._copy, self._copies = distributed.data_parallel_rank(), distributed.data_parallel_size()
        self._done: set[int] = set()

    @property
    def mine(self) -> range:
        """Numbers of the batches of this copy, done or not."""
        return range(self._copy, len(self._batches), self._copies)

    def resume(
        self,
        output_dir: Path,
        settings: dict[str, Any],
        loaded: LoadedModel,
        identity: list[Any],
        *,
        names: ResultNames = RESULTS,
        batch_by_batch: bool = False,
    ) -> Parts:
        """Where results are kept. What an earlier job left there counts if all that decides about results is the same.

        Args:
            output_dir: Folder of the results, which all processes see; results of another run are deleted.
            settings: What decides what the results are, besides model, device and versions; must survive JSON.
            loaded: The model.
            identity: Of the checkpoint, by ``prediction_parts.identity``.
            names, batch_by_batch: As for ``prediction_parts.begin``.

        Raises:
            UserError: A process does not see the folder, or the disk refuses.
        """
        first = distributed.rank() == 0
        if first:
            of_run = {"checkpoint": identity, "precision": loaded.precision, "device": megatron.device_name()}
            settings = settings | of_run | {"versions": versions()}
            prediction_parts.begin(output_dir, settings, self._batches, names=names, batch_by_batch=batch_by_batch)
        torch.distributed.barrier()
        parts = Parts(output_dir, self._batches)
        done = [parts.done() if first else None]
        torch.distributed.broadcast_object_list(done, src=0)
        self._done = done[0]
        return parts

    def run(
        self, compute: Callable[[int], Batch | None], *, tokens: Callable[[int], int], units: Callable[[int], int]
    ) -> Iterator[tuple[int, Batch]]:
        """Run this copy's share of what is not done, and show how far it is.

        Args:
            compute: Gives the results of a batch; None on all pipeline stages but the last.
            tokens: Of a batch.
            units: How many of what ``words.unit`` names a batch has.

        Yields:
            Number of a batch and its results, where there are any.
        """
        todo = [number for number in self.mine if number not in self._done]
        progress = BatchProgress([tokens(number) for number in todo], self._words)
        for number in todo:
            result = compute(number)
            progress.advance(units(number))
            if result is not None:
                yield number, result
        torch.distributed.barrier()
        progress.finish()
