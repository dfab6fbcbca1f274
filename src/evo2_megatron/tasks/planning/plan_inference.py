# SPDX-License-Identifier: Apache-2.0
"""What scoring or generation needs on every GPU: the project's own model, run on tensors without memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from evo2_megatron.architectures import architecture
from evo2_megatron.config import WeightFormat
from evo2_megatron.layouts import sequence_multiple
from evo2_megatron.model.pieces import CHUNK_LENGTH_CUDA
from evo2_megatron.recipes.options import TrainingOptions
from evo2_megatron.tasks.generation.generate import PREFILL_CHUNK
from evo2_megatron.tasks.generation.generation_model import layout_of_generation
from evo2_megatron.tasks.planning.plan import StagePlan, on_stage, planned_options

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule
    from torch import Tensor

    from evo2_megatron.runtime.memory_tracker import MemoryTracker

Use = Literal["score", "generate"]

SHORTEST = 512
"""Nobody asks for the longest sequence below."""


class Inference(NamedTuple):
    """What goes through the model at once."""

    use: Use
    num_sequences: int = 1
    chunk_length: int | None = None
    """Longer sequences go through in pieces of this many tokens. None: as on a GPU."""

    quantize_weights: WeightFormat = "none"

    @property
    def piece(self) -> int:
        """Tokens of a piece of one sequence."""
        return self.chunk_length or (CHUNK_LENGTH_CUDA if self.use == "score" else PREFILL_CHUNK)


def plan_inference(inference: Inference, *, vocab_size: int = 512, **given: Any) -> list[StagePlan]:
    """Plan a batch: on each pipeline stage weights, and the most that caches and activations add.

    Generation is a prompt of all tokens but one, and one new token: caches are allocated for all of them, and a token
    more needs no more.

    Args:
        inference: The batch.
        vocab_size: Rows of the embedding.
        given: Fields of ``recipes.options.TrainingOptions`` that choose model, precision, layout and ``seq_length``,
            here the tokens of a sequence, new ones included.

    Raises:
        UserError: Options that cannot work, or 8-bit precision, whose memory only a GPU shows.
    """
    options = planned_options(**given, global_batch_size=1)
    if inference.use == "generate":
        options = replace(options, parallel=layout_of_generation(options.parallel))
    # as sequences are padded
    multiple = sequence_multiple(options.parallel)
    options = replace(options, seq_length=-(-options.seq_length // multiple) * multiple)
    return [_plan_stage(inference, options, stage, vocab_size) for stage in range(options.parallel.pipeline)]


def batch_tokens(inference: Inference, **given: Any) -> int:
    """Tokens of a batch; ``given``: as for ``planned_options``."""
    return inference.num_sequences * planned_options(**given).seq_length


def positions(**given: Any) -> int:
    """Tokens that the model was made for, whatever memory there is; ``given``: as for ``planned_options``."""
    options = planned_options(**given)
    return architecture(options.model_size).position_range(options.seq_len_interpolation_factor)


def longest_sequence(inference: Inference, gpu_bytes: float, *, vocab_size: int = 512, **given: Any) -> int:
    """The most tokens a sequence may have within ``gpu_bytes`` and within the model's ``positions``.

    In whole pieces, or, where one does not fit, as a piece halved once or several times. From two pieces on, memory
    grows by the same number of bytes with each: by keys and values, and results.

    Args:
        inference: The batch.
        gpu_bytes: Memory of a GPU.
        vocab_size: As for ``plan_inference``.
        given: The same; its ``seq_length`` does not count.

    Returns:
        0 if not even ``SHORTEST`` tokens fit.
    """
    most = positions(**given)

    def needed(length: int) -> int:
        stages = plan_inference(inference, vocab_size=vocab_size, **given | {"seq_length": length})
        return max(stage.total_bytes for stage in stages)

    length = min(inference.piece, most)
    if needed(length) > gpu_bytes:
        while length > SHORTEST:
            length //= 2
            if needed(length) <= gpu_bytes:
                return length
        return 0
    if most <= 2 * inference.piece:
        return most if needed(most) <= gpu_bytes else length
    two, three = needed(2 * inference.piece), needed(min(3 * inference.piece, most))
    if two > gpu_bytes:
        return length
    pieces = 2 + int((gpu_bytes - two) / max(three - two, 1))
    return min(pieces * inference.piece, most)


def _plan_stage(inference: Inference, options: TrainingOptions, stage: int, vocab_size: int) -> StagePlan:
    import torch

    with on_stage(options, stage, options.parallel.model_size) as tracker, torch.no_grad():
        from evo2_megatron.tasks.planning import plan_step

        provider = plan_step.step_config(options, vocab_size).model
        provider.quantize_weights = inference.quantize_weights
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
        model.eval()
        weights = tracker.live_bytes
        tracker.forget_peak()
        tokens_BL = torch.full((inference.num_sequences, options.seq_length), ord("A"))
        if inference.use == "score":
            score(model, tokens_BL, inference.piece, options.precision)
        else:
            _generate(model, tokens_BL, inference.piece, tracker)
        return StagePlan(
            stage=stage,
            parameters=sum(p.numel() for p in model.parameters()),
            weight_bytes=weights,
            optimizer_bytes=0,
            activation_bytes=tracker.peak_bytes - weights,
            flops=tracker.flops,
        )


def score(model: MegatronModule, tokens_BL: Tensor, piece: int, precision: str) -> None:
    """What ``predict_evo2`` runs for a batch; the results are dropped."""
    import torch

    from evo2_megatron.tasks.scoring.prediction_runner import Runner
    from evo2_megatron.tasks.scoring.prediction_settings import Output

    runner = Runner(model, Output(log_probs="sum"), precision=precision, chunk_length=piece)
    runner([{"tokens": row, "loss_mask": torch.ones_like(row), "seq_idx": torch.tensor(0)} for row in tokens_BL])


def _generate(model: MegatronModule, tokens_BL: Tensor, piece: int, tracker: MemoryTracker) -> None:
    """All tokens but the last as a prompt, and the last one after it.

    Of many pieces of a prompt only the first two and the last two are run: those between take less memory than the
    last, and operations grow by the same number with each piece.
    """
    from megatron.core.utils import unwrap_model

    from evo2_megatron.tasks.forward import forward_last

    inner = unwrap_model(model)
    state = inner.new_inference_state(*tokens_BL.shape, last_token_logits_only=True)
    pieces = tokens_BL[:, :-1].split(piece, dim=1) if tokens_BL.shape[1] > 1 else ()
    flops: list[int] = []
    for number, part_BL in enumerate(pieces):
        if 2 <= number < len(pieces) - 2:
            state.advance(part_BL.shape[1])
            continue
        before = tracker.flops
        forward_last(inner, part_BL, state)
        flops.append(tracker.flops - before)
    if len(pieces) > 4:
        tracker.flops += (len(pieces) - 4) * (flops[1] + flops[2]) // 2
    forward_last(inner, tokens_BL[:, -1:], state)
