# SPDX-License-Identifier: Apache-2.0
"""Scales of 8-bit input projections from sequences: the largest input and the largest weight of each become 448.

``scale = 448 / amax / 2^margin``, as in Transformer Engine's delayed scaling, with the largest magnitude ``amax`` over
all sequences in place of that over the last training steps.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from evo2_megatron.checkpoint import distcp, layout
from evo2_megatron.checkpoint.adapter import check_whole
from evo2_megatron.checkpoint.load import LoadedModel, load_model
from evo2_megatron.checkpoint.run_config import read_run_config
from evo2_megatron.checkpoint.strip_optimizer import kept_tensors
from evo2_megatron.checkpoint.write import check_new, new_checkpoint
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.data.fasta_dataset import FastaDataset
from evo2_megatron.data.nucleotides import log_no_dna
from evo2_megatron.ops.fp8 import E4M3_MAX
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks import self_test
from evo2_megatron.tasks.conversion.export import copy_weights
from evo2_megatron.tasks.scoring.batch_progress import Words
from evo2_megatron.tasks.scoring.predict import check_lengths, position_range
from evo2_megatron.tasks.scoring.prediction_runner import Runner
from evo2_megatron.tasks.scoring.prediction_settings import ModelChanges, Output
from evo2_megatron.tasks.scoring.shared_batches import SharedBatches
from evo2_megatron.tasks.transfer import disk_errors

if TYPE_CHECKING:
    from evo2_megatron.model.striped_hyena import StripedHyenaModel

logger = logging.getLogger(__name__)

_WORDS = Words("Calibrating", "Calibrated on", "sequences")
_LARGEST_MARGIN = 15
"""With more, what is as large as anything seen would be rounded as the smallest numbers of e4m3 are, or to 0."""

_SMALLEST = 1e-30
"""What is smaller has no scale that float32 could hold, and needs none."""


@disk_errors()
def calibrate_fp8(
    fasta: Path,
    ckpt_dir: Path,
    target: Path,
    *,
    margin: int = 0,
    changes: ModelChanges = ModelChanges(),
    parallel: ParallelConfig = ParallelConfig(),
    precision: str | None = None,
    prepend_bos: bool = False,
    max_seq_length: int | None = None,
    chunk_length: int | None = None,
    with_self_test: bool | None = None,
) -> Path | None:
    """Copy a checkpoint's weights and give them ``fp8_scales``; every process of the job calls this.

    Args:
        fasta: Sequences like those that the model will read, plain or gzip.
        ckpt_dir: A whole model, or the folder of a run's checkpoints (the newest is taken).
        target: Folder to write to; the checkpoint keeps its name in it.
        margin: Powers of two that the scales stay below what would just fit, for inputs larger than any seen here.
        changes: How the model differs from the checkpoint while it reads; of its fields ``fp8`` and
            ``use_subquadratic_ops``.
        parallel: Sizes of the layout; the rest of the processes are copies of the model, which share the sequences.
        precision: Recipe of number formats. None: as in the checkpoint.
        prepend_bos: Start sequences with the token between documents, as in training.
        max_seq_length: Most tokens to accept; None: what the checkpoint was trained for.
        chunk_length: Longer sequences go through the model in pieces of this many tokens. None: what suits the device.
        with_self_test: Score fixed sequences with the new scales and store the result for ``--self-test``; None: if
            the weights are small.

    Returns:
        The folder of the new checkpoint; None on all processes but the first.

    Raises:
        UserError: No such checkpoint, adapters alone, inputs that are not finite, or something is in the way.
    """
    if not 0 <= margin <= _LARGEST_MARGIN:
        raise UserError(f"--margin is {margin}; give 0 to {_LARGEST_MARGIN}")
    parallel.check_world_size(distributed.world_size())
    checkpoint = layout.resolve_checkpoint_path(ckpt_dir)
    iteration = layout.iteration_of(checkpoint)
    check_new(target, iteration)
    run_config = read_run_config(checkpoint)
    check_whole(run_config)
    kept_tensors(checkpoint)
    dataset = FastaDataset(fasta, prepend_bos=prepend_bos)
    log_no_dna(dataset.no_dna, len(dataset.ids), "sequences")
    check_lengths(dataset, max_seq_length or position_range(run_config, changes))
    with distributed.process_groups(parallel, seed=run_config.seed):
        overrides = changes.overrides(run_config.pattern)
        loaded = load_model(
            checkpoint, parallel=parallel, precision=precision, provider_overrides=overrides, fp8=changes.fp8
        )
        input_maxima = _largest_inputs(loaded, dataset, chunk_length)
        if distributed.rank() == 0:
            scales = _scales(checkpoint, input_maxima, margin)
            _write(checkpoint, target, scales, {"fasta": str(fasta.absolute()), "margin": margin}, with_self_test)
        torch.distributed.barrier()
    return target / layout.iteration_name(iteration) if distributed.rank() == 0 else None


def _largest_inputs(loaded: LoadedModel, dataset: FastaDataset, chunk_length: int | None) -> dict[int, float]:
    """Over all sequences, by number of the layer from 0; the same on all processes."""
    from megatron.core.utils import unwrap_model

    output = Output(log_probs="sum")
    runner = Runner(loaded.model, output, precision=loaded.precision, chunk_length=chunk_length)
    with _recording(unwrap_model(loaded.model)) as maxima:
        _read(runner, dataset)
    return _of_all(maxima)


def _read(runner: Runner, dataset: FastaDataset) -> None:
    """Run this copy's share of the sequences, each alone and cut to what the layout divides: without padding."""
    lengths = [length - length % runner.multiple for length in dataset.lengths]
    whole = [number for number, length in enumerate(lengths) if length >= runner.min_length]
    if not whole:
        raise UserError(
            f"no sequence has {max(runner.min_length, runner.multiple)} tokens, which this parallel layout needs; "
            "give longer ones, or use fewer processes per model"
        )
    if len(whole) < len(lengths) and distributed.rank() == 0:
        logger.warning("%d sequences are too short for this parallel layout", len(lengths) - len(whole))
    shared = SharedBatches([[number] for number in whole], _WORDS)

    def compute(batch: int) -> dict[str, Tensor] | None:
        item, length = dataset[whole[batch]], lengths[whole[batch]]
        return runner([item | {name: item[name][:length] for name in ("tokens", "loss_mask")}])

    for _ in shared.run(compute, tokens=lambda batch: lengths[whole[batch]], units=lambda batch: 1):
        pass  # what the model sees on the way is all that is wanted


def _of_all(maxima: dict[int, Tensor]) -> dict[int, float]:
    """The largest that any process has seen."""
    of_each: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(of_each, {layer: value.item() for layer, value in maxima.items()})
    largest: dict[int, float] = {}
    for of_one in of_each:
        for layer, value in of_one.items():
            if not math.isfinite(value):
                raise UserError(
                    f"layer {layer} has inputs that are not finite; try --mixed-precision-recipe fp32, or check the "
                    "checkpoint with predict_evo2 --self-test"
                )
            largest[layer] = max(value, largest.get(layer, 0.0))
    return dict(sorted(largest.items()))


@contextlib.contextmanager
def _recording(model: StripedHyenaModel) -> Iterator[dict[int, Tensor]]:
    """Meanwhile, note the largest magnitude that every Hyena projection of this process sees behind its norm."""
    from evo2_megatron.model.mixer import HyenaMixer
    from evo2_megatron.model.torch_modules import rms_norm

    maxima: dict[int, Tensor] = {}
    hooks = []
    for layer in model.decoder.layers:
        mixer = getattr(layer, "mixer", None)
        if not isinstance(mixer, HyenaMixer):
            continue

        def note(module: torch.nn.Module, inputs: tuple[Any, ...], number: int = layer.layer_number - 1) -> None:
            # the norm is part of the module, of Transformer Engine's, too, which does not show what comes out of it
            norm_LBH = rms_norm(inputs[0], module.layer_norm_weight, module.config.layernorm_epsilon)
            largest = norm_LBH.detach().float().abs().amax()
            # unlike Python's max, maximum() keeps NaN
            maxima[number] = torch.maximum(maxima[number], largest) if number in maxima else largest

        hooks.append(mixer.dense_projection.register_forward_pre_hook(note))
    try:
        yield maxima
    finally:
        for hook in hooks:
            hook.remove()


def _scales(checkpoint: Path, input_maxima: dict[int, float], margin: int) -> dict[int, tuple[float, float]]:
    index = distcp.read_index(checkpoint)
    names = {layer: f"decoder.layers.{layer}.mixer.dense_projection.weight" for layer in input_maxima}
    stored = distcp.stored_tensors(checkpoint, index, {name: name for name in names.values()})
    scales = {}
    for layer, input_max in input_maxima.items():
        tensor = stored[names[layer]]
        weight_max = max(tensor.read_rows(*rows).float().abs().max().item() for rows in tensor.pieces())
        scales[layer] = (scale_for(input_max, margin), scale_for(weight_max, margin))
        logger.info(
            "layer %d: largest input %.4g, largest weight %.4g; scales %.4g and %.4g",
            layer, input_max, weight_max, *scales[layer],
        )  # fmt: skip
    return scales


def scale_for(largest: float, margin: int = 0) -> float:
    """What takes a magnitude to 448, the largest of e4m3, or ``margin`` powers of two below; 1 for zero."""
    return E4M3_MAX / largest / 2**margin if largest > _SMALLEST else 1.0


def _write(
    checkpoint: Path,
    target: Path,
    scales: dict[int, tuple[float, float]],
    origin: dict[str, Any],
    with_self_test: bool | None,
) -> None:
    with new_checkpoint(target, layout.iteration_of(checkpoint)) as folder:
        copy_weights(checkpoint, folder)
        # numbers of the scales before
        (folder / layout.SELF_TEST).unlink(missing_ok=True)
        run_config = read_run_config(folder)
        section = {layer: list(pair) for layer, pair in scales.items()}
        sections = {**run_config.sections, "fp8_scales": section, "fp8_calibration": origin}
        (folder / layout.RUN_CONFIG).write_text(yaml.safe_dump(sections, sort_keys=False))
        if self_test.wants_numbers(with_self_test, sum(kept_tensors(folder).values())):
            from evo2_megatron.model.provider import architecture_of

            self_test.store(folder, architecture_of(run_config.provider()))
    logger.info("%d projections have scales from %s", len(scales), origin["fasta"])
