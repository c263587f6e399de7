# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Classification metrics: top-k accuracy, ROC AUC, calibration error, regression errors."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score, root_mean_squared_error
from transformers import EvalPrediction

from ..data.labels import MULTI, SINGLE


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Fraction of the rows of `scores` (rows, classes) with the label (rows,) among the `k` highest."""
    k = min(k, scores.shape[1])
    highest = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return float((highest == labels[:, None]).any(axis=1).mean())


def areas_under_curve(scores: np.ndarray, targets: np.ndarray) -> list[float | None]:
    """
    The area under the ROC curve of each class; None for a class that all or no images have.

    Args:
        scores: of each class, higher for more likely (images, classes).
        targets: zeros and ones (images, classes).
    """
    return [
        float(roc_auc_score(target, score)) if 0 < target.sum() < len(target) else None
        for score, target in zip(scores.T, targets.T)
    ]


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> dict:
    """
    Calibration: the difference between the confidence of a classifier and its accuracy.

    Args:
        probabilities: of each class (images, classes).
        labels: class numbers (images,).
        bins: number of bins of equal width, by confidence.

    Returns:
        `expected_calibration_error` (arXiv 1706.04599), and `bins`, with `confidence`, `accuracy` and `count` of each
        bin that is not empty.
    """
    confidence, hit = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    filled = [
        {"confidence": float(confidence[here].mean()), "accuracy": float(hit[here].mean()), "count": int(here.sum())}
        for here in (number == index for index in range(bins))
        if here.any()
    ]
    error = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in filled) / len(labels)
    return {"expected_calibration_error": float(error), "bins": filled}


def metrics_of(problem_type: str, names: Sequence[str]) -> tuple[Callable[[EvalPrediction], dict], str, bool]:
    """
    The `compute_metrics` of `Trainer`.

    Returns:
        The function, the metric that the best model is chosen by, and whether higher is better.
    """
    if problem_type == SINGLE:
        return _single_label, "accuracy", True
    if problem_type == MULTI:
        return lambda prediction: _multi_label(prediction, names), "mean_auc", True
    return _regression, "rmse", False


def _single_label(prediction: EvalPrediction) -> dict[str, float]:
    scores, labels = prediction.predictions, prediction.label_ids
    metrics = {"accuracy": top_k_accuracy(scores, labels, 1)}
    if scores.shape[1] > 5:
        metrics["top5_accuracy"] = top_k_accuracy(scores, labels, 5)
    return metrics


def _multi_label(prediction: EvalPrediction, names: Sequence[str]) -> dict[str, float]:
    areas = areas_under_curve(prediction.predictions, prediction.label_ids)
    known = {f"auc_{name}": area for name, area in zip(names, areas) if area is not None}
    return {"mean_auc": float(np.mean(list(known.values()))) if known else math.nan, **known}


def _regression(prediction: EvalPrediction) -> dict[str, float]:
    targets, outputs = (values.reshape(len(values), -1) for values in (prediction.label_ids, prediction.predictions))
    return {
        "rmse": float(root_mean_squared_error(targets, outputs)),
        "mae": float(mean_absolute_error(targets, outputs)),
        "r2": float(r2_score(targets, outputs)) if len(targets) > 1 else 0.0,
    }
