# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Images with the objects that are annotated and found on them."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..segmentation.overlays import palette
from ..training.figures import INK, new_figure


_COLUMNS = 6


def draw_detections(
    items: Sequence[dict], found: Sequence[dict], names: Sequence[str], threshold: float = 0.5
) -> Figure:
    """
    Images in pairs of rows: what is on them, and below what was found, with boxes, masks, names and scores.

    Args:
        items: of `CocoImages`, as they are in the files.
        found: for each its detections.
        names: of the classes; label 1 is the first.
        threshold: detections with a lower score are not drawn.
    """
    columns, rows = min(len(items), _COLUMNS), 2 * -(-len(items) // _COLUMNS)
    figure = new_figure(width=2.6 * columns + 0.7, height=2.8 * rows)
    for number, (item, detections) in enumerate(zip(items, found)):
        kept = detections["scores"].float().cpu() >= threshold
        shown = {name: values.cpu()[kept] for name, values in detections.items()}
        for below, (what, objects) in enumerate((("annotated", item), ("found", shown))):
            row, column = 2 * (number // _COLUMNS) + below, number % _COLUMNS
            axes = figure.add_subplot(rows, columns, row * columns + column + 1)
            axes.imshow(np.asarray(item["image"].permute(1, 2, 0)).squeeze(), cmap="gray", interpolation="nearest")
            _draw_objects(axes, objects, names)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(what, fontsize=11, color=INK)
    return figure


def _draw_objects(axes, objects: dict, names: Sequence[str]):
    masks, colors = objects.get("masks"), palette(names, opacity=0.45) / 255
    for number, (box, label) in enumerate(zip(objects["boxes"].tolist(), objects["labels"].tolist())):
        color = colors[label - 1, :3]
        if masks is not None:
            mask = np.asarray(masks[number], dtype=bool)
            layer = np.zeros((*mask.shape, 4))
            layer[mask] = colors[label - 1]
            axes.imshow(layer, interpolation="nearest")
        left, top, right, bottom = box
        axes.add_patch(
            Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.5)
        )
        score = f" {objects['scores'][number]:.2f}" if "scores" in objects else ""
        style = {"facecolor": color, "edgecolor": "none", "pad": 1, "alpha": 0.85}
        text = names[label - 1] + score
        above = "bottom" if top > 0.06 * axes.get_ylim()[0] else "top"  # else it would leave the image
        ink = "black" if color @ (0.299, 0.587, 0.114) > 0.6 else "white"  # on light colors, by their luma
        axes.text(left, top, text, fontsize=7, color=ink, va=above, bbox=style, clip_on=True)
