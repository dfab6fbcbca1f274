# SPDX-License-Identifier: Apache-2.0
"""Four processes of a layout test: one step's loss and gradients under several layouts, one after the other.

Run by test_layouts.py: ``layout_worker.py CHECKPOINT FOLDER LAYOUT...``. Rank 0 saves, in a file for each layout,
``losses`` by sequence and context-parallel rank, ``logits`` of the first sequence, ``gradients`` as full tensors by
global name, and where the layout can generate ``decoded``, cached logits, and ``generated``, of each process.
"""

import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch

from evo2_megatron.config import ParallelConfig
from evo2_megatron.runtime.distributed import process_groups, rank
from processes import fork

LAYOUTS = {
    "one": ParallelConfig(),  # with several processes: data parallel
    "tensor 2": ParallelConfig(tensor=2, sequence_parallel=False),
    "tensor 2, sequence": ParallelConfig(tensor=2),
    "context 2": ParallelConfig(context=2),
    "context 4": ParallelConfig(context=4),
    "pipeline 2": ParallelConfig(pipeline=2),
    "pipeline 4": ParallelConfig(pipeline=4),
    "tensor 2 x context 2": ParallelConfig(tensor=2, context=2),
    "tensor 2 x pipeline 2": ParallelConfig(tensor=2, pipeline=2),
    "context 2 x pipeline 2": ParallelConfig(context=2, pipeline=2),
}
LOADS = (
    "megatron.bridge.training.config",
    "megatron.bridge.training.losses",
    "evo2_megatron.checkpoint.load",
    "evo2_megatron.model.provider",
    "evo2_megatron.tasks.generation.generate",
)
PATTERN = "SDH*SH"  # six layers: four stages are unequal
NUM_SEQUENCES, LENGTH = 4, 1040


def tokens():
    """Soft-masked unevenly, so that every way to normalise the loss over a part only shows."""
    generator = torch.Generator().manual_seed(3)
    ids_BL = torch.tensor(list(b"ACGT"))[torch.randint(4, (NUM_SEQUENCES, LENGTH + 1), generator=generator)]
    for row, (start, stop) in enumerate([(0, 700), (900, 1000), (0, 0), (100, 1040)]):
        ids_BL[row, start:stop] += 32
    mask_BL = torch.ones(NUM_SEQUENCES, LENGTH)
    mask_BL[1, :333] = 0
    return ids_BL[:, :-1], ids_BL[:, 1:], mask_BL


def build(checkpoint, layout, adapt=lambda stage: None, **fields):
    """This process's part of the model, after ``adapt``, behind Megatron's own data parallelism."""
    from megatron.bridge.training.config import DistributedDataParallelConfig
    from megatron.core.distributed import finalize_model_grads

    from evo2_megatron.checkpoint import load
    from evo2_megatron.checkpoint.load_weights import load_weights
    from evo2_megatron.checkpoint.run_config import read_run_config

    provider = read_run_config(checkpoint).provider(
        params_dtype=torch.float32,
        bf16=False,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=2,
        vocab_size=512,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.splits_activations,
        **fields,
    )
    provider.finalize()
    stored = load.stored_shapes(checkpoint)

    def fill(stages):
        load_weights(stages[0], checkpoint, stored, dropped_layers=())
        adapt(stages[0])
        return stages

    (model,) = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(use_distributed_optimizer=False, average_in_collective=False),
        wrap_with_ddp=True,
        use_cpu_initialization=True,
        pre_wrap_hook=fill,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    return model


def train_step(model):
    """Losses of this process's tokens, and full gradients after everything that a step of training reduces."""
    from megatron.bridge.training.losses import create_masked_next_token_loss_function
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_batch_on_this_cp_rank

    copy, num_copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = range(copy, NUM_SEQUENCES, num_copies)
    losses = {}

    def step(iterator, model):
        row = next(iterator)
        batch = dict(zip(("tokens", "labels", "mask"), (x[row : row + 1] for x in tokens())))
        batch = get_batch_on_this_cp_rank(batch, cp_group=parallel_state.get_context_parallel_group())
        output = model(batch["tokens"], labels=batch["labels"], loss_mask=batch["mask"])
        losses[row] = output.detach()
        return output, create_masked_next_token_loss_function(batch["mask"], False, False)

    model.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(mine),
        model=[model],
        num_microbatches=len(mine),
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    return losses


def whole(parameter, *, in_halves=False):
    """Gradient of the full tensor; ``in_halves``: each process has gate and up rows, one after the other."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    gradient, group = parameter.main_grad, parallel_state.get_tensor_model_parallel_group()
    if not getattr(parameter, "tensor_model_parallel", False):
        return gradient
    axis = parameter.partition_dim
    full = gather_from_tensor_model_parallel_region(gradient.transpose(axis, -1), group=group).transpose(axis, -1)
    if in_halves or parameter.partition_stride == 2:
        full = full.unflatten(0, (group.size(), 2, -1)).transpose(0, 1).flatten(0, 2)
    return full


def global_name(name, model):
    """With the layer's number in the whole stack instead of in its stage."""
    prefix, _, rest = name.partition("decoder.layers.")
    if not rest:
        return name
    local, _, rest = rest.partition(".")
    return f"{prefix}decoder.layers.{model.decoder.layers[int(local)].layer_number - 1}.{rest}"


def logits_of_the_first(model, layout):
    """Logits [L, V] of the first sequence; None on processes that do not have them."""
    from megatron.core import parallel_state

    from evo2_megatron.model.pipeline import forward_through_stages
    from evo2_megatron.ops.zigzag import zigzag_split, zigzag_unsplit

    model.eval()
    ids_BL, group = tokens()[0][:1], parallel_state.get_context_parallel_group()
    if group.size() > 1:
        ids_BL = zigzag_split(ids_BL, 1, num_ranks=group.size(), rank=group.rank())
    with torch.no_grad():
        logits_BLV = forward_through_stages(model, ids_BL, runtime_gather_output=True)
    if logits_BLV is None or group.size() == 1:
        return logits_BLV
    parts = [torch.empty_like(logits_BLV) for _ in range(group.size())]
    torch.distributed.all_gather(parts, logits_BLV, group=group)
    return zigzag_unsplit(parts, 1)


def decoded(model):
    """Logits of the first 130 tokens from caches, in pieces."""
    from evo2_megatron.tasks.forward import forward_last

    state = model.new_inference_state(1, 130, last_token_logits_only=True)
    with torch.inference_mode():
        return [forward_last(model, part, state) for part in tokens()[0][:1, :130].split([3, 120, 1, 6], dim=1)]


def generated(model):
    """Token ids drawn where each process has random numbers of its own: those of the first count."""
    from megatron.core import parallel_state

    from evo2_megatron.tasks.generation import decoding, guided, session
    from evo2_megatron.tasks.generation.generate import GenerationSettings

    place = parallel_state.get_model_parallel_group().rank()
    settings = GenerationSettings(max_new_tokens=12, alphabet="ACGT", stop_at_eod=False)
    prompt = [65, 67, 71, 84, 71, 84, 84, 65, 71]
    uniforms = decoding.uniforms
    with contextlib.ExitStack() as patched:
        for module in (decoding, guided, session):
            of_own = mock.patch.object(module, "uniforms", lambda seed, *places: uniforms(seed + place, *places))
            patched.enter_context(of_own)
        batch = decoding.Decoding.alike(model, settings, [prompt], seeds=[5]).run().generations
        how = guided.SearchSettings(beams=1, samples=1, chunk=5)
        search = guided.Search(model, settings, how, lambda texts: [0.0] * len(texts), seed=5).run(prompt)
        grown = session.Session(model, settings, max_tokens=40, seed=5)
        grown.feed(bytes(prompt).decode())
        each = [*batch, *(found.generation for found in search), grown.generate()]
    of_each = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_each, [generation.token_ids for generation in each])
    return of_each


def merged(value):
    """Union of the dictionaries of all processes; equal keys hold equal values."""
    of_each = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_each, value)
    return {key: value for of_one in of_each for key, value in of_one.items()}


def run(checkpoint, layout):
    """Everything that is compared, on every process."""
    from megatron.core import parallel_state
    from megatron.core.utils import unwrap_model

    with process_groups(layout, seed=1):
        model = build(checkpoint, layout)
        inner, context = unwrap_model(model), parallel_state.get_context_parallel_rank()
        losses = train_step(model)
        if not parallel_state.is_pipeline_last_stage():
            losses = {}
        # clones: the gradients lie in one buffer, all of which would be pickled with each
        result = {
            "losses": merged({(row, context): loss for row, loss in losses.items()}),
            "gradients": merged({global_name(n, inner): whole(p).clone() for n, p in inner.named_parameters()}),
        }
        logits_BLV = logits_of_the_first(model, layout)
        result["logits"] = merged({} if logits_BLV is None else {"logits": logits_BLV})["logits"]
        if layout.context == 1 and not layout.splits_activations:
            result["decoded"] = torch.stack(decoded(inner))
            result["generated"] = generated(inner)
        return result


def main(checkpoint, layout, output):
    result = run(checkpoint, layout)
    if rank() == 0:
        torch.save(result, output)


if __name__ == "__main__":
    checkpoint, folder, *names = sys.argv[1:]
    for name in names:
        fork(4, main, Path(checkpoint), LAYOUTS[name], Path(folder) / f"{name}.pt", loads=LOADS)
