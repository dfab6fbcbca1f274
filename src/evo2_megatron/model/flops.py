# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, for the TFLOP/s that Megatron reports.

B samples, L tokens each, H channels, F width of one half of the gated MLP, V symbols.
"""

from __future__ import annotations

import math

_TAPS = {"S": 7, "D": 128}
_INPUT_CONV_TAPS = 3


def training_flops(
    pattern: str, *, batch_size: int, seq_length: int, hidden_size: int, ffn_hidden_size: int, vocab_size: int
) -> float:
    """Operations of one optimizer step over ``batch_size`` samples, all processes together.

    A multiply-add counts as two. The backward pass counts twice the forward pass; recomputed activations do not count.
    Attention is not halved for causality, the D operator counts as a direct convolution and the H operator as
    ``10 L log2 L`` per channel, so that figures compare with those published for Evo 2's other trainers.

    Args:
        pattern: Layer symbols, see ``architectures.LAYER_SYMBOLS``.
        vocab_size: Rows of the output layer without padding.
    """
    tokens = batch_size * seq_length
    matrices = 2 * tokens * hidden_size * (4 * hidden_size + 3 * ffn_hidden_size)
    input_conv = 2 * tokens * _INPUT_CONV_TAPS * 3 * hidden_size
    per_layer = {
        "*": matrices + 4 * tokens * seq_length * hidden_size,
        "H": matrices + input_conv + 10 * tokens * math.log2(seq_length) * hidden_size,
        **{symbol: matrices + input_conv + 2 * tokens * taps * hidden_size for symbol, taps in _TAPS.items()},
    }
    logits = 2 * tokens * hidden_size * vocab_size
    return 3.0 * (logits + sum(per_layer[symbol] for symbol in pattern))
