# SPDX-License-Identifier: Apache-2.0
"""Linear models on fixed features, measured on folds that they have not seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evo2_megatron.config import UserError
from evo2_megatron.data.labels import Labels

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline

METRICS = {
    "classification": ("auroc", "accuracy", "balanced_accuracy", "mcc"),
    "regression": ("r2", "pearson", "spearman", "mae"),
}
"""Columns of the table; the first is what the best is chosen by."""

INNER_FOLDS = 3
"""What chooses the regularization."""

_STRENGTHS = np.logspace(-3, 2, 6)
"""Of the penalty on the squared weights of standardized features, relative to the mean loss of a sequence."""

Split = tuple[np.ndarray, np.ndarray]
"""Rows to learn from, and rows to measure on, int64."""


class Fold(NamedTuple):
    """A split, and how the rows to learn from are split again."""

    learned: np.ndarray
    held_out: np.ndarray
    inner: list[Split]
    """Of those to learn from, counted among them."""


class Candidate(NamedTuple):
    """Features that a linear model is tried on."""

    layer: str
    pooling: str
    features: np.ndarray
    """float32 [sequences, features]."""


class Result(NamedTuple):
    """How well that went."""

    layer: str
    pooling: str
    num_features: int
    means: dict[str, float]
    """Of each metric over the folds in which it is defined."""
    standard_error: float
    """Of the first metric, over folds; nan of one."""
    predictions: np.ndarray
    """By the model that has not seen the sequence, [sequences, outputs]: probabilities of the classes, or numbers."""


def folds_of(labels: Labels, targets: np.ndarray, groups: np.ndarray | None, num_folds: int, seed: int) -> list[Split]:
    """Rows to learn from and rows to measure on, for each fold: a group is never in both, classes in equal shares.

    Raises:
        UserError: Too few sequences, groups or cases of a class.
    """
    from sklearn import model_selection as sk

    is_class = labels.task == "classification"
    counts = {"sequences": len(targets)}
    if is_class:
        counts = {f"sequences of class {name!r}": int((targets == n).sum()) for n, name in enumerate(labels.classes)}
    if groups is not None:
        counts["groups"] = len(np.unique(groups))
    what, fewest = min(counts.items(), key=lambda item: item[1])
    if fewest < num_folds:
        raise UserError(f"{fewest} {what} cannot be divided into {num_folds} folds; give more of them")
    if groups is None:
        splitter = (sk.StratifiedKFold if is_class else sk.KFold)(num_folds, shuffle=True, random_state=seed)
    elif is_class:
        splitter = sk.StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    else:
        splitter = sk.GroupKFold(num_folds, shuffle=True, random_state=seed)
    folds = list(splitter.split(np.zeros(len(targets)), targets, groups))
    if is_class and any(len(np.unique(targets[learned])) < len(labels.classes) for learned, _ in folds):
        raise UserError("a class is in so few groups that a fold has none of it to learn from; give other groups")
    return folds


def nested_folds(
    labels: Labels, targets: np.ndarray, groups: np.ndarray | None, num_folds: int, seed: int
) -> list[Fold]:
    """``folds_of``, each with those of the rows that it learns from."""
    nested = []
    for learned, held_out in folds_of(labels, targets, groups, num_folds, seed):
        of_learned = None if groups is None else groups[learned]
        nested.append(Fold(learned, held_out, folds_of(labels, targets[learned], of_learned, INNER_FOLDS, seed)))
    return nested


def _log_likelihood(model: LogisticRegression, features: np.ndarray, targets: np.ndarray) -> float:
    """Mean, also of targets that lack a class."""
    from sklearn.metrics import log_loss

    return -log_loss(targets, model.predict_proba(features), labels=model.classes_)


def fit(labels: Labels, features: np.ndarray, targets: np.ndarray, inner: Sequence[Split]) -> Pipeline:
    """Standardized features and a linear model, whose regularization the inner folds choose."""
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if labels.task == "regression":
        model = RidgeCV(alphas=len(targets) * _STRENGTHS, cv=inner)
    else:
        strengths = 1 / (len(targets) * _STRENGTHS)
        model = LogisticRegressionCV(Cs=strengths, cv=inner, scoring=_log_likelihood, max_iter=1000)
    return make_pipeline(StandardScaler(), model).fit(features, targets)


def predict(labels: Labels, model: Pipeline, features: np.ndarray) -> np.ndarray:
    """Probabilities of the classes [sequences, classes], or numbers [sequences, 1]."""
    return model.predict(features)[:, None] if labels.task == "regression" else model.predict_proba(features)


def measure(candidate: Candidate, labels: Labels, targets: np.ndarray, folds: Sequence[Fold]) -> Result:
    """Fit to the rows of each fold, and measure on those that it has not seen."""
    from evo2_megatron.tasks.heads.head_metrics import metrics_of

    predictions = np.zeros((len(targets), max(len(labels.classes), 1)))
    of_folds = []
    for learned, held_out, inner in folds:
        model = fit(labels, candidate.features[learned], targets[learned], inner)
        predictions[held_out] = predict(labels, model, candidate.features[held_out])
        of_folds.append(metrics_of(labels, targets[held_out, None], predictions[held_out]))
    values = {
        name: [metrics[name] for metrics in of_folds if metrics[name] is not None] for name in METRICS[labels.task]
    }
    first = values[METRICS[labels.task][0]]
    error = np.std(first, ddof=1) / len(first) ** 0.5 if len(first) > 1 else np.nan
    means = {name: float(np.mean(some)) if some else float("nan") for name, some in values.items()}
    return Result(*candidate[:2], candidate.features.shape[1], means, float(error), predictions)
