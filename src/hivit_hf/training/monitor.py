# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a training: reconstructions, learning curves and confusion matrices, as matplotlib figures."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


COLORS = ("#1d4ed8", "#c2410c", "#047857", "#7e22ce")  # dark enough for thin lines on white
INK, FAINT = "#1f2933", "#d5dbe1"


def reconstruction_grid(
    originals: torch.Tensor, bool_masked_pos: torch.BoolTensor, reconstructions: torch.Tensor, patch_size: int
) -> Figure:
    """
    Three rows of pictures: the originals, what the encoder saw (masked units grey), and the reconstructions.

    Args:
        originals: (B, 3, H, W), values in [0, 1]; all of them are shown.
        bool_masked_pos: (B, N), True = masked.
        reconstructions: (B, 3, H, W), values outside [0, 1] are clipped.
        patch_size: side of a unit in px.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if originals.shape != reconstructions.shape or originals.ndim != 4 or originals.shape[1] != 3:
        raise ValueError(
            "originals and reconstructions must both have the shape (B, 3, H, W), got "
            f"{tuple(originals.shape)} and {tuple(reconstructions.shape)}."
        )
    batch, _, height, width = originals.shape
    grid = height // patch_size, width // patch_size
    if tuple(bool_masked_pos.shape) != (batch, grid[0] * grid[1]):
        raise ValueError(
            f"bool_masked_pos must have the shape {(batch, grid[0] * grid[1])} for units of {patch_size} px, got "
            f"{tuple(bool_masked_pos.shape)}."
        )
    masked_pixels = bool_masked_pos.unflatten(1, grid).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    masked = torch.where(masked_pixels[:, None], torch.tensor(0.55), originals)
    figure = _figure(width=0.86 * batch + 1.1, height=0.86 * 3)
    rows = [("original", originals), ("masked", masked), ("reconstructed", reconstructions)]
    for row, (name, pictures) in enumerate(rows):
        for column, picture in enumerate(pictures):
            axes = figure.add_subplot(3, batch, row * batch + column + 1)
            axes.imshow(picture.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8, fontsize=10, color=INK)
    return figure


def learning_curves(
    curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    x_label: str,
    y_label: str,
    title: str = "",
    y_limits: tuple[float, float] | None = None,
) -> Figure:
    """
    One colour per name: a thin line for each run, and a thick one for their mean if there are several.

    Args:
        curves: for each name its runs, each as (x values, y values). Runs of one name share their x values.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        title: above the figure.
        y_limits: lowest and highest y; fitted to the curves if not given.

    Raises:
        ValueError: if there is nothing to draw, or runs of one name differ in their x values.
    """
    if not curves or not all(curves.values()):
        raise ValueError(
            f"Every name needs at least one run, got { {name: len(runs) for name, runs in curves.items()} }."
        )
    figure = _figure(width=5.6, height=3.5)
    axes = figure.add_subplot()
    for index, (name, runs) in enumerate(curves.items()):
        color = COLORS[index % len(COLORS)]
        if any(list(run[0]) != list(runs[0][0]) for run in runs):
            raise ValueError(f"The runs of {name!r} must share their x values to have a mean: draw them one by one.")
        if len(runs) > 1:
            for x, y in runs:
                axes.plot(x, y, color=color, linewidth=0.8, alpha=0.45)
        axes.plot(
            runs[0][0],
            np.mean([y for _, y in runs], axis=0),
            color=color,
            linewidth=2.2,
            marker="o",
            markersize=3,
            label=name,
        )
    axes.set(xlabel=x_label, ylabel=y_label, ylim=y_limits)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return figure


def confusion_matrix_figure(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """
    Counts as a table: true classes are rows, predicted ones columns; mistakes stand out in colour. More than 30 classes
    have no names and numbers.

    Raises:
        ValueError: if the matrix is not square, or there is not one name per class.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(class_names), len(class_names)):
        raise ValueError(
            f"The matrix must be {len(class_names)} x {len(class_names)}, one row per name, got {counts.shape}."
        )
    few = len(class_names) <= 30  # more are a picture, not a table
    figure = _figure(width=5.6, height=4.2)
    axes = figure.add_subplot()
    share = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    # hits and mistakes have scales of their own: a single mistake among hundreds would be invisible on a common one
    hits = np.ma.masked_where(~np.eye(len(counts), dtype=bool), share)
    mistakes = np.ma.masked_where(np.eye(len(counts), dtype=bool) | (counts == 0), share)
    axes.imshow(hits, cmap="Blues", vmin=0, vmax=1.6)
    axes.imshow(mistakes, cmap="Oranges", vmin=-0.1, vmax=0.3)
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
    Accuracy against confidence, with the share of the pictures below; on the diagonal, confidence is deserved.

    Args:
        bins: with `confidence`, `accuracy` and `count` each, from `metrics.calibration`.
        expected_calibration_error: for the title.

    Raises:
        ValueError: if there is no bin.
    """
    if not bins:
        raise ValueError("There is nothing to draw: calibration needs at least one picture.")
    figure = _figure(width=4.6, height=4.8)
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
    counts.set(xlabel="confidence", ylabel="share")
    for part in (axes, counts):
        part.spines[["top", "right"]].set_visible(False)
        part.spines[["left", "bottom"]].set_color(FAINT)
        part.tick_params(color=FAINT, labelcolor=INK)
    return figure


def robustness_figure(accuracy: Mapping[str, Mapping[str, float]]) -> Figure:
    """
    Accuracy with damaged pictures as a table: a row per kind of damage, stronger to the right.

    Args:
        accuracy: kind -> strength -> accuracy, from `evaluation.robustness`.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not accuracy:
        raise ValueError("There is nothing to draw: robustness needs at least one kind of damage.")
    columns = max(len(row) for row in accuracy.values())
    figure = _figure(width=1.9 + 0.85 * columns, height=0.6 + 0.42 * len(accuracy))
    axes = figure.add_subplot()
    shares = np.full((len(accuracy), columns), np.nan)
    for index, row in enumerate(accuracy.values()):
        shares[index, : len(row)] = list(row.values())
    axes.imshow(np.ma.masked_invalid(shares), cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
    for index, row in enumerate(accuracy.values()):
        for column, (strength, share) in enumerate(row.items()):
            axes.text(column, index - 0.12, f"{100 * share:.1f}", ha="center", va="center", fontsize=9, color=INK)
            axes.text(column, index + 0.27, strength, ha="center", va="center", fontsize=6, color=INK, alpha=0.7)
    axes.set_yticks(range(len(accuracy)), list(accuracy))
    axes.set_xticks([])
    axes.set_title("top-1 in %, strength below it", loc="left", fontsize=10, color=INK)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    return figure


def nearest_neighbour_accuracy(features: torch.Tensor, labels: torch.Tensor, neighbours: int = 20) -> float:
    """
    `nearest_neighbours` of the second half of the pictures in the first half.

    Args:
        features: (B, C), one row per picture.
        labels: (B,), class numbers.
        neighbours: how many are asked.
    """
    half = len(features) // 2
    predicted = nearest_neighbours(features[:half], labels[:half], features[half:], neighbours)
    return (predicted == labels[half:].cpu()).float().mean().item()


@torch.no_grad()
def nearest_neighbours(
    known: torch.Tensor, labels: torch.Tensor, asked: torch.Tensor, neighbours: int = 20, temperature: float = 0.07
) -> torch.LongTensor:
    """
    The label of most of each picture's nearest neighbours, weighted by exp(cosine similarity / temperature), as in
    DINO (arXiv 2104.14294): (number asked,), on the CPU.

    Args:
        known: features of pictures with labels, (number known, C).
        labels: their class numbers, (number known,).
        asked: features of the others, (number asked, C).
        neighbours: how many are asked.
        temperature: how fast weights fall with distance.
    """
    known, asked = (torch.nn.functional.normalize(features.float(), dim=1) for features in (known, asked))
    predicted = []
    for part in asked.split(1024):
        similarity, index = (part @ known.t()).topk(min(neighbours, len(known)), dim=1)
        votes = torch.zeros(len(part), int(labels.max()) + 1, device=known.device)
        votes.scatter_add_(1, labels.to(known.device)[index], (similarity / temperature).exp())
        predicted.append(votes.argmax(dim=1).cpu())
    return torch.cat(predicted)


def figure_to_png(figure: Figure, dots_per_inch: int = 160) -> bytes:
    """The figure as a PNG file in memory."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dots_per_inch)
    return file.getvalue()


def _figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches with its own canvas, so that nothing of pyplot's state is touched."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure
