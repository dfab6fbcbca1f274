# SPDX-License-Identifier: Apache-2.0
"""Models with weights in 8 or 4 bits: which they are, how they are loaded, and that all ways through them agree."""

import pytest
import torch

from checkpoint.tiny_adapters import write_tiny_adapters
from checkpoint.tiny_checkpoint import write_tiny_checkpoint
from evo2_megatron.config import ParallelConfig, UserError
from evo2_megatron.ops.int4 import _wide_blocks, group_size, quantize_groups
from evo2_megatron.ops.int8 import quantize_rows
from helpers import tiny_model
from tasks.planning.allocations import largest

ONE = ParallelConfig()
INT8, INT4 = {"quantize_weights": "int8"}, {"quantize_weights": "int4"}
BOTH = pytest.mark.parametrize("weights_in", [INT8, INT4], ids=["int8", "int4"])


@pytest.fixture(scope="module")
def checkpoint(megatron, tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def deep(megatron, tmp_path_factory):
    """Of twelve layers."""
    pattern = {"num_layers": 12, "hybrid_override_pattern": "SDH" * 4}
    return write_tiny_checkpoint(tmp_path_factory.mktemp("deep"), **pattern)


@pytest.fixture(
    scope="module",
    params=[{}, {"skip_freeze_modules": ["linear_fc2"], "target_modules": ["dense", "linear_qkv"]}],
    ids=["adapters alone", "a layer trained whole"],
)
def adapters(checkpoint, tmp_path_factory, request):
    return write_tiny_adapters(tmp_path_factory.mktemp("adapters"), checkpoint, **request.param)


@pytest.fixture
def groups(megatron):
    from evo2_megatron.runtime.distributed import process_groups

    with process_groups(ONE):
        yield


@pytest.fixture
def load(groups):
    from evo2_megatron.checkpoint.load import load_model

    def loaded(checkpoint, *, precision="fp32", fp8="as_asked", base_ckpt_dir=None, **overrides):
        return load_model(
            checkpoint,
            parallel=ONE,
            precision=precision,
            provider_overrides=overrides,
            fp8=fp8,
            base_ckpt_dir=base_ckpt_dir,
        ).model

    return loaded


def tokens(length=150, seed=0):
    letters = torch.randint(4, (2, length), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(list(b"ACGT"))[letters]


def logits(model, token_BL):
    with torch.no_grad():
        return model(token_BL).float()


def distance(a, b):
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


def round_weights(model, weights_in):
    """The wide model whose weights are what 8 or 4 bits keep of them."""
    with torch.no_grad():
        for name, weight_DH in model.named_parameters():
            if _is_matrix(name, weight_DH) and "adapter" not in name:
                weight_DH.copy_(_rounded(weight_DH, weights_in["quantize_weights"]))
    return model


def _rounded(weight_DH, name):
    if name == "int8":
        q_DH, scale_D = quantize_rows(weight_DH)
        return q_DH * scale_D.float()[:, None]
    weights = quantize_groups(weight_DH, group_size(weight_DH.shape[1]))
    return torch.cat([wide_HD.mT for _, wide_HD in _wide_blocks(weights, torch.float32)])


def _num_narrow(model):
    return sum(path.endswith(".matrix") for path, _ in model.named_modules())


def _is_matrix(name, parameter):
    return len(parameter.shape) == 2 and ".layers." in name and "filter" not in name and "conv" not in name


@BOTH
def test_every_matrix_of_a_layer_is_narrow_and_nothing_else(groups, weights_in):
    narrow, plain = tiny_model(**weights_in), tiny_model()
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    assert {name: parameter.shape for name, parameter in narrow.named_parameters()} == shapes
    for name, parameter in narrow.named_parameters():
        # one number holds the place of a matrix
        assert (parameter.untyped_storage().nbytes() == 1) == _is_matrix(name, parameter), name
    assert _num_narrow(narrow) == 4 * 4


@BOTH
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_logits_are_those_of_the_rounded_weights(load, checkpoint, precision, weights_in):
    plain, token_BL = load(checkpoint), tokens()
    unrounded = logits(plain, token_BL)
    if precision == "bf16_mixed":  # what is rounded to few bits has been rounded to 16 before
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.copy_(parameter.bfloat16())
    want = logits(round_weights(plain, weights_in), token_BL)
    got = logits(load(checkpoint, precision=precision, **weights_in), token_BL)
    # inputs and outputs of products are in bfloat16; in bf16_mixed all else, too
    limit = 0.008 if precision == "fp32" else 0.02
    assert distance(got, want) < limit
    if precision == "fp32":
        assert limit < distance(unrounded, want)


@BOTH
def test_prompt_pieces_and_decoding_agree_with_the_whole(load, checkpoint, weights_in):
    from evo2_megatron.tasks.forward import forward_last, prefill

    model, token_BL = load(checkpoint, **weights_in), tokens(100)
    whole = logits(model, token_BL)
    with torch.inference_mode():
        state = model.new_inference_state(2, 100, last_token_logits_only=True)
        got = [prefill(model, token_BL[:, :90], state, chunk=13)]
        got += [forward_last(model, token_BL[:, i : i + 1], state) for i in range(90, 100)]
    # sums in another order, and what that makes of numbers between two of bfloat16
    assert distance(torch.stack(got, dim=1), whole[:, 89:]) < 0.008
    alone = logits(model, token_BL[:1])
    assert distance(alone, whole[:1]) < 0.008


@BOTH
def test_adapters_on_narrow_weights(load, checkpoint, adapters, weights_in):
    """Also where a layer was trained whole: its weights come from the adapters' checkpoint."""
    token_BL = tokens()
    plain, base = load(adapters), logits(load(checkpoint), token_BL)
    unrounded = logits(plain, token_BL)
    want = logits(round_weights(plain, weights_in), token_BL)
    got = logits(load(adapters, **weights_in), token_BL)
    assert distance(got, want) < 0.008 < distance(unrounded, want) < distance(base, want)


def test_fp8_projections_stay_as_they_are(load, checkpoint):
    from evo2_megatron.model.fp8_linear import E4M3ColumnLinear

    model = load(checkpoint, fp8="emulate", **INT8)
    projections = [module for module in model.modules() if isinstance(module, E4M3ColumnLinear)]
    assert len(projections) == 3 and all(module.weight.dtype == torch.float32 for module in projections)
    assert _num_narrow(model) == 4 * 4 - 3


def test_a_checkpoint_that_lacks_a_tensor_is_refused_alike(load, checkpoint):
    with pytest.raises(UserError, match="not those of the model"):
        load(checkpoint, add_bias_output=True, share_embeddings_and_output_weights=False, **INT8)


@BOTH
def test_gradients_of_adapters(load, checkpoint, adapters, weights_in):
    """They are those on the wide model whose weights are what is kept of them."""

    def gradients(model):
        # what is trained in 8 bits is no training, and is refused: see test_train_lora.py
        trained = {n: p.requires_grad_() for n, p in model.named_parameters() if "adapter" in n}
        token_BL = tokens()
        model(token_BL, labels=token_BL.roll(-1, 1), loss_mask=torch.ones(token_BL.shape)).sum().backward()
        return {name: parameter.grad for name, parameter in trained.items()}

    want, got = gradients(round_weights(load(adapters), weights_in)), gradients(load(adapters, **weights_in))
    assert got.keys() == want.keys() and len(got) > 4
    for name, gradient in got.items():
        assert distance(gradient, want[name]) < 0.03, name


@BOTH
def test_the_wide_model_never_exists(load, deep, weights_in):
    peaks = [largest(lambda overrides=overrides: load(deep, **overrides)) for overrides in ({}, weights_in)]
    narrow = load(deep, **weights_in)
    size = sum(tensor.untyped_storage().nbytes() for tensor in [*narrow.parameters(), *narrow.buffers()])
    # two layers wide at most
    assert peaks[1] < 0.5 * peaks[0] and peaks[1] < size + 2 * peaks[0] / 12, (peaks, size)


def test_groups_that_processes_would_divide_are_refused(load, checkpoint):
    message = "takes 64 or 32 channels together, and the FFN width 328 in 1 parts is no multiple of it; choose int8"
    with pytest.raises(UserError, match=message):
        load(checkpoint, ffn_hidden_size=328, **INT4)
    tiny_model(ffn_hidden_size=328, **INT8)
    with pytest.raises(UserError, match="quantize_weights is 'int3'; choose one of none, int8 and int4"):
        tiny_model(quantize_weights="int3")
    with pytest.raises(UserError, match="the FFN width 352 in 2 parts is no multiple of it"):
        tiny_model(tensor_model_parallel_size=2, **INT4)
