# SPDX-License-Identifier: Apache-2.0
"""Answers of evo2_serve that are mostly numbers."""

import asyncio
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest

from evo2_megatron.tasks.server import schemas
from evo2_megatron.tasks.server.arrays import check_values, json_in_pieces
from evo2_megatron.tasks.server.jobs import Refused


@pytest.mark.parametrize("shape", [(0,), (3,), (16385,), (0, 4), (1, 4), (63, 2), (64, 2), (129, 3)])
def test_json_in_pieces(shape):
    rows = [
        {"3": np.random.default_rng(0).random(shape, np.float32), "12": np.zeros(2)},
        {},
        {"x": np.ones(1), "y": 2.5, "z": 3},
    ]
    text = b"".join(json_in_pieces({"layers": [3], "elapsed_ms": 1.5}, "embeddings", rows))
    wanted = [{name: np.asarray(values).tolist() for name, values in row.items()} for row in rows]
    assert json.loads(text) == {"layers": [3], "elapsed_ms": 1.5, "embeddings": wanted}


def test_how_many_numbers_may_be_asked_for():
    check_values(3, 3, way_out="less")
    with pytest.raises(Refused, match="would have 4 numbers, more than 3; ask for less") as refused:
        check_values(4, 3, way_out="less")
    assert refused.value.status == 413


@pytest.mark.parametrize(
    "route, body, message",
    [
        ("/v1/score", {"sequences": ["ACGTA", "ACGTAC"], "per_base": True}, "11 numbers, more than 10; .*per_base"),
        ("/v1/embed", {"sequences": ["AC"], "layers": [0, 1], "pooling": None}, "16 numbers, more than 10; .*npz"),
        ("/v1/embed", {"sequences": ["AC"] * 3, "layers": [0], "encoding": "npz"}, "12 numbers, more than 11; .*pool"),
        (
            "/biology/arc/evo2/generate",
            {"sequence": "A", "num_tokens": 2, "enable_logits": True},
            "512 numbers, more than 10; .*enable_logits",
        ),
    ],
)
def test_more_numbers_are_refused_before_the_model_is_asked(monkeypatch, route, body, message):
    from evo2_megatron.tasks.server import routes

    monkeypatch.setattr(routes, "MAX_JSON_VALUES", 10)
    monkeypatch.setattr(routes, "MAX_NPZ_VALUES", 11)
    info = SimpleNamespace(max_seq_length=100, vocab_size=256, num_layers=2, hidden_size=4)
    endpoints = {r.path: r for r in routes.make_router(SimpleNamespace(info=info), None).routes}
    request = inspect.signature(endpoints[route].endpoint, eval_str=False).parameters["body"].annotation
    model = getattr(schemas, request.split(".")[-1])
    with pytest.raises(Refused, match=message) as refused:
        asyncio.run(endpoints[route].endpoint(model(**body), None))
    assert refused.value.status == 413
