# SPDX-License-Identifier: Apache-2.0
"""How good predictions are where the truth is known; by scikit-learn.

Shape legend: N sequences or bases, C outputs, T columns of labels.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from evo2_megatron.data.labels import Labels

logger = logging.getLogger(__name__)


def metrics_of(labels: Labels, targets_NT: np.ndarray, values_NC: np.ndarray) -> dict[str, Any]:
    """Metrics by name, as JSON knows them; None for one that these data do not define; empty if no label is known.

    ``num_sequences``, or ``num_bases``, is how many labels are known.

    Args:
        labels: What was learnt.
        targets_NT: Number of the class, 0 or 1, or a number; NaN: not known.
        values_NC: Probabilities of classes or labels, or numbers.
    """
    if np.isnan(targets_NT).all():
        return {}
    if labels.task == "classification":
        known_N = ~np.isnan(targets_NT[:, 0])
        return _of_classes(labels, targets_NT[known_N, 0].astype(int), values_NC[known_N])
    of_one = _of_label if labels.task == "multilabel" else _of_numbers
    by_column = {}
    for name, target_N, value_N in zip(labels.columns, targets_NT.T, values_NC.T):
        known_N = ~np.isnan(target_N)
        if known_N.any():
            by_column[name] = of_one(labels, target_N[known_N].astype(np.float64), value_N[known_N])
    if len(by_column) == 1:
        return next(iter(by_column.values()))
    return _means(list(by_column.values())) | {"columns": by_column}


def log_metrics(metrics: dict[str, Any]) -> None:
    """One line: those of the whole."""
    shown = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in metrics.items()
        if isinstance(value, (int, float))
    ]
    if shown:
        logger.info("%s", ", ".join(shown))


def _of_classes(labels: Labels, class_N: np.ndarray, probability_NC: np.ndarray) -> dict[str, Any]:
    chosen_N, numbers = probability_NC.argmax(1), range(len(labels.classes))
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        class_N, chosen_N, labels=numbers, zero_division=0.0
    )
    auroc = None
    if len(np.unique(class_N)) == len(labels.classes):
        scores = probability_NC[:, 1] if len(labels.classes) == 2 else probability_NC
        auroc = float(sk.roc_auc_score(class_N, scores, multi_class="ovr"))
    present = support > 0
    return {
        f"num_{labels.unit}s": len(class_N),
        "accuracy": float(sk.accuracy_score(class_N, chosen_N)),
        "balanced_accuracy": float(recall[present].mean()),
        "f1_macro": float(f1[present].mean()),
        "mcc": _mcc(class_N, chosen_N),
        "auroc": auroc,
        "cross_entropy": float(sk.log_loss(class_N, probability_NC, labels=numbers)),
        "classes": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), f"num_{labels.unit}s": int(n)}
            for name, p, r, f, n in zip(labels.classes, precision, recall, f1, support)
        },
        "confusion": sk.confusion_matrix(class_N, chosen_N, labels=numbers).tolist(),
    }


def _of_label(labels: Labels, target_N: np.ndarray, probability_N: np.ndarray) -> dict[str, Any]:
    chosen_N, both = probability_N > 0.5, len(np.unique(target_N)) == 2
    return {
        f"num_{labels.unit}s": len(target_N),
        "num_positive": int(target_N.sum()),
        "accuracy": float(sk.accuracy_score(target_N, chosen_N)),
        "f1": float(sk.f1_score(target_N, chosen_N, zero_division=0.0)),
        "mcc": _mcc(target_N, chosen_N),
        "auroc": float(sk.roc_auc_score(target_N, probability_N)) if both else None,
        "average_precision": float(sk.average_precision_score(target_N, probability_N)) if both else None,
    }


def _mcc(true_N: np.ndarray, chosen_N: np.ndarray) -> float | None:
    """Matthews' correlation; None where all that is true and all that was chosen is one class."""
    if len(np.union1d(true_N, chosen_N)) < 2:
        return None
    return float(sk.matthews_corrcoef(true_N, chosen_N))


def _of_numbers(labels: Labels, target_N: np.ndarray, value_N: np.ndarray) -> dict[str, Any]:
    varies = len(target_N) > 1 and np.ptp(target_N) > 0
    correlates = varies and np.ptp(value_N) > 0
    return {
        f"num_{labels.unit}s": len(target_N),
        "mse": float(sk.mean_squared_error(target_N, value_N)),
        "mae": float(sk.mean_absolute_error(target_N, value_N)),
        "r2": float(sk.r2_score(target_N, value_N)) if varies else None,
        "pearson": float(stats.pearsonr(target_N, value_N).statistic) if correlates else None,
        "spearman": float(stats.spearmanr(target_N, value_N).statistic) if correlates else None,
    }


def _means(of_each: list[dict[str, Any]]) -> dict[str, float | None]:
    """Over the columns in which a metric is defined; counts have no mean."""
    means: dict[str, float | None] = {}
    for name in of_each[0]:
        if not name.startswith("num_"):
            values = [metrics[name] for metrics in of_each if metrics[name] is not None]
            means[name] = math.fsum(values) / len(values) if values else None
    return means
