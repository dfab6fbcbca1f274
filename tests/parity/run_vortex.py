# SPDX-License-Identifier: Apache-2.0
"""Run Arc's Vortex (`vtx` on PyPI) on a CPU in float32; knows nothing of this project.

As a program it is for an environment of Vortex's own: it builds the model from a YAML file, loads a file of weights
the way Vortex does, and writes logits and greedy continuations. What stands in for what Vortex takes for granted on a
GPU; its mathematics is untouched:

* `vortex.logging` (opens a file in the working folder and takes over the root logger) is an ordinary silent logger.
* `vortex.ops` (imports compiled flash-attn at once) is an empty package. Vortex then takes its own path without
  kernels: `F.scaled_dot_product_attention` for a whole sequence, its `CrossAttention` when there is a cache.
* `vortex.ops.embedding.rotary.apply_rotary` (a Triton kernel) is the same rotation, in place, in torch.
* `torch.cuda.device(...)`, a guard that refuses a CPU, does nothing while Vortex runs.
* Weights stay float32 where Vortex would round them to bfloat16 after loading.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor


def _apply_rotary(x, cos, sin, seqlen_offsets=0, interleaved=False, inplace=False, **unused) -> Tensor:
    """Rotate x [B, L, heads, C] by cos and sin [positions, C/2], as Vortex's kernel does for CPU-able arguments."""
    assert inplace and not interleaved and not any(unused.values())
    positions = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
    cos, sin = cos[positions, None], sin[positions, None]
    first, second = x.chunk(2, dim=-1)
    rotated = first * cos - second * sin
    second.copy_(first * sin + second * cos)
    first.copy_(rotated)
    return x


def import_vortex() -> tuple[type, type]:
    """Vortex's model class and its configuration class."""
    if "vortex.ops" not in sys.modules:
        log, ops, rotary = (ModuleType(f"vortex.{name}") for name in ("logging", "ops", "ops.embedding.rotary"))
        log.activations_logger = logging.getLogger("vortex.activations")
        log.enable_activations_logging = None  # would be called for print_activations, which is off
        ops.__path__ = []
        rotary.apply_rotary = _apply_rotary
        for module in (log, ops, rotary):
            sys.modules[module.__name__] = module
    from vortex.model.model import StripedHyena
    from vortex.model.utils import dotdict

    return StripedHyena, dotdict


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Let Vortex run, quietly, on a machine without a GPU."""
    with (
        warnings.catch_warnings(),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        # about torch.autocast("cuda") around its medium convolution, and the imaginary part of its modal state
        warnings.simplefilter("ignore", UserWarning)
        yield


def build(config: dict) -> torch.nn.Module:
    """Vortex's model with random weights, all of it in float32."""
    model_class, config_class = import_vortex()
    dtypes = ("params_dtype", "attn_block_dtype", "hyena_block_dtype", "mlp_dtype")
    with without_gpu():
        # its input projection is made in bfloat16 whatever the configuration says
        return model_class(config_class(config | dict.fromkeys(dtypes, torch.float32))).float().eval()


def load(weights: Path, config: dict) -> torch.nn.Module:
    """The model, with the weights of a file loaded by Vortex."""
    from vortex.model.utils import load_checkpoint

    model = build(config)
    stored = torch.load(weights, weights_only=True, mmap=True)
    # Vortex only prints which ones it does without
    missing = {name for name in model.state_dict() if "_extra_state" not in name} - stored.keys()
    assert not missing, missing

    def stay_float32(self, to_float32: bool = False) -> None:
        self.float()

    with without_gpu(), mock.patch.object(type(model), "to_bfloat16_except_pr_lc", stay_float32):
        load_checkpoint(model, str(weights))
    return model


def main() -> None:
    """Read two lists of token tensors [B, L]; write logits of the first, greedy continuations of the second."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--weights", "--config", "--tokens", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="tokens after each prompt")
    args = parser.parse_args()
    import_vortex()
    import vortex
    import yaml
    from vortex.model.generation import Generator
    from vortex.model.tokenizer import CharLevelTokenizer

    model = load(args.weights, yaml.safe_load(args.config.read_text()))
    sequences, prompts = torch.load(args.tokens, weights_only=True)
    greedy = Generator(model, CharLevelTokenizer(512), top_k=1, top_p=1.0, temperature=1.0)
    generated = []
    with torch.inference_mode(), without_gpu():
        logits = [model(tokens_BL)[0] for tokens_BL in sequences]
        for tokens_BL in prompts:
            tokens, _, _ = greedy.generate(
                device="cpu",
                input_ids=tokens_BL,
                num_tokens=args.generate,
                print_generation=False,
                stop_at_eos=False,
            )
            generated.append(tokens)
    torch.save({"logits": logits, "generated": generated, "vortex": str(Path(vortex.__file__).parent)}, args.output)


if __name__ == "__main__":
    main()
