# SPDX-License-Identifier: Apache-2.0
"""What ``doctor`` starts in a process of its own: load and run the parts, and print a JSON line for each that works.

An import that fails, or one that ends the process, as a broken compiled library does, ends this process and not the
doctor. The stage whose line is missing is the one that failed, and the last line of stderr says why.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
import warnings
from typing import Any

from evo2_megatron.runtime import megatron

STAGES = ("torch", "bridge", "kernels", "model")
"""In this order: each needs those before it."""

KERNEL_PACKAGES = ("transformer_engine.pytorch", "subquadratic_ops_torch")
_NUM_TOKENS = 256


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "on_cuda": megatron.on_cuda(),
        "gpus": [
            {
                "name": torch.cuda.get_device_name(i),
                "capability": torch.cuda.get_device_capability(i),
                "memory": torch.cuda.get_device_properties(i).total_memory,
            }
            for i in range(torch.cuda.device_count())
        ],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "nccl": torch.distributed.is_nccl_available(),
        "gloo": torch.distributed.is_gloo_available(),
    }


def _bridge() -> dict[str, Any]:
    start = time.perf_counter()
    megatron.enter_training()
    importlib.import_module("megatron.bridge.training.pretrain")
    return {
        "seconds": time.perf_counter() - start,
        "dataset_index": importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None,
    }


def _kernels() -> dict[str, Any]:
    """Why each compiled package cannot be loaded; None if it can."""
    reasons: dict[str, str | None] = {}
    for name in KERNEL_PACKAGES:
        try:
            importlib.import_module(name)
            reasons[name] = None
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"reasons": reasons, "transformer_engine_used": megatron.have_transformer_engine()}


def _model() -> dict[str, Any]:
    """The smallest model with random weights beside the slow reference, on this machine's device."""
    import torch

    from evo2_megatron.architectures import ARCHITECTURES
    from evo2_megatron.config import ParallelConfig
    from evo2_megatron.model.provider import provider_for
    from evo2_megatron.runtime.distributed import process_groups
    from evo2_megatron.tasks.reference_forward import reference_logits

    with process_groups(ParallelConfig()):
        torch.manual_seed(0)
        provider = provider_for("evo2_tiny", vocab_size=512, params_dtype=torch.float32, bf16=False)
        provider.finalize()
        model = provider.provide().eval().to(megatron.device())
        tokens_BL = torch.randint(0, 512, (1, _NUM_TOKENS), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            logits = model(tokens_BL.to(megatron.device())).float().cpu()
        weights = {name: value.float().cpu() for name, value in model.state_dict().items() if torch.is_tensor(value)}
        expected = reference_logits(weights, ARCHITECTURES["evo2_tiny"], [tokens_BL], names="megatron")[0]
    return {
        "device": megatron.device().type,
        "tokens": _NUM_TOKENS,
        "difference": ((logits - expected).abs().max() / expected.std()).item(),
    }


def main() -> None:
    """Go through the stages."""
    warnings.simplefilter("ignore")
    for name, stage in zip(STAGES, (_torch, _bridge, _kernels, _model)):
        sys.stdout.write(json.dumps({"stage": name, **stage()}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
