# SPDX-License-Identifier: Apache-2.0
"""One process of a layout test: loss and gradients of the tiny model, gathered to full tensors, saved by rank 0.

Run by test_layouts.py under torchrun: ``layout_worker.py TENSOR OUTPUT``.
"""

import sys

import torch

from evo2_megatron.config import ParallelConfig
from evo2_megatron.runtime.distributed import process_groups, rank
from evo2_megatron.runtime.megatron import enter


def full_gradient(parameter):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    group = parallel_state.get_tensor_model_parallel_group()
    gradient = parameter.grad
    if getattr(parameter, "sequence_parallel", False):
        # each process saw its share of the tokens; training sums these in finalize_model_grads
        torch.distributed.all_reduce(gradient, group=group)
    if not getattr(parameter, "tensor_model_parallel", False):
        return gradient
    axis = parameter.partition_dim
    whole = gather_from_tensor_model_parallel_region(gradient.transpose(axis, -1), group=group).transpose(axis, -1)
    if parameter.partition_stride == 2:  # gate and up rows of each process, one after the other
        whole = whole.unflatten(0, (group.size(), 2, -1)).transpose(0, 1).flatten(0, 2)
    return whole


def build(tensor: int, *, sequence_parallel: bool):
    from evo2_megatron.model.provider import provider_for

    provider = provider_for(
        "striped_hyena_tiny_nv",
        vocab_size=512,
        params_dtype=torch.float32,
        bf16=False,
        tensor_model_parallel_size=tensor,
        sequence_parallel=sequence_parallel,
    )
    provider.finalize()
    torch.manual_seed(7)
    return provider.provide()


def main(tensor: int, output: str) -> None:
    enter()
    with process_groups(ParallelConfig(tensor=tensor), seed=1):
        model = build(tensor, sequence_parallel=tensor > 1).train()
        torch.manual_seed(8)
        ids = torch.randint(65, 90, (2, 130))
        loss = model(ids, labels=ids)
        loss.sum().backward()
        gradients = {name: full_gradient(parameter) for name, parameter in model.named_parameters()}

        model = build(tensor, sequence_parallel=False).eval()
        with torch.inference_mode():
            state = model.new_inference_state(2, 130)
            decoded = [model(part, inference_context=state) for part in ids.split([3, 120, 1, 6], dim=1)]
        if rank() == 0:
            torch.save({"loss": loss.detach(), "gradients": gradients, "decoded": torch.cat(decoded, dim=1)}, output)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
