# SPDX-License-Identifier: Apache-2.0
"""A prediction head on a StripedHyena model: sequences to classes, labels or numbers, and the loss to train it.

Shape legend: B sequences, L tokens, H channels of the backbone, C outputs of the head, T targets: 1 for
classification, else C.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial

import torch
import torch.nn.functional as F
from megatron.bridge.training.state import GlobalState
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from evo2_megatron.model import pieces
from evo2_megatron.model.frozen_features import FrozenFeatures
from evo2_megatron.model.pooling import Pool, Pooling, without_padding
from evo2_megatron.model.provider import StripedHyenaProvider
from evo2_megatron.model.striped_hyena import StripedHyenaModel
from evo2_megatron.runtime import megatron

HEAD = "prediction_head"
"""Name of the head in the model, and so the start of its parameters' names in checkpoints."""

LOSS_NAMES = {"classification": "ce loss", "multilabel": "bce loss", "regression": "mse loss"}
"""What the loss of a task is called in logs."""

_SMALLEST_SCALE = 0.01
"""Of a channel's spread, as a share of the mean one: what hardly varies is not blown up."""


@dataclass
class HeadProvider(StripedHyenaProvider):
    """Configuration of the backbone and the head; section ``model`` of the checkpoints' run_config.yaml."""

    head_task: str = "classification"
    """One of ``LOSS_NAMES``."""

    head_outputs: list[str] = field(default_factory=list)
    """Names of the outputs: classes, labels or numbers."""

    head_hidden_size: int | None = None
    """Width of the head's hidden layer; None: that of the backbone; 0: there is none, and the head is linear."""

    head_dropout: float = 0.1
    head_pooling: Pooling = "mean"
    head_weights: list[float] | None = None
    """In the loss: of each class; or of the positive cases of each label. None: 1."""

    head_target_mean: list[float] | None = None
    """Of regression: the head's outputs are (target - mean) / scale."""

    head_target_scale: list[float] | None = None

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> StripedHyenaWithHead:
        """Build the model, with random weights."""
        return StripedHyenaWithHead(self, self.vocab_size)


HEAD_FIELDS = tuple(f.name for f in fields(HeadProvider) if f.name.startswith("head_"))


def is_backbone(name: str) -> bool:
    """Whether a parameter's name is one of the language model's."""
    return not name.startswith(f"{HEAD}.")


class PredictionHead(nn.Module):
    """LayerNorm, linear layer, GELU, dropout, linear layer: a vector per sequence to the outputs."""

    def __init__(self, config: HeadProvider) -> None:
        super().__init__()
        width, dtype, num_outputs = config.head_hidden_size, config.params_dtype, len(config.head_outputs)
        width = config.hidden_size if width is None else width
        self.norm = nn.LayerNorm(config.hidden_size, dtype=dtype)
        self.hidden = nn.Linear(config.hidden_size, width, dtype=dtype) if width else nn.Identity()
        self.dropout = nn.Dropout(config.head_dropout)
        self.outputs = nn.Linear(width or config.hidden_size, num_outputs, dtype=dtype)
        for layer in (self.hidden, self.outputs):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
                nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def begin_with(self, pooled_NH: Tensor) -> None:
        """Set the norm's weight and bias so that these pooled hidden states come out with mean 0 and variance 1.

        Pooled hidden states of different sequences differ little beside what they share, and a layer that sees both
        learns slowly. Data-dependent initialisation as of Salimans and Kingma (arXiv 1602.07868).
        """
        norm = self.norm
        normed_NH = F.layer_norm(pooled_NH.float(), norm.normalized_shape, eps=norm.eps)
        scale_H, mean_H = torch.std_mean(normed_NH, dim=0, correction=0)
        scale_H = scale_H.clamp(min=max(_SMALLEST_SCALE * scale_H.mean().item(), norm.eps))
        norm.weight.copy_(1 / scale_H)
        norm.bias.copy_(-mean_H / scale_H)

    def forward(self, pooled_BH: Tensor) -> Tensor:
        """Outputs [B, C] of pooled hidden states, float32 [B, H]."""
        norm = self.norm
        # in float32: what tells sequences apart is in the last digits of what they share
        normed_BH = F.layer_norm(pooled_BH, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        hidden_BH = self.hidden(normed_BH.to(self.outputs.weight.dtype))
        if isinstance(self.hidden, nn.Linear):
            hidden_BH = F.gelu(hidden_BH)
        return self.outputs(self.dropout(hidden_BH))


class StripedHyenaWithHead(StripedHyenaModel):
    """The language model, whose parameters keep their names, and the head on top of its final norm.

    The output projection is built, because checkpoints of the backbone have it where it is not tied, and never runs.
    """

    def __init__(self, config: HeadProvider, vocab_size: int) -> None:
        super().__init__(config, vocab_size, pre_process=True, post_process=True)
        self.prediction_head = PredictionHead(config)
        self.frozen_features = FrozenFeatures(self)

    @property
    def backbone_learns(self) -> bool:
        """Whether the language model has a parameter that wants a gradient."""
        return any(p.requires_grad for name, p in self.named_parameters() if is_backbone(name))

    def forward(self, input_ids: Tensor, pool_mask: Tensor) -> Tensor:
        """Outputs [B, C], before any softmax or sigmoid; of regression, standardised.

        Args:
            input_ids: Token ids [B, L].
            pool_mask: Bool [B, L], true where there is a base.
        """
        return self.prediction_head(self.pooled(input_ids, pool_mask))

    def pooled(self, input_ids: Tensor, pool_mask: Tensor) -> Tensor:
        """What the head sees, float32 [B, H]; arguments as of ``forward``."""
        input_ids, pool_mask = self._padded(input_ids, pool_mask)
        pool = Pool(pool_mask, self.config.head_pooling)
        pool.add(0, self.through_layers(input_ids).transpose(0, 1))
        return pool.vector_BH

    @torch.no_grad()
    def pooled_in_pieces(self, input_ids: Tensor, pool_mask: Tensor, *, chunk_length: int | None = None) -> Tensor:
        """As ``pooled``, without gradients, for a model in evaluation mode: memory does not grow with the length.

        Args:
            input_ids, pool_mask: As of ``forward``.
            chunk_length: Tokens that go through at a time. None: what suits the device.
        """
        input_ids, pool_mask = self._padded(input_ids, pool_mask)
        batch_size, num_tokens = input_ids.shape
        size = pieces.of_each(chunk_length or pieces.chunk_length(), batch_size, multiple=self._multiple)
        if num_tokens <= size:
            return self.pooled(input_ids, pool_mask)
        pool, state = Pool(pool_mask, self.config.head_pooling), self.new_inference_state(batch_size, num_tokens)
        for start in range(0, num_tokens, size):
            pool.add(start, self.through_layers(input_ids[:, start : start + size], state).transpose(0, 1))
        return pool.vector_BH

    @property
    def _multiple(self) -> int:
        return pieces.LOW_PRECISION_TOKENS if self.config.fp8 or self.config.fp4 else 1

    def _padded(self, *values_BL: Tensor) -> tuple[Tensor, ...]:
        """Token ids and masks with zeros behind them, for formats that want lengths of their own."""
        missing = -values_BL[0].shape[1] % self._multiple
        return tuple(F.pad(value_BL, (0, missing)) for value_BL in values_BL)


def forward_step(state: GlobalState, data_iterator: Iterator, model: nn.Module) -> tuple[Tensor, partial]:
    """One micro-batch, as Bridge's training loop asks for it: outputs [B, C], and what makes the loss of them."""
    batch = next(data_iterator)
    tokens_BL, mask_BL = batch["tokens"], batch["pool_mask"]
    device, inner = megatron.device(), unwrap_model(model)
    if inner.backbone_learns:
        tokens_BL, mask_BL = without_padding(tokens_BL, mask_BL)
        outputs_BC = model(tokens_BL.to(device, non_blocking=True), mask_BL.to(device, non_blocking=True))
    else:
        # the wrapper for 16 bits would round what tells sequences apart
        outputs_BC = inner.prediction_head(inner.frozen_features(tokens_BL, mask_BL))
    targets_BT = batch["targets"].to(device, non_blocking=True)
    return outputs_BC, partial(summed_loss, inner.config, targets_BT)


def summed_loss(
    config: HeadProvider, targets_BT: Tensor, outputs_BC: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss summed over a micro-batch, the number of known targets, and sums and counts to report.

    Classes: cross-entropy in nat. Labels: binary cross-entropy in nat. Numbers: squared error of standardised ones.

    Args:
        config: Task, weights and standardisation.
        targets_BT: float32: number of the class, 0 or 1, or a number; NaN where it is not known.
        outputs_BC: Of the head.
    """
    outputs_BC = outputs_BC.float()
    known_BT = ~targets_BT.isnan()
    targets_BT = targets_BT.nan_to_num()
    weights = None if config.head_weights is None else outputs_BC.new_tensor(config.head_weights)
    num_right = None
    if config.head_task == "classification":
        class_B = targets_BT[:, 0].long()
        loss_BT = F.cross_entropy(outputs_BC, class_B, weight=weights, reduction="none")[:, None]
        # not an index, whose result has a size that the host waits for
        num_right = ((outputs_BC.argmax(1) == class_B)[:, None] & known_BT).sum()
    elif config.head_task == "multilabel":
        loss_BT = F.binary_cross_entropy_with_logits(outputs_BC, targets_BT, pos_weight=weights, reduction="none")
        num_right = (((outputs_BC > 0) == (targets_BT > 0.5)) & known_BT).sum()
    else:
        mean_T, scale_T = map(outputs_BC.new_tensor, (config.head_target_mean, config.head_target_scale))
        loss_BT = (outputs_BC - (targets_BT - mean_T) / scale_T).square()
    loss = torch.where(known_BT, loss_BT, 0.0).sum()
    count = known_BT.sum().int()
    report = {LOSS_NAMES[config.head_task]: torch.stack([loss.detach(), count.float()])}
    if num_right is not None:
        report["accuracy"] = torch.stack([num_right, count]).float()
    return loss, count, report
