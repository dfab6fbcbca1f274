# SPDX-License-Identifier: Apache-2.0
"""A small model with random weights as a checkpoint, for tests of whatever loads one."""

from __future__ import annotations

from pathlib import Path


def write_tiny_checkpoint(
    directory: Path,
    *,
    model_size: str = "evo2_tiny",
    seed: int = 1,
    recipe: str = "fp32",
    rows: int = 512,
    projection_factor: float = 1.0,
    **fields,
) -> Path:
    """Write ``iter_0000001`` into a folder and return it; starts and stops its own process group.

    Args:
        recipe: Precision that the checkpoint names; bf16_mixed stores 16-bit weights.
        rows: Embedding rows.
        projection_factor: What the input projections of Hyena layers are multiplied by.
        fields: Of StripedHyenaProvider, beside those of the model size; ``seq_length`` is 256 unless given.
    """
    import torch

    from evo2_megatron.checkpoint.write import whole_weights, write_checkpoint
    from evo2_megatron.config import ParallelConfig
    from evo2_megatron.data.tokenizer import tokenizer_dir
    from evo2_megatron.model.provider import provider_for
    from evo2_megatron.runtime.distributed import process_groups

    numbers = {} if recipe == "bf16_mixed" else {"params_dtype": torch.float32, "bf16": False}
    with process_groups(ParallelConfig(), seed=seed):
        provider = provider_for(model_size, **({"vocab_size": rows, "seq_length": 256} | numbers | fields))
        provider.finalize()
        model = provider.provide()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # at their initial values the logits of a random model hardly depend on the sequence
                if "norm" not in name and "filter" not in name:
                    parameter.mul_(3.0 * (projection_factor if "dense_projection.weight" in name else 1.0))
        return write_checkpoint(
            whole_weights(model), provider, directory, tokenizer=tokenizer_dir(min(rows, 512)), recipe=recipe
        )
