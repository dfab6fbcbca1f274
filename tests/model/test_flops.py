# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from evo2_megatron.architectures import architecture
from evo2_megatron.model.flops import training_flops


def flops_of(model_size: str, seq_length: int, batch_size: int = 1) -> float:
    arch = architecture(model_size)
    return training_flops(
        arch.pattern,
        batch_size=batch_size,
        seq_length=seq_length,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        vocab_size=512,
    )


@pytest.mark.parametrize(
    "model_size, seq_length, expected",
    [
        ("evo2_1b_base", 8192, 6.0741e13),
        ("evo2_7b_base", 8192, 3.3532e14),
        ("evo2_40b_base", 8192, 2.03596e15),
        ("evo2_7b", 2**20, 3.11667e17),
        ("evo2_20b", 2**20, 4.48511e17),
        ("evo2_40b", 2**20, 1.12351e18),
        ("striped_hyena_test", 8192, 4.32359e13),
    ],
)
def test_published_models(model_size, seq_length, expected):
    assert flops_of(model_size, seq_length) == pytest.approx(expected, rel=2e-5)


def test_grows_with_the_batch():
    assert flops_of("evo2_tiny", 64, batch_size=3) == 3 * flops_of("evo2_tiny", 64)


def test_one_token():
    # log2(1) = 0: one token is not convolved with anything
    assert flops_of("evo2_tiny", 1) > 0


def test_bridge_reports_it(megatron):
    from types import SimpleNamespace

    from megatron.bridge.training.utils.flop_utils import num_floating_point_operations

    from evo2_megatron.model.provider import provider_for

    config = SimpleNamespace(model=provider_for("evo2_tiny", vocab_size=512, seq_length=64), peft=None)
    assert num_floating_point_operations(config, batch_size=3) == flops_of("evo2_tiny", 64, batch_size=3)
