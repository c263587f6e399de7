# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Plots of evaluations: confusion matrix, reliability diagram, robustness."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ..training.figures import COLORS, FAINT, INK, frame, new_figure


def confusion_matrix_figure(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """
    Counts as a table: true classes are rows, predicted ones columns; errors have a color of their own. With more than
    30 classes, without names and numbers.

    Raises:
        ValueError: if the matrix is not square, or there is not one name per class.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(class_names), len(class_names)):
        raise ValueError(
            f"The matrix must be {len(class_names)} x {len(class_names)}, one row per name, got {counts.shape}."
        )
    few = len(class_names) <= 30
    figure = new_figure(width=5.6, height=4.2)
    axes = figure.add_subplot()
    fraction = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    # hits and errors have scales of their own: a single error among hundreds would be invisible on a common one
    hits = np.ma.masked_where(~np.eye(len(counts), dtype=bool), fraction)
    errors = np.ma.masked_where(np.eye(len(counts), dtype=bool) | (counts == 0), fraction)
    axes.imshow(hits, cmap="Blues", vmin=0, vmax=1.6)
    axes.imshow(errors, cmap="Oranges", vmin=-0.1, vmax=0.3)
    for true, predicted in np.argwhere(counts) if few else []:
        axes.text(predicted, true, str(counts[true, predicted]), ha="center", va="center", fontsize=9, color=INK)
    axes.set(xlabel="predicted", ylabel="true", xlim=(-0.5, len(counts) - 0.5), ylim=(len(counts) - 0.5, -0.5))
    long = max(map(len, class_names)) > 3
    axes.set_xticks(range(len(counts)) if few else [], class_names if few else [], rotation=90 if long else 0)
    axes.set_yticks(range(len(counts)) if few else [], class_names if few else [])
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_color(FAINT)
    return figure


def calibration_figure(bins: Sequence[Mapping[str, float]], expected_calibration_error: float) -> Figure:
    """
    Reliability diagram: accuracy against confidence, with the fraction of the images below; calibrated confidence lies
    on the diagonal.

    Args:
        bins: with `confidence`, `accuracy` and `count` each, from `metrics.calibration`.
        expected_calibration_error: for the title.

    Raises:
        ValueError: if there is no bin.
    """
    if not bins:
        raise ValueError("There is nothing to draw: calibration needs at least one image.")
    figure = new_figure(width=4.6, height=4.8)
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    confidence, accuracy, count = (
        np.array([part[key] for part in bins]) for key in ("confidence", "accuracy", "count")
    )
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2)
    axes.vlines(confidence, accuracy, confidence, color=COLORS[1], linewidth=2.2, alpha=0.6)
    axes.plot(confidence, accuracy, color=COLORS[0], marker="o", markersize=4, linewidth=1.6)
    axes.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    axes.set_title(
        f"expected calibration error {100 * expected_calibration_error:.1f} %", loc="left", fontsize=11, color=INK
    )
    counts.bar(confidence, count / count.sum(), width=0.03, color=COLORS[0])
    counts.set(xlabel="confidence", ylabel="fraction")
    for part in (axes, counts):
        frame(part)
    return figure


def robustness_figure(accuracy: Mapping[str, Mapping[str, float]]) -> Figure:
    """
    Accuracy on corrupted images as a table: a row per corruption, stronger to the right.

    Args:
        accuracy: corruption -> strength -> accuracy, from `robustness.robustness`.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not accuracy:
        raise ValueError("There is nothing to draw: robustness needs at least one corruption.")
    columns = max(len(row) for row in accuracy.values())
    figure = new_figure(width=1.9 + 0.85 * columns, height=0.6 + 0.42 * len(accuracy))
    axes = figure.add_subplot()
    cells = np.full((len(accuracy), columns), np.nan)
    for index, row in enumerate(accuracy.values()):
        cells[index, : len(row)] = list(row.values())
    axes.imshow(np.ma.masked_invalid(cells), cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for index, row in enumerate(accuracy.values()):
        for column, (strength, value) in enumerate(row.items()):
            axes.text(column, index - 0.12, f"{100 * value:.1f}", ha="center", va="center", fontsize=9, color=INK)
            axes.text(column, index + 0.27, strength, ha="center", va="center", fontsize=6, color=INK, alpha=0.7)
    axes.set_yticks(range(len(accuracy)), list(accuracy))
    axes.set_xticks([])
    axes.set_title("top-1 in %, strength below it", loc="left", fontsize=10, color=INK)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    return figure
