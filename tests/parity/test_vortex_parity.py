# SPDX-License-Identifier: Apache-2.0
"""The same weights give the same float32 logits in Arc's Vortex and here: whole sequences, prompts, single steps.

Errors are in units of the logits' standard deviation. Measured: 1.6e-5 with four layers, more than half of it the form
of the RMSNorm (see ``vortex_model``) and the rest float32 rounding; 3.9e-5 with eight. Scaling any one tensor of the
weights by 1.01 gives 4e-3 or more.
"""

from dataclasses import replace

import pytest
import torch

from evo2_megatron.architectures import architecture
from evo2_megatron.checkpoint.names import is_weight, parameter_shapes
from parity.our_model import our_model
from parity.vortex_model import Vortex, random_weights

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the oracle is Vortex on a CPU")

TOLERANCE = 1e-4
NUM_STEPS = 5
_TINY = architecture("evo2_tiny")
_MODELS = {
    "tiny": _TINY,
    "heads_of_128": replace(_TINY, pattern="SDH*SDH*", num_heads=1, num_groups=16, rotary_base=1_000_000),
    "long_context_any_order": replace(
        _TINY, pattern="HD*S*H", position_scale=8.0, attention_output_bias=False, tied_embeddings=False
    ),
}


@pytest.fixture(scope="module", params=_MODELS)
def pair(request, one_process):
    """Ours and Vortex."""
    weights = random_weights(_MODELS[request.param])
    return our_model(_MODELS[request.param], weights), Vortex(_MODELS[request.param], weights)


def tokens(length):
    return torch.randint(0, 512, (2, length), generator=torch.Generator().manual_seed(length))


def error(got, want):
    return ((got - want).abs().max() / want.std()).item()


@torch.inference_mode()
def decode(model, tokens_BL, num_prompt):
    """Logits of the prompt, and of each later token fed one at a time."""
    state = model.new_inference_state(*tokens_BL.shape)
    prompt = model(tokens_BL[:, :num_prompt], inference_context=state)
    steps = [model(token_B1, inference_context=state) for token_B1 in tokens_BL[:, num_prompt:].split(1, dim=1)]
    return prompt, torch.cat(steps, dim=1)


def vortex_decode(vortex, tokens_BL, num_prompt):
    prompt = vortex.prefill(tokens_BL[:, :num_prompt], max_tokens=tokens_BL.shape[1])
    return prompt, torch.stack([vortex.step(token_B) for token_B in tokens_BL[:, num_prompt:].unbind(1)], dim=1)


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 2, 7, 127, 128, 129, 300])
def test_whole_sequence(pair, length):
    ours, vortex = pair
    x_BL = tokens(length)
    assert error(ours(x_BL), vortex.score(x_BL)) < TOLERANCE


@pytest.mark.parametrize("length", [7, 127, 128, 129, 300])
def test_prompt_and_steps(pair, length):
    ours, vortex = pair
    x_BL = tokens(length + NUM_STEPS)
    (our_prompt, our_steps), (prompt, steps) = decode(ours, x_BL, length), vortex_decode(vortex, x_BL, length)
    assert error(our_prompt, prompt) < TOLERANCE
    assert error(our_steps, steps) < TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 2, 5])
def test_short_prompt(pair, length):
    """Vortex meets a prompt shorter than a filter's history with the wrong end of the filter; ours and its own
    uncached forward agree."""
    ours, vortex = pair
    x_BL = tokens(length + NUM_STEPS)
    whole = vortex.score(x_BL)
    our_prompt, our_steps = decode(ours, x_BL, length)
    assert error(our_prompt, whole[:, :length]) < TOLERANCE
    assert error(our_steps, whole[:, length:]) < TOLERANCE
    _, steps = vortex_decode(vortex, x_BL, length)
    assert error(steps, whole[:, length:]) > 0.1


@pytest.mark.parametrize("key", ["evo2_tiny", "striped_hyena_tiny_nv"])
def test_name_table_is_the_state_dict(one_process, key):
    model = our_model(architecture(key), random_weights(architecture(key)))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if is_weight(name)}
    assert shapes == parameter_shapes(architecture(key), vocab_size=512)
