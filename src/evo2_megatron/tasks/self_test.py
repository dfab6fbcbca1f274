# SPDX-License-Identifier: Apache-2.0
"""``--self-test``: fixed sequences, scored when a checkpoint is written and again wherever it is run.

Conversion scores them with the second, slow statement of the model, layer by layer from the files just written, and
keeps the numbers in ``self_test.json``; a loaded model must find the sequences as probable, up to what its number
format moves. That covers what no other check does: damage after conversion, wrong kernels, a wrong precision.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import psutil
import torch
from torch import Tensor

from evo2_megatron.architectures import Architecture
from evo2_megatron.checkpoint import checksums, distcp, names
from evo2_megatron.checkpoint.adapter import base_checkpoint
from evo2_megatron.checkpoint.layout import CHECKSUMS, SELF_TEST, resolve_checkpoint_path
from evo2_megatron.checkpoint.load import LoadedModel, load_model
from evo2_megatron.checkpoint.run_config import read_run_config
from evo2_megatron.checkpoint.tensors import WholeTensors
from evo2_megatron.config import UserError, uses_fp8
from evo2_megatron.data import tokenizer
from evo2_megatron.data.nucleotides import reverse_complement
from evo2_megatron.runtime import distributed
from evo2_megatron.tasks.reference_forward import reference_logits
from evo2_megatron.tasks.scoring.prediction_runner import Runner
from evo2_megatron.tasks.scoring.prediction_settings import Output

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

logger = logging.getLogger(__name__)

DEFAULT_BYTES = 2e9
"""Weights up to this size are scored unless the user says otherwise: it takes up to a minute."""

TOLERANCES = {
    "float32": 1e-3,
    "float16": 1e-2,
    "bfloat16": 3e-2,
    "fp8_emulation": 3e-2,
    "int8": 5e-2,
    "int4": 5e-1,
    "fp8": 1e-1,
}
"""By how much a window's mean log-likelihood may differ from the stored one, in nat per base. It averages over 511
bases, over which rounding cancels: on random models of 4 to 25 layers, a third of these at most was measured in the
first five (docs/precision.md)."""

_VERSION = 1
_SEED = 20250219
_LENGTH = 512
_LAMBDA_PHAGE = (  # NC_001416.1, bases 1 to 512
    "GGGCGGCGACCTCGCGGGTTTTCGCTATTTATGAAAATTTTCCGGTTTAAGGCGTTTCCGTTCTTCTTCGTCATAACTTAATGTTTTTATTTAAAATACCCTC"
    "TGAAAAGAAAGGAAACGACAGGTGCTGAAAGCGAGGCTTTTTGGCCTCTGTCGTTTCCTTTCTCTGTTTTTGTCCGTGGAATGAACAATGGAAGTCAACAAAA"
    "AGCAGCTGGCTGACATTTTCGGTGCGAGTATCCGTACCATTCAGAACTGGCAGGAACAGGGAATGCCCGTTCTGCGAGGCGGTGGCAAGGGTAATGAGGTGCT"
    "TTATGACTCTGCCGCCGTCATAAAATGGTATGCCGAAAGGGATGCTGAAATTGAGAACGAAAAGCTGCGCCGGGAGGTTGAAGAACTGCGGCAGGCCAGCGAG"
    "GCAGATCTCCAGCCAGGAACTATTGAGTACGAACGCCATCGACTTACGCGTGCGCAGGCCGACGCACAGGAACTGAAGAATGCCAGAGACTCCGCTGAAG"
)

Arithmetic = Literal["plain", "fp8_emulated"]
"""Which of the two sets of numbers: nothing rounded, or the input projections to 8 bits."""


class Row(NamedTuple):
    """One window; log-likelihoods are means in nat per scored base."""

    name: str
    stored: float
    measured: float

    @property
    def difference(self) -> float:
        return self.measured - self.stored


def windows() -> dict[str, str]:
    """Made-up DNA, always the same, and the start of a real genome on both strands."""
    generator = torch.Generator().manual_seed(_SEED)
    letters = torch.randint(4, (2, _LENGTH), generator=generator).tolist()
    made_up = {f"made up {i + 1}": "".join("ACGT"[letter] for letter in row) for i, row in enumerate(letters)}
    return made_up | {"phage lambda +": _LAMBDA_PHAGE, "phage lambda -": reverse_complement(_LAMBDA_PHAGE)}


def wants_numbers(asked: bool | None, num_bytes: int) -> bool:
    """Whether to score at conversion: as the user said, else if the weights are small; says so if not."""
    if asked is None and num_bytes > DEFAULT_BYTES:
        logger.info(
            "No numbers for --self-test are stored: scoring a model of %.1f GB takes minutes; --self-test does it",
            num_bytes / 1e9,
        )
        return False
    return asked is not False


def store(checkpoint: Path, architecture: Architecture) -> None:
    """Score the windows with the weights of a folder that is being written, and keep the result in it.

    One layer is in memory at a time.

    Args:
        checkpoint: Holds weights and ``run_config.yaml``.
        architecture: Describes the model.

    Raises:
        UserError: Too little memory for a layer; or the weights compute NaN or infinity.
    """
    index = distcp.read_index(checkpoint)
    kept = {name: name for name in distcp.tensor_entries(index) if names.is_weight(name)}
    weights = WholeTensors(distcp.stored_tensors(checkpoint, index, kept))
    _check_memory(architecture, distcp.tensor_entries(index)[names.EMBEDDING].size[0])
    named = windows()
    tokens_BL = torch.tensor([tokenizer.encode(sequence) for sequence in named.values()])
    scales = read_run_config(checkpoint).fp8_scales
    scores: dict[Arithmetic, list[float]] = {}
    for arithmetic, of_layers in (("plain", None), ("fp8_emulated", scales)):
        # wide models: one window at a time, for the memory of its Fourier transforms
        batches = tokens_BL.split(1 if architecture.hidden_size > 2048 else len(named))
        logits = reference_logits(weights, architecture, batches, names="megatron", fp8_scales=of_layers)
        scores[arithmetic] = [_log_likelihood(*pair) for pair in zip(torch.cat(logits), tokens_BL)]
        if not all(map(math.isfinite, scores[arithmetic])):
            raise UserError(
                "the self-test computes NaN or infinity, so the weights hold such values or are damaged; copy or "
                "download their source again; nothing was written"
            )
    content = {
        "version": _VERSION,
        "unit": "nat, sum over all bases but the first",
        "windows": [
            {
                "name": name,
                "sequence": sequence,
                "sha256": _sha256(sequence),
                "log_likelihood": {arithmetic: of_all[i] for arithmetic, of_all in scores.items()},
            }
            for i, (name, sequence) in enumerate(named.items())
        ],
    }
    (checkpoint / SELF_TEST).write_text(json.dumps(content, indent=2) + "\n")
    mean = -sum(scores["plain"]) / len(named) / (_LENGTH - 1)
    logger.info("%s: %d windows, loss %.4f nat per base", SELF_TEST, len(named), mean)


def run(ckpt_dir: Path, **settings: Any) -> list[Row]:
    """Load a checkpoint and ``check`` it; every process of the job calls this.

    Args:
        ckpt_dir: A checkpoint, or a folder of them.
        settings: As for ``checkpoint.load.load_model``.
    """
    settings["parallel"].check_world_size(distributed.world_size())
    checkpoint = resolve_checkpoint_path(ckpt_dir)
    check_files(checkpoint, settings.get("base_ckpt_dir"))
    with distributed.process_groups(settings["parallel"]):
        return check(load_model(checkpoint, **settings))


def load_model_checked(checkpoint: Path, *, with_self_test: bool, **settings: Any) -> LoadedModel:
    """``checkpoint.load.load_model``, and where it is asked for ``check_files`` before it and ``check`` after it."""
    if with_self_test:
        check_files(checkpoint, settings.get("base_ckpt_dir"))
    loaded = load_model(checkpoint, **settings)
    if with_self_test:
        check(loaded)
    return loaded


def check_files(checkpoint: Path, base_ckpt_dir: Path | None) -> None:
    """Read the weights, and those of the base of LoRA adapters, and compare with what was written if that is known.

    Args:
        checkpoint: One iteration.
        base_ckpt_dir: As for ``checkpoint.load.load_model``.

    Raises:
        UserError: A file is missing, or another one.
    """
    if distributed.rank() > 0:
        return
    base = base_checkpoint(checkpoint, read_run_config(checkpoint), base_ckpt_dir)
    for folder in dict.fromkeys((checkpoint, base)):
        if checksums.verify(folder):
            logger.info("self-test: the weights in %s are those that were written, by its %s", folder, CHECKSUMS)


def check(loaded: LoadedModel) -> list[Row]:
    """Score the stored windows with a loaded model and compare; all processes of its layout call this alike.

    Every difference is logged. A model that runs without the FP8 projections that it asks for is compared with what
    its weights give without them, and what that costs is logged.

    Raises:
        UserError: The checkpoint has no numbers, or not for this model; or a difference is over ``TOLERANCES``.
    """
    stored = _read(loaded.checkpoint)
    _check_whole(loaded)
    arithmetic: Arithmetic = (
        "fp8_emulated" if loaded.fp8_projections in ("hardware", "emulated", "recipe") else "plain"
    )
    measured = _measure(loaded.model, loaded.precision, [window["sequence"] for window in stored])
    rows = [
        Row(
            window["name"], *(x / (len(window["sequence"]) - 1) for x in (window["log_likelihood"][arithmetic], score))
        )
        for window, score in zip(stored, measured)
    ]
    kind = _kind(loaded)
    for row in rows:
        logger.info(
            "self-test: %s: %.6f nat per base, stored %.6f, difference %+.2g of %g allowed in %s",
            row.name, row.measured, row.stored, row.difference, TOLERANCES[kind], kind,
        )  # fmt: skip
    if loaded.fp8_projections == "mismatch":
        plain, rounded = (sum(w["log_likelihood"][a] for w in stored) for a in ("plain", "fp8_emulated"))
        num_bases = sum(len(window["sequence"]) - 1 for window in stored)
        logger.warning("self-test: without FP8 projections, %+.4f nat per base", (plain - rounded) / num_bases)
    worst = max(rows, key=lambda row: abs(row.difference) if math.isfinite(row.difference) else math.inf)
    if not abs(worst.difference) <= TOLERANCES[kind]:
        raise UserError(
            f"self-test failed: {worst.name} has {worst.measured:.6f} nat per base and had {worst.stored:.6f} when "
            f"{loaded.checkpoint} was written, more than the {TOLERANCES[kind]:g} that {kind} explains; its weights "
            "are damaged, or this machine computes something else: copy or convert it again, and try "
            "--mixed-precision-recipe fp32"
        )
    logger.info("self-test passed")
    return rows


def _kind(loaded: LoadedModel) -> str:
    if loaded.fp8_projections in ("hardware", "recipe") or uses_fp8(loaded.precision):
        return "fp8"
    if loaded.fp8_projections == "emulated":
        return "fp8_emulation"
    if loaded.provider.quantize_weights != "none":
        return loaded.provider.quantize_weights
    return str(loaded.provider.params_dtype).removeprefix("torch.")


def _check_whole(loaded: LoadedModel) -> None:
    model, provider = loaded.run_config.model, loaded.provider
    changed = {
        "--num-layers": provider.num_layers != loaded.run_config.num_layers,
        "--seq-len-interpolation-factor": provider.seq_len_interpolation_factor
        != model.get("seq_len_interpolation_factor", provider.seq_len_interpolation_factor),
    }
    for flag, is_changed in changed.items():
        if is_changed:
            raise UserError(
                f"--self-test needs the model as it was written, with all layers; leave out {flag} and the like"
            )


def _measure(model: MegatronModule, precision: str, sequences: list[str]) -> list[float]:
    runner = Runner(model, Output(log_probs="sum"), precision=precision)
    scores = []
    for sequence in sequences:
        tokens = torch.tensor(tokenizer.encode(sequence))
        result = runner([{"tokens": tokens, "loss_mask": torch.ones_like(tokens), "seq_idx": torch.tensor(0)}])
        scores.append(None if result is None else result["log_likelihood"].item())
    of_each: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(of_each, scores)
    # pipeline stages but the last have none, and copies of the model have the same
    return next(of_one for of_one in of_each if None not in of_one)


def _log_likelihood(logits_LV: Tensor, tokens_L: Tensor) -> float:
    log_probs_LV = logits_LV[:-1].double().log_softmax(-1)
    return log_probs_LV.gather(1, tokens_L[1:, None]).sum().item()


def _read(checkpoint: Path) -> list[dict[str, Any]]:
    path = checkpoint / SELF_TEST
    if not path.is_file():
        raise UserError(
            f"{checkpoint} has no {SELF_TEST} to compare with; convert or merge it again with --self-test, or leave "
            "--self-test out"
        )
    try:
        content = json.loads(path.read_text())
        windows = [
            {
                "name": str(window["name"]),
                "sequence": window["sequence"],
                "log_likelihood": {name: float(window["log_likelihood"][name]) for name in ("plain", "fp8_emulated")},
            }
            for window in content["windows"]
            if _sha256(window["sequence"]) == window["sha256"] and len(window["sequence"]) > 1
        ]
        is_whole = content["version"] == _VERSION and len(windows) == len(content["windows"]) > 0
    except (ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{path} is damaged, or of another version; copy it again, or convert again with --self-test")
    return windows


def _check_memory(architecture: Architecture, rows: int) -> None:
    parts: dict[str, int] = defaultdict(int)
    for name, shape in names.parameter_shapes(architecture, vocab_size=rows).items():
        layer = re.match(r"decoder\.layers\.\d+\.", name)
        parts[layer[0] if layer else name] += math.prod(shape)
    # as stored and in float32, and a few times the complex numbers of three streams
    needed = 8 * max(parts.values()) + 4 * 16 * 3 * 2 * _LENGTH * architecture.hidden_size
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--self-test needs {needed / 1e9:.1f} GB of memory for a layer, and {free / 1e9:.1f} GB are free; use a "
            "larger machine, or --no-self-test"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
