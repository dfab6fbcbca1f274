# SPDX-License-Identifier: Apache-2.0
"""Outputs of a trained prediction head for many sequences or all of their bases, and what they mean.

Shape legend: N sequences or bases of all sequences, B sequences of a batch, L tokens, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from evo2_megatron.checkpoint.load import LoadedModel
from evo2_megatron.data.fasta_dataset import make_sample
from evo2_megatron.data.labelled_dataset import base_windows, pad
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.model import pieces
from evo2_megatron.runtime import megatron
from evo2_megatron.tasks.scoring.batch_progress import Words
from evo2_megatron.tasks.scoring.batching import Backoff, Batch, Item, batch_tokens, plan_batches
from evo2_megatron.tasks.scoring.prediction_runner import collate
from evo2_megatron.tasks.scoring.shared_batches import SharedBatches

if TYPE_CHECKING:
    from evo2_megatron.model.head import HeadProvider


_SHARED_AT_ONCE = 1 << 20
"""Outputs that all processes learn at a time."""


class _Part(NamedTuple):
    """A sequence, or a window of one, and where its outputs go."""

    ids: bytes
    kept: slice
    """Of its outputs [bases, C], or [1, C] where they are the sequence's."""

    place: int
    """Of the first of them among all outputs."""


def run_head(
    loaded: LoadedModel, ids: Sequence[bytes], *, both_strands: bool = False, max_batch_tokens: int | None = None
) -> np.ndarray:
    """Outputs of sequences, float32 [N, C], or of their bases, the same on all processes, which share the work.

    Args:
        loaded: A model with a head.
        ids: Token ids, one byte each. Of sequences longer than those of training the rest is not read, or, if each
            base has outputs, they are cut into windows: see ``data.labelled_dataset.base_windows``.
        both_strands: Mean of a sequence's and its reverse complement's; a head of bases sees what it saw in training.
        max_batch_tokens: Most tokens of a forward pass, padding included; None: what suits the device.
    """
    provider, device = loaded.provider, megatron.device()
    parts, num_outputs = _parts(ids, provider, both_strands=both_strands)
    most = (max_batch_tokens or batch_tokens()) // (2 if provider.head_both_sides else 1)
    batches = plan_batches([len(part.ids) for part in parts], max_tokens=most)
    run = Backoff(_HeadRunner(loaded), can_split=True)
    unit = "windows" if provider.head_per_base else "sequences"
    shared = SharedBatches(batches, Words("Predicting", "Predicted", unit))

    def compute(number: int) -> Batch | None:
        return run([make_sample(parts[index].ids, index) for index in batches[number]])

    outputs = torch.zeros(num_outputs, len(provider.head_outputs))
    for _, batch in shared.run(
        compute,
        tokens=lambda number: sum(len(parts[index].ids) for index in batches[number]),
        units=lambda number: len(batches[number]),
    ):
        for index, of_part in zip(batch["seq_idx"].tolist(), batch["outputs"]):
            part = parts[index]
            kept = of_part[part.kept]
            outputs[part.place : part.place + len(kept)] = kept
    for some in outputs.split(_SHARED_AT_ONCE):  # those of all bases of a genome would not fit beside the model
        of_all = some.to(device)
        torch.distributed.all_reduce(of_all)  # each part is one process's, and zero elsewhere
        some.copy_(of_all)
    if both_strands and not provider.head_per_base:
        outputs = outputs.unflatten(0, (2, -1)).mean(0)
    return outputs.numpy()


def _parts(ids: Sequence[bytes], provider: HeadProvider, *, both_strands: bool) -> tuple[list[_Part], int]:
    """What goes through the model, and how many outputs there are."""
    if provider.head_per_base:
        windows = base_windows([len(s) for s in ids], provider.seq_length, both_sides=provider.head_both_sides)
        parts = [_Part(ids[w.row][w.start : w.end], slice(*w.kept), w.place) for w in windows]
        return parts, sum(map(len, ids))
    cut = [sequence[: provider.seq_length] for sequence in ids]
    strands = [*cut, *map(reverse_complement, cut)] if both_strands else cut
    return [_Part(sequence, slice(0, 1), place) for place, sequence in enumerate(strands)], len(strands)


class _HeadRunner:
    """Batches through the language model, in pieces where they are long, and then through the head."""

    def __init__(self, loaded: LoadedModel) -> None:
        from megatron.core.utils import unwrap_model

        self._model = unwrap_model(loaded.model)
        self.chunk_length = pieces.chunk_length()

    @torch.no_grad()
    def __call__(self, items: Sequence[Item]) -> Batch:
        batch, config, device = collate(items), self._model.config, megatron.device()
        inputs = [batch["tokens"], batch["loss_mask"].bool()]
        if config.head_both_sides:
            opposite = [reverse_complement(bytes(item["tokens"].tolist())) for item in items]
            inputs.append(pad(opposite, batch["tokens"].shape[1])[0])
        inputs = [value_BL.to(device) for value_BL in inputs]
        features = self._model.features_in_pieces(*inputs, chunk_length=self.chunk_length)
        if not config.head_per_base:
            features = features[:, None]
        # in pieces, too: in a wide hidden layer and in float32, all bases take several times the memory
        outputs = torch.cat([self._model.prediction_head(part) for part in features.split(self.chunk_length, 1)], 1)
        return {"outputs": outputs.float().cpu(), "seq_idx": batch["seq_idx"]}


def to_values(outputs_NC: np.ndarray, provider: HeadProvider) -> np.ndarray:
    """What outputs mean, float64 [N, C]: probabilities of classes or labels, or numbers."""
    wide_NC = torch.from_numpy(outputs_NC).double()
    if provider.head_task == "classification":
        return wide_NC.softmax(1).numpy()
    if provider.head_task == "multilabel":
        return wide_NC.sigmoid().numpy()
    return wide_NC.numpy() * np.array(provider.head_target_scale) + np.array(provider.head_target_mean)
