# SPDX-License-Identifier: Apache-2.0
"""What ``evo2_classifier.py`` trains: an Evo 2 model with a classification head, its data, and one step of training.

Call ``evo2_megatron.runtime.megatron.enter`` before importing this.

Shape legend: B sequences, L tokens, H channels of the backbone, C classes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.bridge.training.config import DatasetBuildContext, DatasetProvider
from megatron.bridge.training.state import GlobalState
from megatron.core.utils import WrappedTensor
from torch import Tensor, nn
from torch.utils.data import Dataset

from evo2_megatron.checkpoint.adapter import base_checkpoint, read_adapters
from evo2_megatron.checkpoint.load import EMBEDDING, load_weights, stored_shapes, tensor_shapes
from evo2_megatron.checkpoint.run_config import OWN_PROVIDER, RunConfig, read_run_config
from evo2_megatron.config import UserError
from evo2_megatron.data.tokenizer import PAD, encode_sequence
from evo2_megatron.model.provider import StripedHyenaProvider
from evo2_megatron.model.striped_hyena import StripedHyenaModel
from evo2_megatron.ops.casing import to_upper
from evo2_megatron.runtime import megatron

logger = logging.getLogger(__name__)

HEAD = "classification_head"
"""Name of the head in the model, and so the start of its parameters' names in checkpoints."""

Pool = Literal["mean", "last"]


def pool(hidden_LBH: Tensor, mask_BL: Tensor, how: Pool) -> Tensor:
    """One vector per sequence, float32 [B, H].

    Args:
        hidden_LBH: Hidden states in any float dtype.
        mask_BL: True where there is a base; true somewhere in every sequence.
        how: ``mean`` over the bases, or ``last``: the last base's, the only one that has seen all others.
    """
    if how == "last":
        last_B = mask_BL.shape[1] - 1 - mask_BL.int().flip(1).argmax(1)
        return hidden_LBH[last_B, torch.arange(len(last_B), device=last_B.device)].float()
    mask_LB1 = mask_BL.t()[..., None]
    return (hidden_LBH.float() * mask_LB1).sum(0) / mask_LB1.sum(0)


class ClassificationHead(nn.Module):
    """LayerNorm, linear layer, GELU, dropout, linear layer: a vector per sequence to a score per class."""

    def __init__(self, config: ClassifierProvider) -> None:
        super().__init__()
        hidden_size, dtype = config.classifier_hidden_size or config.hidden_size, config.params_dtype
        self.norm = nn.LayerNorm(config.hidden_size, dtype=dtype)
        self.hidden = nn.Linear(config.hidden_size, hidden_size, dtype=dtype)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.scores = nn.Linear(hidden_size, config.num_classes, dtype=dtype)
        for layer in (self.hidden, self.scores):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)

    def forward(self, pooled_BH: Tensor) -> Tensor:
        normed_BH = self.norm(pooled_BH.to(self.norm.weight.dtype))
        return self.scores(self.dropout(F.gelu(self.hidden(normed_BH))))


class EvoClassifier(StripedHyenaModel):
    """The whole language model, whose parameters keep their names, and the head on top of its final norm.

    The output projection is built, because checkpoints of the backbone have it where it is not tied, and never runs.
    """

    def __init__(self, config: ClassifierProvider, vocab_size: int) -> None:
        super().__init__(config, vocab_size, pre_process=True, post_process=True)
        self.classification_head = ClassificationHead(config)

    def forward(self, input_ids: Tensor, pool_mask: Tensor) -> Tensor:
        """Scores [B, C] (logits) for token ids [B, L] and a mask [B, L] that is true where there is a base."""
        embedded = self.embedding(input_ids=input_ids, position_ids=None)
        angles = self._rotary_angles(input_ids, embedded, None)
        hidden_LBH = self.decoder(WrappedTensor(embedded), angles)
        return self.classification_head(pool(hidden_LBH, pool_mask, self.config.classifier_pool))


@dataclass
class ClassifierProvider(StripedHyenaProvider):
    """Configuration of the backbone and the head; section ``model`` of the checkpoints' run_config.yaml."""

    num_classes: int = 2
    classifier_hidden_size: int | None = None
    """Width of the head; None: that of the backbone."""

    classifier_dropout: float = 0.1
    classifier_pool: Pool = "mean"

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> EvoClassifier:
        """Build the model, with random weights."""
        return EvoClassifier(self, self.vocab_size)


HEAD_FIELDS = tuple(f.name for f in fields(ClassifierProvider) if f not in fields(StripedHyenaProvider))


def classifier_provider(backbone: RunConfig, **values: Any) -> ClassifierProvider:
    """A classifier on the model that a checkpoint describes: of a language model, or of a classifier.

    Args:
        backbone: What the checkpoint says.
        values: Fields of ClassifierProvider that it does not say or that differ.
    """
    # the class named there is that of a language model, or ours, which has its fields
    model = {**backbone.model}
    if model.get("_target_") == f"{ClassifierProvider.__module__}.{ClassifierProvider.__qualname__}":
        model["_target_"] = OWN_PROVIDER
    language_model = RunConfig(backbone.path, {**backbone.sections, "model": model}).provider()
    known = {f.name: getattr(language_model, f.name) for f in fields(language_model) if f.init}
    head = {name: model[name] for name in HEAD_FIELDS if name in model}
    # nothing is recomputed: sequences are short
    recompute = {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None}
    return ClassifierProvider(**(known | head | recompute | {"should_pad_vocab": False} | values))


def is_backbone(name: str) -> bool:
    """Whether a parameter's name is one of the language model's."""
    return not name.startswith(f"{HEAD}.")


def read_classifier_config(checkpoint: Path) -> RunConfig:
    """What the checkpoint of a classifier says; UserError for another kind."""
    run_config = read_run_config(checkpoint)
    if "num_classes" not in run_config.model or not run_config.is_lora:
        raise UserError(f"{checkpoint} is no checkpoint of a classifier; train one with evo2_classifier.py")
    return run_config


def check_same_head(own: RunConfig, model: ClassifierProvider) -> None:
    """Raise UserError where a run that is to go on had another head."""
    for name in HEAD_FIELDS:
        if own.model.get(name) != getattr(model, name):
            raise UserError(
                f"{own.path.parent} was trained with {name} {own.model.get(name)}, not {getattr(model, name)}; choose "
                "another --result-dir or --experiment-name"
            )


def load_classifier(checkpoint: Path, base_ckpt_dir: Path | None) -> tuple[EvoClassifier, int]:
    """A trained model in evaluation mode, and its longest sequence in tokens; call it inside process groups.

    Args:
        checkpoint: One iteration.
        base_ckpt_dir: Where the backbone is now; None: where it was in training.
    """
    run_config = read_classifier_config(checkpoint)
    base = base_checkpoint(checkpoint, run_config, base_ckpt_dir)
    stored = stored_shapes(base)
    provider = classifier_provider(run_config, vocab_size=stored[EMBEDDING][0], perform_initialization=False)
    run_config.precision_values().setup(provider)
    provider.finalize()
    with contextlib.redirect_stdout(sys.stderr):  # Bridge prints its size
        (model,) = provider.provide_distributed_model(
            wrap_with_ddp=False, use_cpu_initialization=not megatron.on_cuda()
        )
    load_weights(model, base, stored, dropped_layers=(), only=is_backbone)
    adapters = read_adapters(run_config)
    adapters(model, training=False)
    load_weights(model, checkpoint, tensor_shapes(checkpoint), dropped_layers=(), only=adapters.adapter_key_filter)
    return model.eval(), provider.seq_length


class LabelledSequences(Dataset):
    """Lines ``{"sequence": "ACGT", "label": 0}`` of a file. Bases count as upper case, as language models read them.

    A sample holds ``tokens`` (int64 [L], padded at the end), ``pool_mask`` (bool [L]) and ``label`` (int64 []).
    """

    def __init__(self, path: Path | str, *, seq_length: int, num_classes: int) -> None:
        """Read and check the whole file.

        Args:
            path: JSON Lines.
            seq_length: Tokens per sample; what is longer is cut off at the end, which is logged.
            num_classes: Labels are from 0 to below this.

        Raises:
            UserError: The file cannot be read, holds nothing, or a line of it is wrong.
        """
        self.seq_length = seq_length
        self._samples = read_labelled(Path(path), num_classes)
        num_cut = sum(len(ids) > seq_length for ids, _ in self._samples)
        if num_cut:
            logger.warning("%s: %s sequences are cut to %s bases", path, num_cut, seq_length)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        ids, label = self._samples[number]
        tokens, pool_mask = pad([ids], self.seq_length)
        return {"tokens": tokens[0], "pool_mask": pool_mask[0], "label": torch.tensor(label)}


def read_labelled(path: Path, num_classes: int) -> list[tuple[bytes, int]]:
    """Token ids and label of every line; blank lines do not count. UserError names a wrong line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text; give JSON Lines") from None
    samples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            samples.append(_parse(line, num_classes, where=f"{path}, line {number}"))
    if not samples:
        raise UserError(f"{path} holds no sequences")
    return samples


def _parse(line: str, num_classes: int, *, where: str) -> tuple[bytes, int]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or not record.keys() >= {"sequence", "label"}:
        raise UserError(f'{where}: it must be like {{"sequence": "ACGT", "label": 0}}')
    label = record["label"]
    if type(label) is not int or not 0 <= label < num_classes:
        raise UserError(f"{where}: label is {label!r}; it must be a whole number from 0 to {num_classes - 1}")
    return encode(record["sequence"], name=where), label


def encode(sequence: Any, *, name: str) -> bytes:
    """Token ids of a sequence, one byte each; UserError for what is no sequence."""
    if not isinstance(sequence, str) or not sequence.strip():
        raise UserError(f"{name}: sequence is {sequence!r}; it must be text with one base or more")
    return encode_sequence(sequence.strip().encode(), name=name)


def pad(sequences: list[bytes], length: int) -> tuple[Tensor, Tensor]:
    """Token ids, int64 [B, L] in upper case, cut and padded to a length; and where there are bases, bool [B, L].

    Padding follows the bases, so that a causal model's hidden states of bases do not depend on it.
    """
    tokens_BL = torch.full((len(sequences), length), PAD)
    mask_BL = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, ids in enumerate(sequences):
        bases = torch.tensor(list(ids[:length]))
        tokens_BL[row, : len(bases)], mask_BL[row, : len(bases)] = bases, True
    return to_upper(tokens_BL), mask_BL


@dataclass(kw_only=True)
class LabelledSequencesProvider(DatasetProvider):
    """What Megatron Bridge builds the three datasets from; kept in run_config.yaml."""

    train_jsonl: str
    val_jsonl: str | None = None
    test_jsonl: str | None = None
    seq_length: int = 512
    """Tokens per sample."""

    num_classes: int = 2
    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = "cyclic"
    """In another order in every pass."""

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Dataset, Dataset | None, Dataset | None]:
        """Read the files; every process must call this."""
        train, val, test = (
            path and LabelledSequences(path, seq_length=self.seq_length, num_classes=self.num_classes)
            for path in (self.train_jsonl, self.val_jsonl, self.test_jsonl)
        )
        return train, val, test


def forward_step(state: GlobalState, data_iterator: Iterator, model: nn.Module) -> tuple[Tensor, partial]:
    """One micro-batch, as Bridge's training loop asks for it: scores [B, C], and what makes the loss of them."""
    batch = {name: tensor.to(megatron.device(), non_blocking=True) for name, tensor in next(data_iterator).items()}
    return model(batch["tokens"], batch["pool_mask"]), partial(summed_loss, batch["label"])


def summed_loss(label_B: Tensor, score_BC: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Cross-entropy in nat summed over a micro-batch, the number of sequences, and sums and counts to report."""
    loss = F.cross_entropy(score_BC.float(), label_B, reduction="sum")
    count = torch.tensor(len(label_B), dtype=torch.int, device=label_B.device)
    num_right = (score_BC.argmax(1) == label_B).sum()
    report = {"ce loss": torch.stack([loss.detach(), count]), "accuracy": torch.stack([num_right, count]).float()}
    return loss, count, report
