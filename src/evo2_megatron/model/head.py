# SPDX-License-Identifier: Apache-2.0
"""A prediction head on a StripedHyena model: sequences, or each of their bases, to classes, labels or numbers.

And the loss to train it. Shape legend: B sequences, L tokens, P tokens of a piece, H channels of the backbone, F those
that the head sees, C outputs of the head, T targets: 1 for classification, else C; N cases: sequences or bases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from evo2_megatron.model import pieces
from evo2_megatron.model.frozen_features import FrozenFeatures
from evo2_megatron.model.pooling import Pool, Pooling, without_padding
from evo2_megatron.model.provider import StripedHyenaProvider
from evo2_megatron.model.striped_hyena import StripedHyenaModel
from evo2_megatron.runtime import megatron

if TYPE_CHECKING:
    from megatron.bridge.training.state import GlobalState  # with Bridge's training loop, which scoring has no use for

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
    head_per_base: bool = False
    """Whether each base has outputs, instead of a sequence; nothing is pooled then."""

    head_both_sides: bool = False
    """Per base: whether the head sees the hidden states of the base's partner in the reverse complement, too."""

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


HEAD_FIELDS = tuple(f for f in fields(HeadProvider) if f.name.startswith("head_"))


def is_backbone(name: str) -> bool:
    """Whether a parameter's name is one of the language model's."""
    return not name.startswith(f"{HEAD}.")


class _WideLayerNorm(nn.LayerNorm):
    """In float32: what tells sequences apart is in the last digits of what they share."""

    def forward(self, features: Tensor) -> Tensor:
        weight_F, bias_F = self.weight.float(), self.bias.float()
        return F.layer_norm(features.float(), self.normalized_shape, weight_F, bias_F, self.eps)


class PredictionHead(nn.Module):
    """LayerNorm, linear layer, GELU, dropout, linear layer: a vector of a sequence or of a base to the outputs."""

    def __init__(self, config: HeadProvider) -> None:
        super().__init__()
        width, dtype, num_outputs = config.head_hidden_size, config.params_dtype, len(config.head_outputs)
        width = config.hidden_size if width is None else width
        num_features = config.hidden_size * (2 if config.head_both_sides else 1)
        self.norm = _WideLayerNorm(num_features, dtype=dtype)
        self.hidden = nn.Linear(num_features, width, dtype=dtype) if width else nn.Identity()
        self.dropout = nn.Dropout(config.head_dropout)
        self.outputs = nn.Linear(width or num_features, num_outputs, dtype=dtype)
        for layer in (self.hidden, self.outputs):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
                nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def begin_with(self, features_NF: Tensor) -> None:
        """Set the norm's weight and bias so that these hidden states come out with mean 0 and variance 1.

        Hidden states of different sequences, when pooled, differ little beside what they share, and a layer that sees
        both learns slowly. Data-dependent initialisation as of Salimans and Kingma (arXiv 1602.07868).
        """
        norm = self.norm
        normed_NF = F.layer_norm(features_NF.float(), norm.normalized_shape, eps=norm.eps)
        scale_F, mean_F = torch.std_mean(normed_NF, dim=0, correction=0)
        scale_F = scale_F.clamp(min=max(_SMALLEST_SCALE * scale_F.mean().item(), norm.eps))
        norm.weight.copy_(1 / scale_F)
        norm.bias.copy_(-mean_F / scale_F)

    def forward(self, features: Tensor) -> Tensor:
        """Outputs [..., C] of hidden states [..., F] of any float dtype, whatever is in front."""
        hidden = self.hidden(self.norm(features).to(self.outputs.weight.dtype))
        if isinstance(self.hidden, nn.Linear):
            hidden = F.gelu(hidden)
        return self.outputs(self.dropout(hidden))


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

    def forward(self, input_ids: Tensor, base_mask: Tensor, opposite_ids: Tensor | None = None) -> Tensor:
        """Outputs [B, C], or [B, L, C] of each base, before any softmax or sigmoid; of regression, standardised.

        Args:
            input_ids: Token ids [B, L].
            base_mask: Bool [B, L], true where there is a base.
            opposite_ids: Of the reverse complement, [B, L], padded at the end; if the head sees both sides.
        """
        return self.prediction_head(self.features(input_ids, base_mask, opposite_ids))

    def features(self, input_ids: Tensor, base_mask: Tensor, opposite_ids: Tensor | None = None) -> Tensor:
        """What the head sees: pooled, float32 [B, F], or of each base, [B, L, F]; arguments as of ``forward``."""
        return self._features(input_ids, base_mask, opposite_ids, chunk_length=None)

    @torch.no_grad()
    def features_in_pieces(
        self,
        input_ids: Tensor,
        base_mask: Tensor,
        opposite_ids: Tensor | None = None,
        *,
        chunk_length: int | None = None,
    ) -> Tensor:
        """As ``features``, without gradients, for a model in evaluation mode: activations do not grow with the length.

        Args:
            input_ids, base_mask, opposite_ids: As of ``forward``.
            chunk_length: Tokens that go through at a time. None: what suits the device.
        """
        return self._features(input_ids, base_mask, opposite_ids, chunk_length=chunk_length or pieces.chunk_length())

    def _features(
        self, input_ids: Tensor, base_mask: Tensor, opposite_ids: Tensor | None, *, chunk_length: int | None
    ) -> Tensor:
        num_tokens = input_ids.shape[1]
        if self.config.head_both_sides:
            input_ids, base_mask = torch.cat((input_ids, opposite_ids)), base_mask.repeat(2, 1)
        multiple = pieces.LOW_PRECISION_TOKENS if self.config.fp8 or self.config.fp4 else 1
        # for formats that want lengths of their own: zeros behind the bases
        input_ids, base_mask = (F.pad(value_BL, (0, -num_tokens % multiple)) for value_BL in (input_ids, base_mask))
        size = chunk_length and pieces.of_each(chunk_length, len(input_ids), multiple=multiple)
        hidden = self._hidden_states(input_ids, size)
        if not self.config.head_per_base:
            pool = Pool(base_mask, self.config.head_pooling)
            for start, hidden_BPH in hidden:
                pool.add(start, hidden_BPH)
            return pool.vector_BH
        hidden_BLH = torch.cat([hidden_BPH for _, hidden_BPH in hidden], dim=1)[:, :num_tokens]
        if not self.config.head_both_sides:
            return hidden_BLH
        forward_BLH, opposite_BLH = hidden_BLH.chunk(2)
        return torch.cat((forward_BLH, _turned(opposite_BLH, base_mask[: len(forward_BLH), :num_tokens])), dim=-1)

    def _hidden_states(self, input_ids: Tensor, size: int | None) -> Iterator[tuple[int, Tensor]]:
        """Hidden states [B, P, H] of pieces of so many tokens, and where each begins; None: of all tokens at once."""
        batch_size, num_tokens = input_ids.shape
        if size is None or num_tokens <= size:
            yield 0, self.through_layers(input_ids).transpose(0, 1)
            return
        state = self.new_inference_state(batch_size, num_tokens)
        for start in range(0, num_tokens, size):
            yield start, self.through_layers(input_ids[:, start : start + size], state).transpose(0, 1)


def _turned(hidden_BLH: Tensor, base_mask: Tensor) -> Tensor:
    """Each sequence's bases in the opposite order, padding where it was."""
    position_BL = torch.arange(base_mask.shape[1], device=base_mask.device).expand_as(base_mask)
    partner_BL = torch.where(base_mask, base_mask.sum(1, keepdim=True) - 1 - position_BL, position_BL)
    return hidden_BLH.gather(1, partner_BL[..., None].expand_as(hidden_BLH))


def inputs_of(batch: dict[str, Tensor]) -> list[Tensor]:
    """Arguments of a model's ``forward``, out of samples of ``data.labelled_dataset``."""
    return [batch[name] for name in ("tokens", "base_mask", "opposite_tokens") if name in batch]


def forward_step(state: GlobalState, data_iterator: Iterator, model: nn.Module) -> tuple[Tensor, partial]:
    """One micro-batch, as Bridge's training loop asks for it: outputs [N, C], and what makes the loss of them."""
    batch = next(data_iterator)
    device, inner, inputs = megatron.device(), unwrap_model(model), inputs_of(batch)
    if inner.backbone_learns:
        inputs = without_padding(*inputs, mask=batch["base_mask"])
        outputs = model(*(value_BL.to(device, non_blocking=True) for value_BL in inputs))
    else:
        # the wrapper for 16 bits would round what tells sequences apart
        outputs = inner.prediction_head(inner.frozen_features(*inputs))
    targets = batch["targets"]
    if inner.config.head_per_base:
        targets, outputs = targets[:, : outputs.shape[1]].flatten(0, 1), outputs.flatten(0, 1)
    return outputs, partial(summed_loss, inner.config, targets.to(device, non_blocking=True))


def summed_loss(
    config: HeadProvider, targets_NT: Tensor, outputs_NC: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss summed over a micro-batch, the number of known targets, and sums and counts to report.

    Classes: cross-entropy in nat. Labels: binary cross-entropy in nat. Numbers: squared error of standardised ones.

    Args:
        config: Task, weights and standardisation.
        targets_NT: float32: number of the class, 0 or 1, or a number; NaN where it is not known.
        outputs_NC: Of the head.
    """
    outputs_NC = outputs_NC.float()
    known_NT = ~targets_NT.isnan()
    targets_NT = targets_NT.nan_to_num()
    weights = None if config.head_weights is None else outputs_NC.new_tensor(config.head_weights)
    num_right = None
    if config.head_task == "classification":
        class_N = targets_NT[:, 0].long()
        loss_NT = F.cross_entropy(outputs_NC, class_N, weight=weights, reduction="none")[:, None]
        # not an index, whose result has a size that the host waits for
        num_right = ((outputs_NC.argmax(1) == class_N)[:, None] & known_NT).sum()
    elif config.head_task == "multilabel":
        loss_NT = F.binary_cross_entropy_with_logits(outputs_NC, targets_NT, pos_weight=weights, reduction="none")
        num_right = (((outputs_NC > 0) == (targets_NT > 0.5)) & known_NT).sum()
    else:
        mean_T, scale_T = map(outputs_NC.new_tensor, (config.head_target_mean, config.head_target_scale))
        loss_NT = (outputs_NC - (targets_NT - mean_T) / scale_T).square()
    loss = torch.where(known_NT, loss_NT, 0.0).sum()
    count = known_NT.sum().int()
    report = {LOSS_NAMES[config.head_task]: torch.stack([loss.detach(), count.float()])}
    if num_right is not None:
        report["accuracy"] = torch.stack([num_right, count]).float()
    return loss, count, report
