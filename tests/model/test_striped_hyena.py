# SPDX-License-Identifier: Apache-2.0
"""The model against a slow direct one, and against itself: caches, chunks, recomputation, causality, loss."""

import pytest
import torch
import torch.nn.functional as F

from evo2_megatron.config import UserError
from evo2_megatron.runtime.cuda_on_cpu import on_device
from helpers import tiny_model

SIZES = ("evo2_tiny", "striped_hyena_tiny_nv")


def slow_norm(x, weight):
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def slow_hyena(w, prefix, symbol, x_LH, num_channels):
    """Token by token, channel by channel, from the formulas of the paper."""
    u = slow_norm(x_LH, w[f"{prefix}mixer.dense_projection.layer_norm_weight"])
    u = u @ w[f"{prefix}mixer.dense_projection.weight"].T
    taps = w[f"{prefix}mixer.hyena_proj_conv.short_conv_weight"]
    f = sum(F.pad(u, (0, 0, lag, 0))[: len(u)] * taps[:, 2 - lag] for lag in range(3))
    post, pre, value = f[:, 0::3], f[:, 1::3], f[:, 2::3]
    z = pre * value
    length, m = len(z), f"{prefix}mixer.mixer."
    y = torch.zeros_like(z)
    for c in range(num_channels):
        if symbol == "S":
            filters = w[m + "short_conv.short_conv_weight"][:, 0].flip(1)
        elif symbol == "D":
            filters = w[m + "filter.h"] * w[m + "filter.decay"]
        else:
            log_pole = -w[m + "filter.p"].exp() * w[m + "filter.gamma"].exp()
            times = torch.arange(length, dtype=z.dtype)
            filters = torch.einsum("gm,gmt->gt", w[m + "filter.R"], (log_pole[..., None] * times).exp())
        h = filters[c // (num_channels // len(filters))]
        for t in range(length):
            for lag in range(min(t + 1, len(h))):
                y[t, c] += h[lag] * z[t - lag, c]
        if m + "conv_bias" in w:
            gain = w[m + "conv_bias"]
            y[:, c] += gain[c // (num_channels // len(gain))] * z[:, c]
    return (post * y) @ w[f"{prefix}mixer.dense.weight"].T + w[f"{prefix}mixer.dense.bias"]


def slow_attention(w, prefix, x_LH, num_heads):
    length, hidden = x_LH.shape
    dim = hidden // num_heads
    a = f"{prefix}self_attention."
    qkv = slow_norm(x_LH, w[a + "linear_qkv.layer_norm_weight"]) @ w[a + "linear_qkv.weight"].T
    angle = torch.outer(
        torch.arange(length, dtype=x_LH.dtype), 10_000 ** (-torch.arange(0, dim, 2, dtype=x_LH.dtype) / dim)
    ).repeat(1, 2)
    out = []
    for head in range(num_heads):
        q, k, v = qkv[:, head * 3 * dim : (head + 1) * 3 * dim].split(dim, 1)
        q, k = (x * angle.cos() + torch.cat([-x[:, dim // 2 :], x[:, : dim // 2]], 1) * angle.sin() for x in (q, k))
        score = (q @ k.T / dim**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        out.append(score.softmax(-1) @ v)
    y = torch.cat(out, 1) @ w[a + "linear_proj.weight"].T
    return y + w.get(a + "linear_proj.bias", 0)


def slow_model(model, ids, *, nv):
    w = {k: v.double() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    x = w["embedding.word_embeddings.weight"][ids]
    for i, symbol in enumerate(model.config.hybrid_override_pattern):
        prefix = f"decoder.layers.{i}."
        if symbol == "*":
            x = x + slow_attention(w, prefix, x, model.config.num_attention_heads)
        else:
            x = x + slow_hyena(w, prefix, symbol, x, model.config.hidden_size)
        gate_up = slow_norm(x, w[prefix + "mlp.linear_fc1.layer_norm_weight"]) @ w[prefix + "mlp.linear_fc1.weight"].T
        gate, up = gate_up.chunk(2, -1)
        if nv:
            gate = F.gelu(gate, approximate="tanh")
        elif i == 0:
            gate = F.gelu(gate)
        x = x + (gate * up) @ w[prefix + "mlp.linear_fc2.weight"].T
    return slow_norm(x, w["decoder.final_norm.weight"]) @ w["embedding.word_embeddings.weight"].T


def small(model_size, **overrides):
    """Two channels to a group, two heads: small enough for the slow model's loops."""
    sizes = {"hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 2, "num_groups_hyena": 16}
    groups = {"num_groups_hyena_medium": 8, "num_groups_hyena_short": 8}
    model = tiny_model(model_size, **(sizes | groups | overrides))
    # the published initialisation makes medium filters of 1e-6: too small to notice an error
    for name, parameter in model.named_parameters():
        if name.endswith("filter.h") or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("model_size", SIZES)
@pytest.mark.parametrize("length", [1, 2, 7, pytest.param(127, marks=pytest.mark.slow), 130])
def test_forward_equals_the_slow_model(one_process, model_size, length):
    torch.manual_seed(length)
    model = small(model_size)
    ids = torch.randint(0, 512, (length,))

    with torch.no_grad():
        got = model(ids[None])[0]

    want = slow_model(model, ids, nv=model_size.endswith("nv"))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("model_size", SIZES)
@pytest.mark.parametrize("cuts", [(1, 1, 1), (2, 127), (128, 1, 129), (5, 1, 1, 200)])
def test_chunks_from_a_carried_state_equal_the_whole(one_process, model_size, cuts):
    torch.manual_seed(0)
    model = small(model_size)
    ids = torch.randint(0, 512, (2, sum(cuts)))
    state = model.new_inference_state(2, sum(cuts))

    with torch.no_grad():
        want = model(ids)
        for _ in range(2):  # again after a reset: nothing may be left over
            got = torch.cat([model(part, inference_context=state) for part in ids.split(cuts, dim=1)], dim=1)
            assert state.num_tokens_seen == sum(cuts)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
            state.reset()


@pytest.fixture
def plain_and_compiled():
    """A model on plain operators and one with the same weights on compiled ones: Triton's interpreter on a CPU."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    models = small("evo2_tiny"), small("evo2_tiny", use_subquadratic_ops=True)
    models[1].load_state_dict(models[0].state_dict())
    return [model.cuda() for model in models] if torch.cuda.is_available() else models


@pytest.mark.any_device
@pytest.mark.slow
def test_compiled_kernels_give_the_same_gradients(one_process, plain_and_compiled):
    ids = torch.randint(0, 512, (2, 130), device=next(plain_and_compiled[0].parameters()).device)
    losses, gradients = [], []
    for model in plain_and_compiled:
        losses.append(model(ids[:, :-1], labels=ids[:, 1:]).mean())
        losses[-1].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    plain, compiled = (model.decoder.layers[0].mixer.mixer.kernels for model in plain_and_compiled)
    assert plain.gated_conv is not compiled.gated_conv


@pytest.mark.slow
@pytest.mark.any_device
def test_compiled_kernels_carry_a_state(one_process, plain_and_compiled):
    ids = torch.randint(0, 512, (2, 140), device=next(plain_and_compiled[0].parameters()).device)
    state = plain_and_compiled[1].new_inference_state(2, 140)
    with torch.no_grad():
        want = plain_and_compiled[0](ids)
        parts = ids.split((129, 1, 10), dim=1)
        got = torch.cat([plain_and_compiled[1](part, inference_context=state) for part in parts], dim=1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("position_scale", [None, 4.0])
def test_all_tensors_are_made_where_the_input_is(one_process, size, position_scale):
    """On ``meta``, which mixes with no other device, as a GPU does not: in training, scoring and decoding."""
    with on_device("meta"):
        model = tiny_model(size, seq_len_interpolation_factor=position_scale).to("meta")
        ids = torch.empty(2, 130, dtype=torch.long, device="meta")
        model(ids[:, :-1], labels=ids[:, 1:]).mean().backward()
        assert {parameter.grad.device.type for parameter in model.parameters()} == {"meta"}
        model.eval()
        state = model.new_inference_state(2, 130)
        with torch.no_grad():
            assert model(ids).device.type == "meta"
            for part in ids.split((70, 59, 1), dim=1):
                assert model(part, inference_context=state).device.type == "meta"


@pytest.mark.parametrize("position_scale", [None, 4.0])
def test_sequences_of_different_lengths_are_decoded_together(one_process, position_scale):
    """Each row is read by itself, two rows get copies, and single tokens of all follow at their own places."""
    torch.manual_seed(0)
    model = small("evo2_tiny", seq_len_interpolation_factor=position_scale)
    lengths, num_new = [1, 2, 127, 127, 128, 131, 131], 4
    ids = torch.randint(0, 512, (len(lengths), max(lengths) + num_new))
    ids[3], ids[6, :131] = ids[2], ids[5, :131]
    state = model.new_inference_state(len(lengths), max(lengths) + num_new)
    with torch.no_grad():
        for row, length in enumerate(lengths):
            if row not in (3, 6):
                model(ids[row : row + 1, :length], inference_context=state.rows(slice(row, row + 1)))
        state.overwrite(slice(3, 4), torch.tensor([2]))
        state.overwrite(slice(6, 7), torch.tensor([5]))
        state.begin_at(lengths, ids.device)
        copied = state.copies(torch.tensor([6, 0]))
        for step in range(num_new):
            places = torch.tensor(lengths) + step
            got = model(ids[range(len(lengths)), places][:, None], inference_context=state)[:, 0]
            want = torch.stack([model(ids[row : row + 1, : at + 1])[0, -1] for row, at in enumerate(places.tolist())])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
            two = model(ids[[6, 0], places[[6, 0]]][:, None], inference_context=copied)[:, 0]
            torch.testing.assert_close(two, want[[6, 0]], rtol=1e-4, atol=1e-6)
    assert state.num_tokens_seen == max(lengths) + num_new
    state.reset()
    assert state.num_tokens_seen == 0 and state.seen_B is None


@pytest.mark.parametrize("lengths", [[5, 5], [1, 130]])
def test_steps_of_fixed_shapes(one_process, lengths):
    """What a CUDA graph records: every step looks at the whole room, and writes the same tensors in place."""
    torch.manual_seed(0)
    model = small("evo2_tiny")
    num_new = 4
    ids = torch.randint(0, 512, (2, max(lengths) + num_new))
    state = model.new_inference_state(2, max(lengths) + num_new + 3)
    with torch.no_grad():
        for row, length in enumerate(lengths):
            model(ids[row : row + 1, :length], inference_context=state.rows(slice(row, row + 1)))
        state.begin_at(lengths, ids.device)
        state.fix_shapes(ids.device)
        tensors = [tensor.data_ptr() for tensor in state.changing()]
        for step in range(num_new):
            before = [tensor.clone() for tensor in state.changing()]
            token_B1 = ids[range(2), torch.tensor(lengths) + step][:, None]
            model((token_B1 + 7) % 512, inference_context=state)
            for tensor, value in zip(state.changing(), before):  # as if that token had not been
                tensor.copy_(value)
            state.num_tokens_seen -= 1
            got = model(token_B1, inference_context=state)[:, 0]
            want = torch.stack([model(ids[row : row + 1, : n + step + 1])[0, -1] for row, n in enumerate(lengths)])
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert tensors == [tensor.data_ptr() for tensor in state.changing()]
    state.reset()
    assert not state.fixed_shapes


@pytest.mark.parametrize("pattern", ["SDH*", "*HDS", "S*HD", "SD*H"])
@pytest.mark.parametrize("pieces", [[9], [2, 1, 150, 1, 1], [1, 129, 3]])
def test_last_token_logits_only(one_process, pattern, pieces):
    """The last layer, whichever it is, sees all tokens and gives one; what follows is as if it had given all."""
    torch.manual_seed(0)
    model = small("evo2_tiny", hybrid_override_pattern=pattern)
    ids = torch.randint(0, 512, (2, sum(pieces)))
    given = []
    model.decoder.layers[-1].mlp.register_forward_hook(lambda _, args, output: given.append(len(args[0])))
    with torch.no_grad():
        want = model(ids)
        state, end = model.new_inference_state(2, sum(pieces), last_token_logits_only=True), 0
        given.clear()
        for piece in ids.split(pieces, dim=1):
            end += piece.shape[1]
            last = model(piece, inference_context=state)
            torch.testing.assert_close(last, want[:, end - 1 : end], rtol=1e-4, atol=1e-6)
    assert given == [1] * len(pieces)


def test_attention_first_with_a_residual_stream_in_32_bits(one_process):
    """As NVIDIA's checkpoints say, and their layers make it 16 bits, too."""
    settings = {"params_dtype": torch.bfloat16, "bf16": True, "fp32_residual_connection": True}
    model = small("evo2_tiny", hybrid_override_pattern="*", num_layers=1, **settings)
    ids = torch.randint(0, 512, (1, 9))
    with torch.no_grad():
        whole = model(ids)
        last = model(ids, inference_context=model.new_inference_state(1, 9, last_token_logits_only=True))
    torch.testing.assert_close(last, whole[:, -1:], rtol=2e-2, atol=2e-2)


def test_a_full_cache_is_an_error(one_process):
    model = small("evo2_tiny")
    with pytest.raises(UserError, match="6 tokens exceed the 5 that were allotted"), torch.no_grad():
        model(torch.zeros(1, 6, dtype=torch.long), inference_context=model.new_inference_state(1, 5))


def test_batch_mates_and_the_future_change_nothing(one_process):
    torch.manual_seed(0)
    model = small("evo2_tiny")
    ids = torch.randint(0, 512, (3, 150))
    with torch.no_grad():
        alone = model(ids[:1])
        torch.testing.assert_close(model(ids)[:1], alone, rtol=1e-4, atol=1e-6)
        ids[:, 100:] = 7
        torch.testing.assert_close(model(ids)[:1, :100], alone[:, :100], rtol=1e-4, atol=1e-6)


def test_hidden_after_layers_is_the_raw_residual_stream(one_process):
    model = small("evo2_tiny")
    ids = torch.randint(0, 512, (2, 20))
    with torch.no_grad():
        first, hidden = model(ids, hidden_after_layers=[0, 3])
        logits = model.output_layer(
            model.decoder.final_norm(hidden), weight=model.shared_embedding_or_output_weight()
        )[0]
        torch.testing.assert_close(logits, model(ids), rtol=1e-4, atol=1e-6)
        (alone,) = model(ids, hidden_after_layers=[0])
        assert alone.shape == (2, 20, 16) and torch.equal(first, alone)


@pytest.mark.parametrize("length", [1, 2, 127, 300])
def test_log_probs_of_the_next_tokens(one_process, length, monkeypatch):
    model = small("evo2_tiny")
    torch.manual_seed(0)
    ids, next_ids = torch.randint(0, 512, (2, 2, length))
    with torch.no_grad():
        log_prob = model(ids).double().log_softmax(-1)
        expected = (log_prob.gather(-1, next_ids[..., None])[..., 0], -(log_prob.exp() * log_prob).sum(-1))
        whole = model(ids, log_probs_of=next_ids)
        with_entropy = model(ids, log_probs_of=next_ids, with_entropy=True)
        monkeypatch.setattr("evo2_megatron.model.striped_hyena.LOSS_BLOCK_TOKENS", 101)
        in_blocks = model(ids, log_probs_of=next_ids)
        both_in_blocks = model(ids, log_probs_of=next_ids, with_entropy=True)
    assert whole.dtype == with_entropy[1].dtype == torch.float32 and torch.equal(with_entropy[0], whole)
    for found, value in zip(with_entropy, expected):
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((in_blocks, *both_in_blocks), (whole, *with_entropy), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method, block", [("uniform", 1), ("uniform", 3), ("block", 2)])
def test_recomputed_gradients_are_the_same(one_process, method, block):
    ids = torch.randint(0, 512, (2, 40))
    gradients = []
    for recompute in ({"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None},
                      {"recompute_method": method, "recompute_num_layers": block}):  # fmt: skip
        torch.manual_seed(3)
        model = small("evo2_tiny", hidden_dropout=0.1, **recompute).train()
        torch.manual_seed(4)
        model(ids, labels=ids).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "dropout, layout, draws_its_own",
    [
        ("hidden_dropout", {"sequence_parallel": True}, True),  # other tokens
        ("attention_dropout", {"tensor_model_parallel_size": 2}, True),  # other heads
        ("hidden_dropout", {"tensor_model_parallel_size": 2}, False),  # the same tokens
    ],
)
def test_processes_drop_for_themselves_what_others_do_not_have(one_process, dropout, layout, draws_its_own):
    model = small("evo2_tiny", recompute_granularity=None, recompute_method=None, **{dropout: 0.1}).train()
    for name, value in layout.items():  # a layer asks whether, and not which process it is
        setattr(model.config, name, value)
    hidden_LBH, shared = torch.randn(8, 1, model.config.hidden_size), torch.cuda.get_rng_state()
    model.decoder(hidden_LBH, model.rotary_pos_emb(8))
    assert torch.equal(torch.cuda.get_rng_state(), shared) == draws_its_own


@pytest.mark.parametrize("model_size", SIZES)
def test_every_module_is_called_before_its_parameters_are_read(one_process, model_size):
    """In hooks before that, Megatron waits for parameters that other processes still send."""
    model = small(model_size)
    called = set()
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, arguments: called.add(module))
    ids = torch.randint(0, 512, (1, 12))
    model(ids, labels=ids)
    not_called = [name for name, module in model.named_modules() if module not in called]
    assert [name for name in not_called if list(model.get_submodule(name).parameters(recurse=False))] == []


def test_gradients_reach_the_input_in_eval_mode(one_process):
    model = small("evo2_tiny")
    seen = []
    model.embedding.register_forward_hook(lambda module, args, output: seen.append(output.retain_grad() or output))
    model(torch.randint(0, 512, (1, 12))).sum().backward()
    assert seen[0].grad.abs().sum() > 0


@pytest.mark.parametrize("soft_masked", [0.1, 0.5, 0.0])
@pytest.mark.parametrize("to_upper", ["normalized_weighted", "weighted"])
def test_loss_weighs_soft_masked_bases(one_process, to_upper, soft_masked):
    model = small("evo2_tiny", to_upper=to_upper, lowercase_loss_weight=soft_masked)
    ids = torch.tensor([[65, 67, 71, 84, 65, 67]])
    labels = torch.tensor([[67, 103, 116, 65, 67, 0]])  # C g t A C EOD
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 1.0]])

    with torch.no_grad():
        got = model(ids, labels=labels, loss_mask=mask)
        upper = torch.tensor([[67, 71, 84, 65, 67, 0]])
        nats = -model(ids).log_softmax(-1).gather(-1, upper[..., None])[..., 0]

    weight = torch.tensor([[1.0, soft_masked, soft_masked, 1.0, 0.0, 1.0]])
    if to_upper == "normalized_weighted":
        weight *= 5 / (3 + 2 * soft_masked)
    torch.testing.assert_close(got, nats * weight)
