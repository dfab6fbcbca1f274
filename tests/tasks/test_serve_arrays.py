# SPDX-License-Identifier: Apache-2.0
"""Answers of evo2_serve that are mostly numbers."""

import json

import numpy as np
import pytest

from evo2_megatron.tasks.server.arrays import MAX_JSON_VALUES, MAX_NPZ_VALUES, check_values, json_in_pieces
from evo2_megatron.tasks.server.jobs import Refused


@pytest.mark.parametrize("shape", [(0,), (3,), (0, 4), (1, 4), (63, 2), (64, 2), (129, 3)])
def test_json_in_pieces(shape):
    rows = [{"3": np.random.default_rng(0).random(shape, np.float32), "12": np.zeros(2)}, {}, {"x": np.ones(1)}]
    text = b"".join(json_in_pieces({"layers": [3], "elapsed_ms": 1.5}, "embeddings", rows))
    wanted = [{name: values.tolist() for name, values in row.items()} for row in rows]
    assert json.loads(text) == {"layers": [3], "elapsed_ms": 1.5, "embeddings": wanted}


def test_how_many_numbers_may_be_asked_for():
    check_values(MAX_JSON_VALUES, as_json=True)
    check_values(MAX_NPZ_VALUES, as_json=False)
    with pytest.raises(Refused, match="4194305 numbers") as json_refused:
        check_values(MAX_JSON_VALUES + 1, as_json=True)
    with pytest.raises(Refused) as npz_refused:
        check_values(MAX_NPZ_VALUES + 1, as_json=False)
    assert "npz" in json_refused.value.message and "npz" not in npz_refused.value.message
    assert json_refused.value.status == npz_refused.value.status == 413
