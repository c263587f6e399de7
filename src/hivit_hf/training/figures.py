# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Plots with matplotlib: learning curves, style, PNG, colors of classes."""

import colorsys
import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


COLORS = ("#1d4ed8", "#c2410c", "#047857", "#7e22ce")  # dark enough for thin lines on white
INK, FAINT = "#1f2933", "#d5dbe1"
_BACKGROUND = ("background", "other")  # names of classes that are no thing of their own
_GRAY = (0.5, 0.5, 0.5, 0.3)
_GOLDEN_ANGLE = 0.618034  # of a turn: hues that follow each other are far apart


def learning_curves(
    curves: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    x_label: str,
    y_label: str,
    title: str = "",
    y_limits: tuple[float, float] | None = None,
) -> Figure:
    """
    One color per name: a thin line for each run, and a thick one for their mean if there are several.

    Args:
        curves: for each name its runs, each as (x values, y values). Runs of one name share their x values.
        x_label, y_label: what x and y are, with their units.
        title: above the figure.
        y_limits: lowest and highest y; fitted to the curves if not given.

    Raises:
        ValueError: if there is nothing to draw, or runs of one name differ in their x values.
    """
    if not curves or not all(curves.values()):
        raise ValueError(
            f"Every name needs at least one run, got { {name: len(runs) for name, runs in curves.items()} }."
        )
    figure = new_figure(width=5.6, height=3.5)
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
    frame(axes)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return figure


def figure_to_png(figure: Figure, dots_per_inch: int = 160) -> bytes:
    """The figure as a PNG file in memory."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dots_per_inch)
    return file.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, size in inches, with its own canvas: pyplot's state is not touched."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def frame(axes: Axes):
    """Faint axes at the left and at the bottom only."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=INK)


def palette(names: Sequence[str], opacity: float = 0.6) -> np.ndarray:
    """
    A color for each class: (classes, 4), uint8, the last of them the opacity. What is only background is a faint gray.

    Args:
        names: of the classes.
        opacity: of all other classes.
    """
    colors = [_GRAY if name.lower() in _BACKGROUND else (*_color(number), opacity) for number, name in enumerate(names)]
    return np.round(np.array(colors) * 255).astype(np.uint8)


def _color(number: int) -> tuple[float, float, float]:
    saturation, value = (0.9, 0.55)[number // 12 % 2], (1.0, 0.75)[number // 24 % 2]
    return colorsys.hsv_to_rgb(number * _GOLDEN_ANGLE % 1, saturation, value)
