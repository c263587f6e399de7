# Copyright 2026 The HiViT for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Overlays: segmentation maps in colors over their images, ground truth beside prediction, with a legend."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image as PILImage
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from ..training.figures import INK, new_figure, palette
from .metrics import IGNORE_INDEX


_WIDTH = 7.5  # of the figure, in inches


def overlay(image: PILImage.Image, labels: np.ndarray, colors: np.ndarray) -> PILImage.Image:
    """
    An image under its segmentation map; what is not labeled stays as it is.

    Args:
        image: any mode.
        labels: (H, W), class numbers and `IGNORE_INDEX`.
        colors: (classes, 4), as of `palette`.
    """
    drawn = pil_to_tensor(image.convert("RGB")) / 255
    for number in np.setdiff1d(labels, IGNORE_INDEX):
        mask, (*color, opacity) = torch.from_numpy(labels == number), colors[number].tolist()
        drawn = draw_segmentation_masks(drawn, mask, opacity / 255, tuple(color))
    return to_pil_image((drawn * 255).round().to(torch.uint8))


def draw_segmentation(samples: Sequence[tuple[PILImage.Image, np.ndarray, np.ndarray]], names: Sequence[str]) -> Figure:
    """
    One row per sample, with the image, the ground truth and the prediction, and below the colors of what occurs.

    Args:
        samples: images with their true and predicted segmentation maps, (H, W) each.
        names: of the classes.
    """
    colors = palette(names)
    ratios = [image.height / image.width for image, *_ in samples]
    occurring = np.unique(np.concatenate([labels.ravel() for _, *maps in samples for labels in maps]))
    patches = [
        Patch(facecolor=colors[number, :3] / 255, edgecolor=INK, label=names[number])
        for number in occurring
        if number != IGNORE_INDEX
    ]
    columns = max(1, int(_WIDTH / (0.6 + 0.07 * max(len(patch.get_label()) for patch in patches))))
    figure = new_figure(_WIDTH, height=_WIDTH / 3 * sum(ratios) + 0.6 + 0.2 * -(-len(patches) // columns))
    axes = figure.subplots(len(samples), 3, squeeze=False, height_ratios=ratios)
    for row, (image, *maps) in zip(axes, samples):
        for cell, drawn in zip(row, (image, *(overlay(image, labels, colors) for labels in maps))):
            cell.imshow(drawn, cmap="gray")
            cell.axis("off")
    for cell, title in zip(axes[0], ("image", "ground truth", "prediction")):
        cell.set_title(title, fontsize=11, color=INK)
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure
