# SPDX-License-Identifier: Apache-2.0
"""Metrics of predictions: worked examples, and what too few data leave undefined."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest

from evo2_megatron.data.labels import Labels
from evo2_megatron.tasks.heads.head_metrics import log_metrics, metrics_of

nan = math.nan
CLASSES = Labels(classes=("a", "b", "c"))


def test_classes():
    values = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05]])
    targets = np.array([[0], [1], [1], [2], [nan]])
    got = metrics_of(CLASSES, targets, values)
    assert got["num_sequences"] == 4 and got["accuracy"] == 0.75
    assert got["balanced_accuracy"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert got["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert got["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert got["cross_entropy"] == pytest.approx(-np.log([0.7, 0.8, 0.3, 0.6]).mean())
    assert got["auroc"] == pytest.approx(1.0)
    assert got["classes"]["b"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "num_sequences": 2}


def test_two_classes():
    probability = np.array([0.1, 0.6, 0.4, 0.9])
    values = np.stack([1 - probability, probability], axis=1)
    got = metrics_of(Labels(classes=("no", "yes")), np.array([[0], [0], [1], [1]]), values)
    assert got["auroc"] == 0.75 and got["accuracy"] == 0.5 and got["mcc"] == 0


def test_a_class_that_is_not_there():
    got = metrics_of(CLASSES, np.array([[0.0], [1.0]]), np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]]))
    assert got["auroc"] is None and got["balanced_accuracy"] == 1 and got["f1_macro"] == 1


def test_labels():
    labels = Labels(task="multilabel", columns=("x", "y", "z"))
    targets = np.array([[1, 1, nan], [0, 1, nan], [1, nan, nan], [0, 1, nan]])
    values = np.array([[0.9, 0.9, 0.1], [0.2, 0.4, 0.1], [0.3, 0.1, 0.1], [0.25, 0.6, 0.1]])
    got = metrics_of(labels, targets, values)
    x, y = got["columns"]["x"], got["columns"]["y"]
    assert set(got["columns"]) == {"x", "y"}  # nothing is known of z
    assert x["accuracy"] == 0.75 and x["auroc"] == 1 and x["average_precision"] == 1 and x["num_positive"] == 2
    assert y["num_sequences"] == 3 and y["auroc"] is None and y["accuracy"] == pytest.approx(2 / 3)
    assert got["auroc"] == 1 and got["accuracy"] == pytest.approx((0.75 + 2 / 3) / 2)


def test_numbers():
    got = metrics_of(Labels(task="regression"), np.array([[1.0], [2], [4], [nan]]), np.array([[1.0], [3], [5], [9]]))
    assert got["num_sequences"] == 3 and got["mse"] == pytest.approx(2 / 3) and got["mae"] == pytest.approx(2 / 3)
    assert got["spearman"] == 1 and got["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 5])[0, 1])
    assert got["r2"] == pytest.approx(1 - 2 / np.sum((np.array([1, 2, 4]) - 7 / 3) ** 2))


def test_numbers_without_spread():
    got = metrics_of(Labels(task="regression"), np.array([[1.0], [2.0]]), np.array([[3.0], [3.0]]))
    assert got["pearson"] is None and got["spearman"] is None and got["r2"] is not None
    alone = metrics_of(Labels(task="regression"), np.array([[1.0]]), np.array([[3.0]]))
    assert alone["r2"] is None and alone["mse"] == 4


@pytest.mark.parametrize("num", [1, 3])
def test_one_class_alone(num):
    """Metrics that compare classes are not defined, which scikit-learn would say with a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = metrics_of(CLASSES, np.full((num, 1), 1.0), np.array([[0.1, 0.8, 0.1]] * num))
        label = metrics_of(Labels(task="multilabel", columns=("x",)), np.ones((num, 1)), np.full((num, 1), 0.9))
        metrics_of(Labels(task="regression"), np.ones((num, 1)), np.ones((num, 1)))
    assert got["mcc"] is None and got["auroc"] is None and got["accuracy"] == got["f1_macro"] == 1
    assert got["confusion"] == [[0, 0, 0], [0, num, 0], [0, 0, 0]]
    assert label["mcc"] is None and label["auroc"] is None and label["f1"] == 1


def test_no_labels():
    assert metrics_of(CLASSES, np.full((2, 1), nan), np.full((2, 3), 1 / 3)) == {}


def test_all_of_it_is_json():
    rng = np.random.default_rng(0)
    for labels, targets, values in (
        (CLASSES, rng.integers(0, 3, (20, 1)), rng.dirichlet([1, 1, 1], 20)),
        (Labels(task="multilabel", columns=("x", "y")), rng.integers(0, 2, (20, 2)), rng.random((20, 2))),
        (Labels(task="regression", columns=("x", "y")), rng.random((20, 2)), rng.random((20, 2))),
    ):
        json.dumps(metrics_of(labels, targets.astype(float), values), allow_nan=False)


def test_metrics_of_bases_and_their_line(caplog):
    labels = Labels(classes=("a", "b"), per_base=True)
    rng = np.random.default_rng(0)
    got = metrics_of(labels, rng.integers(0, 2, (123_456, 1)).astype(float), rng.dirichlet([1, 1], 123_456))
    assert got["num_bases"] == 123_456 == sum(of_class["num_bases"] for of_class in got["classes"].values())
    with caplog.at_level("INFO"):
        log_metrics(got)
    assert caplog.messages[0].startswith(f"num_bases 123456, accuracy {got['accuracy']:.4g}, ")
    assert "confusion" not in caplog.text
